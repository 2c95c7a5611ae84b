"""The verbs: what a user can ask for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from compress import models, pipeline
from compress.errors import CompressError
from compress.pipeline import Dense, Job, Track
from compress.report import Report
from compress.sequential import Settings
from compress.solvers.options import Options, Order
from compress.spec import Plan, Scheme, Sparsity

FormatName = Literal["compressed-tensors", "gptq", "dense"]
Method = Literal["gptq", "rtn"]
PrunedFormat = Literal["dense", "sparse", "compressed-tensors", "gptq"]
Pruner = Literal["alps", "sparsegpt", "wanda", "magnitude", "obs"]


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
    return pipeline.run(job, choose, calibrated=pipeline.needs_calibration(method))


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    method: Pruner = "alps",
    refit: bool = True,
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

    `sparsity` defaults to one half, or to what an N:M pattern says. `refit` moves the weights that stay to the least-squares
    optimum for the zeros of their layer. `format` defaults to dense, which every program loads; "sparse" leaves the zeros out
    and is for `compress.load` alone. With `bits` it defaults to compressed-tensors, and the zeros are codes like any other.
    The other arguments are those of `quantize`.
    """
    arguments = _plain(locals())
    source, zeros = models.resolve(model), Sparsity.of(pattern, sparsity)
    scheme = Scheme(bits, group_size, symmetric) if bits else None
    suffix = "".join(["-pruned", f"-{zeros.fraction:.0%}".rstrip("%"), f"-{bits}bit" if bits else ""])

    def choose(dense: Dense, _settings: Settings) -> Plan:
        return Plan.uniform(dense.anatomy.in_features, scheme, zeros)

    job = Job(
        source=source,
        out=Path(out or f"{source.resolve().name}{suffix}"),
        arguments=arguments,
        quantizer="gptq",
        pruner=method,
        options=Options(damping=damping, refit=refit),
        group_size=group_size if bits else None,
        format=_format(format, bits),
        skip=skip,
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
    return pipeline.run(job, choose, calibrated=pipeline.needs_calibration(method) or refit or bits is not None)


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
