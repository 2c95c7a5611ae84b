"""The verbs: what a user can ask for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from compress import allocate as allocation_of
from compress import models, pipeline, report
from compress.errors import CompressError
from compress.finetune import gradual
from compress.fisher import prune as fisher
from compress.formats import gptq
from compress.mixed import explain
from compress.mixed import request as mixed
from compress.mixed.library import Library, assembled, complete, key
from compress.mixed.methods import Method as Sensitivity
from compress.mixed.search import Found
from compress.pipeline import Dense, Job, Solve
from compress.progress import Track, silent
from compress.proxies.proxy import load, predicted
from compress.report import Report
from compress.sequential import Settings, SolvedBlock
from compress.solvers import PRUNERS, QUANTIZERS, UNCALIBRATED
from compress.solvers.options import Effort, Options, Order
from compress.spec import Grid, Plan, Scheme, Sparsity

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
    bits: int | str | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    grid: Grid = "int",
    avg_bits: float | None = None,
    size: str | int | None = None,
    max_kl: float | None = None,
    max_ppl_increase: str | float | None = None,
    pins: Sequence[str] = (),
    library: str | Path | None = None,
    method: Method = "gptq",
    effort: Effort = "default",
    order: Order = "group",
    damping: float = 0.01,
    rotate: bool = False,
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
    track: Track = silent,
) -> Report:
    """Quantize a model folder or hub id (the embedded reference for None) into a new folder, and say what that cost.

    `out` defaults to the model's name and bits in the current folder. `grid` "int" is evenly spaced, with 4 `bits` and a
    `group_size` of 128 unless they say otherwise; the others bring their own. `plan` overrides these and
    `symmetric` layer by layer; where `search` made it and its solved layers are still in the library, effort "fast" copies
    these. With a budget (`avg_bits`, `size`, `max_kl`, `max_ppl_increase`) the plan is searched first, among `bits` such as
    "2,3,4,8", with `pins` and `library` as in `search`. `effort` "fast" is GPTQ alone; "default" takes about twice as long for
    a smaller error; "best" weighs errors by the model's loss, with gradients of the whole model. `rotate` spreads outliers over
    all channels by rotations that are folded into the weights, where rounding to nearest then costs less; the report says what it
    costs either way.
    `calib` is a text file, a hub dataset, or images; None is built-in text. `track` wraps the iterator over solved blocks, as a
    progress bar does. Raises CompressError for anything the user can act on; `out` is then as it was.
    """
    arguments = _plain(locals())
    searched = any(budget is not None for budget in (avg_bits, size, max_kl, max_ppl_increase))
    if method not in QUANTIZERS:
        raise CompressError(f"There is no method {method}; choose one of {', '.join(QUANTIZERS)}.")
    if plan and searched:
        raise CompressError("A plan is given, and a budget to search one for; give one of them.")
    if not searched and (pins or library):
        raise CompressError("--pin and --library are for a search; give a budget too, such as --avg-bits 3.5.")
    if searched and grid != "int":
        raise CompressError(f"A search chooses among bits of grid int; leave out --grid {grid}, or the budget.")
    if rotate and searched:
        raise CompressError("--rotate is judged at the bits of a plan; leave it out of a search, and use it with the plan found.")
    scheme = None if searched else Scheme.of(grid, _one(bits), group_size, symmetric)
    if scheme and format == "gptq":
        gptq.check_grid(scheme)
    group_size = scheme.group_size if scheme else Scheme.group_size if group_size is None else group_size
    arguments |= {"group_size": group_size} | ({"bits": scheme.bits} if scheme else {})
    source = models.resolve(model)
    solved: list[Library] = []

    def choose(dense: Dense, settings: Settings) -> Plan:
        if searched:
            wanted = mixed.request(
                job.out,
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                avg_bits=avg_bits,
                size=size,
                max_kl=max_kl,
                max_ppl_increase=max_ppl_increase,
                pins=pins,
                library=library,
                seed=seed,
            )
            found = pipeline.found(job, dense, settings, wanted)
            if effort == "fast":
                solved.append(found.library)
            return found.plan
        if plan is None:
            return Plan.uniform(dense.anatomy.in_features, scheme)
        read = _read(plan)
        solved.extend([] if rotate else _library(plan, read, dense, settings))
        return read

    def solve(dense: Dense, chosen: Plan, settings: Settings) -> Iterator[SolvedBlock]:
        if solved:
            return assembled(solved[0], dense.anatomy, chosen)
        return pipeline.layer_wise(dense, chosen, settings)

    job = Job(
        source=source,
        out=Path(out or f"{source.resolve().name}-{'mixed' if plan or scheme is None else scheme.label}"),
        arguments=arguments,
        quantizer=method,
        pruner="alps",
        options=Options.of(effort, order=order, damping=damping),
        group_size=None if plan else group_size,
        format=format,
        skip=skip,
        calibrated=method not in UNCALIBRATED or searched or rotate,
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
        scheme=None if plan else scheme,
        rotate=rotate,
        judged=searched or explain.library_of(plan) is not None,  # with the samples that its layers were solved with
    )
    return pipeline.run(job, choose, solve)


def search(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    avg_bits: float | None = None,
    size: str | int | None = None,
    latency: str | float | None = None,
    latency_table: str | Path | None = None,
    bops: str | float | None = None,
    activation_bits: int | None = None,
    avg_sparsity: float | None = None,
    max_kl: float | None = None,
    max_ppl_increase: str | float | None = None,
    bits: str | int | Sequence[int] | None = None,
    group_size: str | int | Sequence[int] = 128,
    symmetric: bool = True,
    sparsity: str | Sequence[str | float] = (),
    method: Sensitivity = "kl",
    proxy: str | Path | None = None,
    pins: Sequence[str] = (),
    refine: int = 0,
    all_pairs: bool = False,
    verify: bool = False,
    plot: str | Path | None = None,
    library: str | Path | None = None,
    order: Order = "group",
    damping: float = 0.01,
    format: FormatName = "compressed-tensors",  # noqa: A002
    skip: Sequence[str] = (),
    calib: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    track: Track = silent,
) -> Found:
    """Search the plan that loses least within a budget, or the smallest one that keeps a quality, and write it to `out`.

    Budgets, of which several may be given: `avg_bits` over the layers that can be compressed, with scales; `size` of all weight
    files, "2.1GB"; `latency` as a part of the dense layers' time, "0.7x", by a table that `compress bench` made on this machine;
    `bops`, the part of the dense model's bit operations, with inputs rounded to `activation_bits` while plans are judged;
    `avg_sparsity`; `max_kl` in nats or `max_ppl_increase`, "1%", both measured. Every layer takes one of `bits` (2, 3, 4 and 8)
    at one of the group sizes, or of the levels of `sparsity` ("0.5", "2:4", 0 for none); layers that runtimes fuse take the
    same. `pins` such as "REGEX=8" fix some of them. `method` predicts what an option loses, emq by the evolved `proxy`, a file
    of `evolve` or the one that comes along; `refine` generations of an evolution on the measured loss follow. Solved layers are
    kept in `library`, where another search, or `quantize` with the plan, finds them. `verify` measures the plan, uniform plans
    and the frontier; `plot` draws them. Raises CompressError.
    """
    arguments = _plain(locals())
    source = models.resolve(model)
    target = Path(out or f"{source.resolve().name}-plan.json")
    if proxy is not None and method != "emq":
        raise CompressError(f"--proxy is for method emq, not for {method}.")
    explain.check_target(target, None if plot is None else Path(plot))
    wanted = mixed.request(
        target,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        sparsity=sparsity,
        avg_bits=avg_bits,
        size=size,
        latency=latency,
        latency_table=latency_table,
        bops=bops,
        activation_bits=activation_bits,
        avg_sparsity=avg_sparsity,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        method=method,
        predict=partial(predicted, load(proxy)) if method == "emq" else None,
        pins=pins,
        refine=refine,
        verify=verify or plot is not None,
        all_pairs=all_pairs,
        library=library,
        seed=seed,
        on=device,
    )
    job = Job(
        source=source,
        out=target,
        arguments=arguments,
        quantizer="gptq",
        pruner="alps",
        options=Options(order=order, damping=damping),
        group_size=None,
        format=format,
        skip=skip,
        calibrated=True,
        labelled=False,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        eval=False,
        overwrite=True,
        track=track,
        judged=True,
    )
    found = pipeline.find(job, wanted)
    about = {"method": method, "seed": seed, "command": report.command(), "arguments": arguments, "versions": report.versions()}
    explain.save(found, about)
    if plot is not None:
        explain.plot(found, Path(plot))
    return found


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
    track: Track = silent,
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


def _one(bits: int | str | None) -> int | None:
    """The bits of a uniform plan, None where they were not asked for."""
    try:
        return None if bits is None else int(bits)
    except ValueError:
        raise CompressError(f"--bits is {bits}; several are for a budget to choose from, such as --avg-bits 3.5.") from None


def _library(plan: str | Path | Plan, read: Plan, dense: Dense, settings: Settings) -> list[Library]:
    """The library that a plan file was made from, if it still has all of the plan for this very model and calibration."""
    folder = explain.library_of(plan)
    if folder is None or folder.name != key(dense.stored, dense.inputs, settings):
        return []
    return [Library(folder)] if complete(Library(folder), read) else []


def _read(plan: str | Path | Plan) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a verb as JSON can hold them."""
    return {name: _plain_value(value) for name, value in arguments.items() if name != "track"}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Plan):
        return "(given)"
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
