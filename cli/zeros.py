"""Zeros in the weights of a checkpoint, counted in the stored bytes whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor

from compress.formats import packed_format, sparse
from compress.qtensor import dequantize

if TYPE_CHECKING:
    from compress.checkpoint import TensorInfo
    from compress.cli.inspect import Row
    from compress.formats.facts import Facts

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}  # zeros in every group; what hardware and kernels look for


def counted(rows: Sequence[Row], facts: Facts, tensors: Mapping[str, TensorInfo]) -> list[Row]:
    """The rows with the zeros of their weights and the patterns these form along the inputs; others are left as they are."""
    return [row if (W := _weight(row, facts, tensors)) is None else _with_zeros(row, W) for row in rows]


def _with_zeros(row: Row, W: Tensor) -> Row:
    zero = (W == 0).flatten(1) if W.ndim > 1 else (W == 0)[None]
    held = [name for name in PATTERNS if _holds(zero, *PATTERNS[name])]
    if W.ndim == 2:  # GPT-2 stores [in, out]
        held += [f"{name} transposed" for name in PATTERNS if _holds(zero.t(), *PATTERNS[name])]
    return replace(row, zeros=int(zero.sum()), patterns=tuple(held))


def _holds(zero: Tensor, zeros: int, of: int) -> bool:
    """Whether every `of` consecutive entries of every row have at least so many zeros."""
    return zero.shape[1] % of == 0 and bool((zero.reshape(len(zero), -1, of).sum(-1) >= zeros).all())


def _weight(row: Row, facts: Facts, tensors: Mapping[str, TensorInfo]) -> Tensor | None:
    module = next((module for module in facts.modules if module.name == row.name), None)
    if module is not None:
        if module.scheme is None:
            return None
        parts = {suffix: _read(f"{row.name}.{suffix}", tensors) for suffix in module.tensors if suffix != "bias"}
        N, K = row.shape
        return dequantize(packed_format(facts.quantization).decode(parts, module.scheme, (N, K), facts.quantization))
    if f"{row.name}.{sparse.SUFFIXES[0]}" in tensors:
        return sparse.unpack({suffix: _read(f"{row.name}.{suffix}", tensors) for suffix in sparse.SUFFIXES})
    name = next((name for name in (f"{row.name}.weight", row.name) if name in tensors), None)
    return None if name is None else _read(name, tensors)


def _read(name: str, tensors: Mapping[str, TensorInfo]) -> Tensor:
    with safe_open(tensors[name].file, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
