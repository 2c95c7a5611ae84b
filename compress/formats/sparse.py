"""Pruned weights without their zeros: a bit for every weight, and the values of those that are not zero.

Such a folder has no model.safetensors, so that other programs cannot find weights in it, rather than read wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import CompressError

STEM = "sparse"  # of the weight files' names
SUFFIXES = ("weight_bitmask", "weight_values", "weight_shape")


def pack(weight: Float[Tensor, "..."]) -> dict[str, Tensor]:
    """`weight_bitmask`, bits of the flattened weight from the lowest of every byte, `weight_values` and `weight_shape`."""
    flat = weight.flatten()
    kept = flat != 0
    bits = np.packbits(kept.numpy(), bitorder="little")
    return {
        "weight_bitmask": torch.from_numpy(bits),
        "weight_values": flat[kept],
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor]) -> Float[Tensor, "..."]:
    """The inverse of `pack`, bit for bit but for the sign of zeros."""
    bitmask, values, shape = (tensors[suffix] for suffix in SUFFIXES)
    weight = torch.zeros(shape.tolist(), dtype=values.dtype)
    kept = torch.from_numpy(np.unpackbits(bitmask.numpy(), count=weight.numel(), bitorder="little")).bool()
    if int(kept.sum()) != len(values):
        raise CompressError(f"A sparse weight has {len(values):,} values for {int(kept.sum()):,} bits; the file is damaged.")
    weight.view(-1)[kept] = values
    return weight


def nbytes(numel: int, kept: int, itemsize: int, dimensions: int = 2) -> int:
    """Bytes of `pack`'s tensors for a weight of `numel` entries of which `kept` are not zero."""
    return -(-numel // 8) + kept * itemsize + 8 * dimensions


def is_packed(names: Mapping[str, object]) -> bool:
    """Whether a folder's tensors are in this format."""
    return any(name.endswith("." + SUFFIXES[0]) for name in names)
