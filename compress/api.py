"""The verbs: what a user can ask for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from compress import allocate as allocation_of
from compress import models, pipeline
from compress.errors import CompressError
from compress.finetune import gradual
from compress.fisher import prune as fisher
from compress.pipeline import Dense, Job, Solve, Track
from compress.report import Report
from compress.sequential import Settings, SolvedBlock
from compress.solvers import PRUNERS, QUANTIZERS, UNCALIBRATED
from compress.solvers.options import Options, Order
from compress.spec import Plan, Scheme, Sparsity

FormatName = Literal["compressed-tensors", "gptq", "dense"]
Method = Literal["gptq", "rtn"]
PrunedFormat = Literal["dense", "sparse", "compressed-tensors", "gptq"]
Pruner = Literal["alps", "sparsegpt", "wanda", "magnitude", "obs", "obert", "mfac"]
Allocation = Literal["uniform", "global", "owl", "ecoflap"]
LossName = Literal["causal-lm", "masked-lm", "classification", "kl"]


def quantize(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: Method = "gptq",
    order: Order = "group",
    damping: float = 0.01,
    format: FormatName = "compressed-tensors",  # noqa: A002  (the flag's name)
    plan: str | Path | Plan | None = None,
    skip: Sequence[str] = (),
    calib: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    eval: bool = False,  # noqa: A002
    overwrite: bool = False,
    track: Track = lambda blocks, _total: blocks,
) -> Report:
    """Quantize a model folder or hub id (the embedded reference for None) into a new folder, and say what that cost.

    `out` defaults to the model's name and bits in the current folder. `plan` overrides `bits`, `group_size` and `symmetric`
    layer by layer. `calib` is a text file, a hub dataset, or images; None is built-in text. `track` wraps the iterator over
    solved blocks, as a progress bar does. Raises CompressError for anything the user can act on; `out` is then as it was.
    """
    arguments = _plain(locals())
    if method not in QUANTIZERS:
        raise CompressError(f"There is no method {method}; choose one of {', '.join(QUANTIZERS)}.")
    source, scheme = models.resolve(model), Scheme(bits, group_size, symmetric)

    def choose(dense: Dense, _settings: Settings) -> Plan:
        return _read(plan) if plan else Plan.uniform(dense.anatomy.in_features, scheme)

    job = Job(
        source=source,
        out=Path(out or f"{source.resolve().name}-{'mixed' if plan else f'{bits}bit'}"),
        arguments=arguments,
        quantizer=method,
        pruner="alps",
        options=Options(order=order, damping=damping),
        group_size=None if plan else group_size,
        format=format,
        skip=skip,
        calibrated=method not in UNCALIBRATED,
        labelled=False,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        eval=eval,
        overwrite=overwrite,
        track=track,
    )
    return pipeline.run(job, choose)


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    method: Pruner | None = None,
    refit: bool = True,
    allocate: Allocation | None = None,
    loss: LossName | None = None,
    recompute: int | None = None,
    finetune: int = 0,
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    damping: float = 0.01,
    format: PrunedFormat | None = None,  # noqa: A002
    skip: Sequence[str] = (),
    calib: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    eval: bool = False,  # noqa: A002
    overwrite: bool = False,
    track: Track = lambda blocks, _total: blocks,
) -> Report:
    """Set a fraction of a model's weights to zero, and put the others on a grid if `bits` says so.

    `sparsity` defaults to one half, or to what an N:M pattern says; pattern "row" removes that fraction of the neurons and
    heads instead, which leaves a smaller dense model. `method` defaults to alps, for rows to obs. `refit` moves the weights
    that stay to the least-squares optimum for the zeros of their layer.

    `allocate` shares the zeros out between layers: uniform, by a global threshold, owl or ecoflap. Methods obert and mfac
    prune on the model's `loss` (by default the one that fits it: the next token, masked tokens, the classes that the data
    names in column label, else the distance from the dense model), by a global threshold unless `allocate` is uniform, and
    estimate its curvature anew in each of `recompute` steps, 4 by default. `finetune` steps teach what is left the dense
    model's predictions on the calibration data, in rounds while the zeros grow.

    `format` defaults to dense, which every program loads; "sparse" leaves the zeros out and is for `compress.load` alone.
    With `bits` it defaults to compressed-tensors, and the zeros are codes like any other. The other arguments are those of
    `quantize`.
    """
    arguments = _plain(locals())
    source, zeros = models.resolve(model), Sparsity.of(pattern, sparsity)
    by_rows, on_loss = zeros.pattern == "row", method in fisher.METHODS
    method = method or ("obs" if by_rows else "alps")
    scheme = Scheme(bits, group_size, symmetric) if bits else None
    _check_pruning(zeros, method, allocate, recompute, finetune, bits, format)
    look = method not in UNCALIBRATED or refit or bits is not None or allocate in ("owl", "ecoflap") or finetune > 0
    job = Job(
        source=source,
        out=Path(out or f"{source.resolve().name}-pruned-{100 * zeros.fraction:.3g}{f'-{bits}bit' if bits else ''}"),
        arguments=arguments,
        quantizer="gptq",
        pruner="alps" if on_loss else method,
        options=Options(damping=damping, refit=refit),
        group_size=group_size if bits else None,
        format=_format(format, bits),
        skip=skip,
        calibrated=method == "obs" if by_rows else look,
        labelled=on_loss and loss in (None, "classification"),
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        eval=eval,
        overwrite=overwrite,
        track=track,
    )
    if by_rows:
        return pipeline.run_rows(job, zeros.fraction, "obs" if method == "obs" else "magnitude")

    def choose(dense: Dense, settings: Settings) -> Plan:
        plan = Plan.uniform(dense.anatomy.in_features, None, zeros)
        plan.check(dense.anatomy.shapes)
        return _allocated(allocate, method, dense, zeros, settings, seed).on_grid(dense.anatomy.in_features, scheme)

    def on_model_loss(dense: Dense, plan: Plan, settings: Settings) -> Iterator[SolvedBlock]:
        options = fisher.Options(
            method=str(method),
            gradients=job.samples,
            damping=damping,
            recompute=recompute or fisher.Options.recompute,
            threshold="layer" if allocate == "uniform" else "global",
            loss=loss,
            mask_token=models.mask_token(job.source) if loss in (None, "masked-lm") else None,
            seed=seed,
        )
        return fisher.run(dense.model, dense.anatomy, plan, dense.inputs or {}, settings, options)

    solve = on_model_loss if on_loss else pipeline.layer_wise
    return pipeline.run(job, choose, _finetuned(solve, finetune, job) if finetune else solve)


def _check_pruning(
    zeros: Sparsity,
    method: str,
    allocate: str | None,
    recompute: int | None,
    finetune: int,
    bits: int | None,
    format: str | None,  # noqa: A002
) -> None:
    """Raise for arguments that do not go together."""
    on_loss = method in fisher.METHODS
    if method not in PRUNERS and not on_loss:
        raise CompressError(f"There is no method {method}; choose one of {', '.join([*PRUNERS, *fisher.METHODS])}.")
    if zeros.pattern == "row":
        refused = {"--allocate": allocate, "--recompute": recompute, "--finetune": finetune, "--bits": bits}
        refused |= {f"--format {format}": format not in (None, "dense")}
        if given := [flag for flag, value in refused.items() if value]:
            raise CompressError(f"Pattern row makes a smaller dense model; {given[0]} does not apply. Prune its result again.")
        if method not in ("obs", "magnitude"):
            raise CompressError(f"Method {method} does not remove rows; use obs or magnitude.")
    if on_loss and allocate in ("owl", "ecoflap"):
        raise CompressError(f"Method {method} compares the costs of all layers itself; use --allocate global or uniform.")
    if on_loss and bits is not None:
        raise CompressError(f"Method {method} prunes without a grid; leave out --bits, or use alps or sparsegpt.")
    if recompute is not None and not on_loss:
        raise CompressError(f"--recompute is for {' and '.join(fisher.METHODS)}; method {method} solves every layer once.")
    if finetune < 0:
        raise CompressError(f"--finetune is {finetune}; it is a number of steps.")
    if finetune and bits is not None:
        raise CompressError("Fine-tuning moves weights off the grid; leave out --bits, and quantize the result.")


def _allocated(allocation: Allocation | None, method: str, dense: Dense, zeros: Sparsity, settings: Settings, seed: int) -> Plan:
    """The plan of an allocation; None is uniform, which methods on the loss depart from by themselves."""
    model, anatomy, inputs = dense.model, dense.anatomy, dense.inputs or {}
    if allocation == "global" and method not in fisher.METHODS:
        score: allocation_of.Score = "magnitude" if method == "magnitude" else "wanda"
        return allocation_of.global_threshold(model, anatomy, inputs, zeros, settings, score)
    if allocation == "owl":
        return allocation_of.owl(model, anatomy, inputs, zeros, settings)
    if allocation == "ecoflap":
        return allocation_of.ecoflap(model, anatomy, inputs, zeros, settings, seed=seed)
    return allocation_of.uniform(anatomy, zeros)


def _finetuned(solve: Solve, steps: int, job: Job) -> Solve:
    def tuned(dense: Dense, plan: Plan, settings: Settings) -> Iterator[SolvedBlock]:
        def prune_again(model: PreTrainedModel, at: Plan) -> Iterator[SolvedBlock]:
            return solve(replace(dense, model=model), at, settings)

        return gradual(
            dense.model, dense.anatomy, plan, dense.inputs or {}, settings, prune_again, steps, job.seed, track=job.track
        )

    return tuned


def _format(asked: str | None, bits: int | None) -> str:
    if asked is None:
        return "dense" if bits is None else "compressed-tensors"
    if bits is None and asked not in ("dense", "sparse"):
        raise CompressError(f"Format {asked} packs quantized weights; give --bits too, or --format dense or sparse.")
    if bits is not None and asked == "sparse":
        raise CompressError("Format sparse holds weights without a grid; leave out --bits, or use --format compressed-tensors.")
    return asked


def _read(plan: str | Path | Plan) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a verb as JSON can hold them."""
    return {name: _plain_value(value) for name, value in arguments.items() if name != "track"}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Plan):
        return "(given)"
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
