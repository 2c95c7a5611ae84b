"""The verbs that put weights on grids: what a user can ask for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from compress import arguments as check
from compress import models, pipeline, report
from compress.calib.files import Source
from compress.errors import CompressError, refuse
from compress.formats import gptq
from compress.job import Job
from compress.mixed import explain
from compress.mixed import request as mixed
from compress.mixed.library import Library, assembled, complete, key
from compress.mixed.methods import Method as Sensitivity
from compress.mixed.search import Found
from compress.opening import Dense
from compress.pipeline import Chosen, Solve
from compress.progress import Track, silent
from compress.proxies.proxy import load, predicted
from compress.report import Report
from compress.sequential import Settings, SolvedBlock
from compress.solvers import QUANTIZERS, UNCALIBRATED
from compress.solvers.options import Effort, Options, Order
from compress.spec import Grid, Plan, Scheme

FormatName = Literal["compressed-tensors", "gptq", "dense"]
Method = Literal["gptq", "rtn"]


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
    keep_zeros: bool = True,
    rotate: bool = False,
    format: FormatName = "compressed-tensors",  # noqa: A002  (the flag's name)
    plan: str | Path | Plan | None = None,
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
    """Quantize a model folder or hub id (the embedded reference for None) into a new folder, and say what that cost.

    `out` defaults to the model's name and bits in the current folder. `grid` "int" is evenly spaced, with 4 `bits` and a
    `group_size` of 128 unless they say otherwise; the others bring their own. `plan` overrides these and
    `symmetric` layer by layer; where `search` made it and its solved layers are still in the library, effort "fast" copies
    these. With a budget (`avg_bits`, `size`, `max_kl`, `max_ppl_increase`) the plan is searched first, among `bits` such as
    "2,3,4,8", with `pins` and `library` as in `search`. `effort` "fast" is GPTQ alone; "default" takes about twice as long for
    a smaller error; "best" weighs errors by the model's loss, with gradients of the whole model.
    `keep_zeros` leaves the zeros of layers that are pruned already, by a pattern or in more than a fifth of their weights, where
    they are. `rotate` spreads outliers over all channels by rotations that are folded into the weights, where rounding to
    nearest then costs less; the report says what it costs either way.
    `calib` is a text file, a hub dataset, or images; None is built-in text. `track` wraps the iterator over solved blocks, as a
    progress bar does. Raises CompressError for anything the user can act on; `out` is then as it was. The blocks that a run
    has solved before it ends early stay beside `out`, and the same call goes on from there.
    """
    arguments = report.plain(locals())
    searched = any(budget is not None for budget in (avg_bits, size, max_kl, max_ppl_increase))
    calibrated = method not in UNCALIBRATED or searched or rotate
    scheme = check.quantized(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        grid=grid,
        avg_bits=avg_bits,
        size=size,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        pins=pins,
        library=library,
        rotate=rotate,
        plan=plan,
        skip=skip,
        model=model,
        out=out,
        overwrite=overwrite,
    )
    _check_method(method, effort, order, damping, calibrated)
    if scheme and format == "gptq":
        gptq.check_grid(scheme)
    group_size = scheme.group_size if scheme else Scheme.group_size if group_size is None else group_size
    arguments |= {"group_size": group_size} | ({"bits": scheme.bits} if scheme else {})
    source = models.resolve(model)
    target = Path(out or f"{models.short_name(model)}-{'mixed' if plan or scheme is None else scheme.label}")
    wanted = None
    if searched:
        wanted = mixed.request(
            target,
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
    job = Job(
        source=source,
        out=target,
        arguments=arguments,
        quantizer=method,
        options=Options.of(effort, order=order, damping=damping, keep_zeros=keep_zeros),
        scheme=None if plan else scheme,
        group_size=None if plan else group_size,
        format=format,
        skip=skip,
        calibrated=calibrated,
        judged=searched or explain.library_of(plan) is not None,  # with the samples that its layers were solved with
        rotate=rotate,
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

    def choose(dense: Dense, settings: Settings) -> Chosen:
        if wanted is not None:
            found = pipeline.found(job, dense, settings, wanted)
            notes = (f"Budgets: {'; '.join(map(str, found.budgets))}.",) if len(found.budgets) > 1 else ()
            return Chosen(found.plan, _copying(found.library) if effort == "fast" else None, notes)
        if plan is None:
            return Chosen(Plan.uniform(dense.anatomy.in_features, scheme))
        read = _read(plan)
        solved = None if rotate else _library(plan, read, dense, settings)
        return Chosen(read, _copying(solved) if solved else None)

    return pipeline.run(job, choose)


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
    calib: Source | None = None,
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
    arguments = report.plain(locals())
    check.searched(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        sparsity=sparsity,
        avg_bits=avg_bits,
        size=size,
        latency=latency,
        bops=bops,
        avg_sparsity=avg_sparsity,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        method=method,
        proxy=proxy,
        skip=skip,
        model=model,
    )
    source = models.resolve(model)
    target = Path(out or f"{models.short_name(model)}-plan.json")
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
        options=Options(order=order, damping=damping),
        format=format,
        skip=skip,
        judged=True,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        track=track,
    )
    found = pipeline.find(job, wanted)
    about = {"method": method, "seed": seed, "command": report.command(), "arguments": arguments, "versions": report.versions()}
    explain.save(found, about)
    if plot is not None:
        explain.plot(found, Path(plot))
    return found


def _check_method(method: Method, effort: Effort, order: Order, damping: float, calibrated: bool) -> None:
    """Raise for a method that is not there, and for settings of solving that it has none of."""
    if method not in QUANTIZERS:
        raise CompressError(f"There is no method {method}; choose one of {', '.join(QUANTIZERS)}.")
    if method not in UNCALIBRATED:
        return
    solving = {f"--effort {effort}": effort != "default", "--damping": damping != Options.damping}
    solving |= {"--no-act-order": order == "natural", "--static-groups": order == "act"}
    corrected = {
        f"--effort {effort}": effort == "best"
    }  # what is calibrated is solved for the dense model's outputs, if not fast
    refuse(corrected if calibrated else solving, f"Method {method} rounds every weight by itself")


def _library(plan: str | Path | Plan, read: Plan, dense: Dense, settings: Settings) -> Library | None:
    """The library that a plan file was made from, if it still has all of the plan for this very model and calibration."""
    folder = explain.library_of(plan)
    if folder is None or folder.name != key(dense.stored, dense.inputs, settings):
        return None
    return Library(folder) if complete(Library(folder), read) else None


def _copying(library: Library) -> Solve:
    def solve(dense: Dense, plan: Plan, _settings: Settings) -> Iterator[SolvedBlock]:
        return assembled(library, dense.anatomy, plan)

    return solve


def _read(plan: str | Path | Plan) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.load(plan)
