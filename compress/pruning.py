"""The verb that sets weights to zero: what can be asked for, and where the zeros go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from compress import allocate as allocation_of
from compress import arguments as check
from compress import models, pipeline, report
from compress.calib.files import Source
from compress.errors import CompressError, refuse
from compress.finetune import gradual
from compress.fisher import prune as fisher
from compress.job import Job
from compress.opening import Dense
from compress.pipeline import Chosen, Solve
from compress.progress import Track, silent
from compress.report import Report
from compress.sequential import Settings, SolvedBlock
from compress.solvers import PRUNERS, UNCALIBRATED
from compress.solvers.options import Options
from compress.spec import Plan, Scheme, Sparsity

PrunedFormat = Literal["dense", "sparse", "compressed-tensors", "gptq"]
Pruner = Literal["alps", "sparsegpt", "wanda", "magnitude", "obs", "obert", "mfac"]
Allocation = Literal["uniform", "global", "owl", "ecoflap"]
PruningEffort = Literal["fast", "default"]
LossName = Literal["causal-lm", "masked-lm", "classification", "kl"]


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    method: Pruner | None = None,
    refit: bool = True,
    effort: PruningEffort = "default",
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
    calib: Source | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    eval: bool = False,  # noqa: A002
    overwrite: bool = False,
    track: Track = silent,
) -> Report:
    """Set a fraction of a model's weights to zero, and put the others on a grid if `bits` says so.

    `sparsity` defaults to one half, or to what an N:M pattern says; pattern "row" removes that fraction of the neurons and
    heads instead, which leaves a smaller dense model. `method` defaults to alps, for rows to obs. `refit` moves the weights
    that stay to the least-squares optimum for the zeros of their layer. `effort` "default" has every layer that is solved or
    refitted do what the dense model does, which runs along; "fast" only what its own weights do on the inputs that it gets.

    `allocate` shares the zeros out between layers: uniform, by a global threshold, owl or ecoflap. Methods obert and mfac
    prune on the model's `loss` (by default the one that fits it: the next token, masked tokens, the classes that the data
    names in column label, else the distance from the dense model), by a global threshold unless `allocate` is uniform, and
    estimate its curvature anew in each of `recompute` steps, 4 by default. `finetune` steps teach what is left the dense
    model's predictions on the calibration data, in rounds while the zeros grow.

    `format` defaults to dense, which every program loads; "sparse" leaves the zeros out and is for `compress.load` alone.
    With `bits` it defaults to compressed-tensors, and the zeros are codes like any other. The other arguments are those of
    `quantize`.
    """
    arguments = report.plain(locals())
    zeros, scheme = check.pruned(
        sparsity=sparsity,
        pattern=pattern,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        skip=skip,
        model=model,
        out=out,
        overwrite=overwrite,
    )
    source = models.resolve(model)
    by_rows, on_loss = zeros.pattern == "row", method in fisher.METHODS
    method = method or ("obs" if by_rows else "alps")
    _check_together(zeros, method, allocate, recompute, finetune, bits, format)
    layer_wise = not (by_rows or on_loss) and _solves(method, refit, bits)
    _check_unused(zeros, method, refit=refit, loss=loss, bits=bits, group_size=group_size, symmetric=symmetric, damping=damping)
    if not layer_wise:
        refuse({f"--effort {effort}": effort != "default"}, "No layer is solved by itself")
    look = method not in UNCALIBRATED or refit or bits is not None or allocate in ("owl", "ecoflap") or finetune > 0
    job = Job(
        source=source,
        out=Path(out or f"{models.short_name(model)}-pruned-{100 * zeros.fraction:.3g}{f'-{bits}bit' if bits else ''}"),
        arguments=arguments,
        pruner="alps" if on_loss else method,
        options=Options.of(effort if layer_wise else "fast", damping=damping, refit=refit),
        group_size=group_size if scheme else None,
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

    def choose(dense: Dense, settings: Settings) -> Chosen:
        plan = Plan.uniform(dense.anatomy.in_features, None, zeros)
        plan.check(dense.anatomy.shapes)
        plan = _allocated(allocate, method, dense, zeros, settings, seed).on_grid(dense.anatomy.in_features, scheme)
        solve = on_model_loss if on_loss else None
        return Chosen(plan, _finetuned(solve or pipeline.layer_wise, finetune, job) if finetune else solve)

    def on_model_loss(dense: Dense, plan: Plan, settings: Settings) -> Iterator[SolvedBlock]:
        options = fisher.Options(
            method=str(method),
            gradients=job.samples,
            damping=damping,
            recompute=fisher.Options.recompute if recompute is None else recompute,
            threshold="layer" if allocate == "uniform" else "global",
            loss=loss,
            mask_token=models.mask_token(job.source) if loss in (None, "masked-lm") else None,
            seed=seed,
        )
        return fisher.run(dense.model, dense.anatomy, plan, dense.inputs or {}, settings, options)

    return pipeline.run(job, choose)


def _check_together(
    zeros: Sparsity,
    method: str,
    allocate: str | None,
    recompute: int | None,
    finetune: int,
    bits: int | None,
    format: str | None,  # noqa: A002
) -> None:
    """Raise for arguments that contradict each other."""
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
    if recompute is not None and recompute < 1:
        raise CompressError(f"--recompute is {recompute}; it is a number of steps, at least 1.")
    if finetune < 0:
        raise CompressError(f"--finetune is {finetune}; it is a number of steps.")
    if finetune and bits is not None:
        raise CompressError("Fine-tuning moves weights off the grid; leave out --bits, and quantize the result.")


def _check_unused(
    zeros: Sparsity,
    method: str,
    *,
    refit: bool,
    loss: str | None,
    bits: int | None,
    group_size: int,
    symmetric: bool,
    damping: float,
) -> None:
    """Raise for arguments that would change nothing beside the others."""
    on_loss, by_rows = method in fisher.METHODS, zeros.pattern == "row"
    if bits is None:
        refuse(
            {"--group-size": group_size != Scheme.group_size, "--asymmetric": not symmetric}, "Without --bits there is no grid"
        )
    if not on_loss:
        refuse({f"--loss {loss}": loss}, f"Method {method} looks at layers, and not at the model's loss")
    if on_loss:
        refuse({"--no-refit": not refit}, f"Method {method} moves the weights that stay as its curvature says")
    if by_rows and method == "obs":
        refuse({"--no-refit": not refit}, "Pattern row with method obs always makes up for what it removes")
    if not (on_loss or _solves(method, refit and not by_rows, bits)):
        refuse({"--damping": damping != Options.damping}, f"Method {method} without a refit solves for nothing")


def _solves(method: str, refit: bool, bits: int | None) -> bool:
    """Whether weights of a layer move to make up for others."""
    return method in ("alps", "sparsegpt", "obs") or refit or bits is not None


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
