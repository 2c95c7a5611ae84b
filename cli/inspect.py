"""`compress inspect`: the layers of a checkpoint, their schemes and sizes."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compress.checkpoint import TensorInfo
    from compress.formats.facts import Facts, Module

OTHER = "everything else"
BITS_IN_BYTE = 8


@dataclass(frozen=True)
class Row:
    """One layer: what it is stored as, its shape as a dense matrix, and its bytes with scales but without bias.

    `zeros` and the N:M `patterns` that hold in every row are there where the weights themselves were read.
    """

    name: str
    scheme: str
    quantized: bool
    shape: tuple[int, ...]
    weights: int
    bytes: int
    zeros: int | None = None
    patterns: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * BITS_IN_BYTE / self.weights if self.weights else 0.0


@click.command()
@click.argument("folder")
@click.option("--zeros", is_flag=True, help="Read the weights too: count zeros, look for 2:4 and 4:8. Pruned folders always do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: str, zeros: bool, as_json: bool) -> None:
    """Show every layer of FOLDER - quantized by this program or another, or dense - with its scheme, shape and size.

    Only config.json and the headers of the weight files are read, unless zeros are to be counted.
    """
    from compress import checkpoint
    from compress.cli import folder as folders
    from compress.cli import progress
    from compress.formats import rules

    facts, tensors = folders.read(folder)
    rows = list(layers(facts, tensors))
    zeros = zeros or checkpoint.is_pruned(Path(folder))
    if zeros:
        from compress.cli.zeros import counted

        rows = counted(rows, facts, tensors)
    sums = totals(rows)
    if as_json:
        entries = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in rows]
        progress.print_json({"folder": folder, "quant_method": facts.method, "layers": entries, "totals": sums})
        return
    columns = ["layer", "scheme", "shape", "bits/weight", "size", *(["zeros", "patterns"] if zeros else [])]
    cells = [_cells(row)[: len(columns)] for row in rows]
    progress.console().print(progress.table(columns, cells, title=f"{folder}: {facts.method}"))
    served = rules.no_kernel(facts)
    progress.console().print(progress.facts([*_words(sums), *([("compress", served)] if served else [])]))


def layers(facts: Facts, tensors: Mapping[str, TensorInfo]) -> Iterator[Row]:
    """A row for every quantized module, one for every dense matrix or convolution, and one for the rest together."""
    from compress.formats import sparse

    left = dict(tensors)
    for module in facts.modules:
        parts = [left.pop(f"{module.name}.{suffix}") for suffix in module.tensors if suffix != "bias"]
        N, K = _stored_shape(module, tensors) or (module.N, module.K)
        yield Row(module.name, _scheme(module), True, (N, K), N * K, sum(part.nbytes for part in parts))
    for name in [name for name in left if name.endswith("." + sparse.SUFFIXES[0])]:
        yield _sparse_row(name.removesuffix("." + sparse.SUFFIXES[0]), left)
    for name in [name for name, info in left.items() if len(info.shape) > 1]:
        info = left.pop(name)
        yield Row(name.removesuffix(".weight"), info.dtype, False, info.shape, math.prod(info.shape), info.nbytes)
    if left:
        weights, size = sum(math.prod(info.shape) for info in left.values()), sum(info.nbytes for info in left.values())
        yield Row(OTHER, f"{len(left)} tensors", False, (), weights, size)


def _sparse_row(name: str, left: dict[str, TensorInfo]) -> Row:
    """A layer stored without its zeros; its three tensors are taken from `left`."""
    from compress.formats import sparse

    bitmask, values, shape = (left.pop(f"{name}.{suffix}") for suffix in sparse.SUFFIXES)
    dimensions = _integers(shape)
    weights = math.prod(dimensions)
    size = bitmask.nbytes + values.nbytes + shape.nbytes
    return Row(name, f"{values.dtype} sparse", False, dimensions, weights, size, weights - values.numel)


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums over rows: `bits_per_weight` counts every weight of the model, `dense_share` is the part of the bytes left dense."""
    size, weights = sum(row.bytes for row in rows), sum(row.weights for row in rows)
    dense = sum(row.bytes for row in rows if not row.quantized)
    return {
        "weights": weights,
        "bytes": size,
        "bits_per_weight": size * BITS_IN_BYTE / weights if weights else 0.0,
        "quantized_layers": sum(row.quantized for row in rows),
        "dense_bytes": dense,
        "dense_share": dense / size if size else 0.0,
    }


def _stored_shape(module: Module, tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """The 16 bytes of `weight_shape`: the packed width of a per-row layer does not tell K exactly."""
    info = tensors.get(f"{module.name}.weight_shape")
    if info is None or info.shape != (2,) or info.dtype not in ("I64", "I32"):
        return None
    N, K = _integers(info)
    return N, K


def _integers(info: TensorInfo) -> tuple[int, ...]:
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        return struct.unpack(f"<{info.numel}{'q' if info.dtype == 'I64' else 'i'}", stream.read(info.nbytes))


def _scheme(module: Module) -> str:
    if module.scheme is not None:
        return str(module.scheme)
    weights = (module.group or {}).get("weights")
    if weights:
        return f"{weights.get('type', 'int')}{weights.get('num_bits', '?')} {weights.get('strategy') or ''}".strip()
    return "not readable" if module.problem else "not in the config"


def _cells(row: Row) -> tuple[str, ...]:
    from compress.cli.progress import size

    shape = " x ".join(map(str, row.shape))
    zeros = "" if row.zeros is None else f"{row.zeros / row.weights:.2%}"
    return row.name, row.scheme, shape, f"{row.bits_per_weight:.2f}", size(row.bytes), zeros, ", ".join(row.patterns)


def _words(sums: Mapping[str, Any]) -> list[tuple[str, str]]:
    from compress.cli.progress import size

    return [
        ("weights", f"{sums['weights']:,}"),
        ("size", size(sums["bytes"])),
        ("bits per weight", f"{sums['bits_per_weight']:.2f} over all weights, with scales and everything left dense"),
        ("left dense", f"{size(sums['dense_bytes'])}, {sums['dense_share']:.1%} of the size"),
    ]
