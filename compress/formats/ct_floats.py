"""compressed-tensors' layouts of grids that are not uniform.

`float-quantized` has e4m3 numbers with a scale per row, `mxfp4-pack-quantized` and `nvfp4-pack-quantized` two e2m1 numbers to a
byte, the earlier one in its low half: what `packing` makes of 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from compress.kernels import packing
from compress.qtensor import QTensor
from compress.spec import Grid, Scheme

FORMATS: Mapping[Grid, str] = MappingProxyType(
    {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
)
GRIDS: Mapping[str, Grid] = MappingProxyType(
    {**{written: grid for grid, written in FORMATS.items()}, "naive-quantized": "fp8"}  # the same tensors under another name
)
STRATEGIES: Mapping[Grid, str] = MappingProxyType({"fp8": "channel", "mxfp4": "group", "nvfp4": "tensor_group"})


def encode(q: QTensor) -> dict[str, Tensor]:
    """fp8: `weight [N, K]` in float8_e4m3fn and `weight_scale [N, 1]` in the model's dtype.

    Else `weight_packed [N, K / 2]` in bytes and `weight_scale [N, G]`: mxfp4's exponents in bytes, 127 more than they are,
    nvfp4's numbers in float8_e4m3fn. nvfp4 also has `weight_global_scale [1]`, by which scales are divided.
    """
    if q.scheme.grid == "fp8":
        return {"weight": q.codes.clone().view(torch.float8_e4m3fn), "weight_scale": q.scales.clone()}
    packed = packing.pack(q.codes, q.scheme.bits).view(torch.uint8)[:, : q.shape[1] // 2].contiguous()
    if q.scheme.grid == "mxfp4":
        return {"weight_packed": packed, "weight_scale": q.scales.clone().view(torch.uint8)}
    return {"weight_packed": packed, "weight_scale": q.scales.clone(), "weight_global_scale": torch.tensor([q.global_scale])}


def layout(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    N, K = shape
    if scheme.grid == "fp8":
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (scale_dtype, (N, 1))}
    packed, scales = (torch.uint8, (N, K // 2)), (N, scheme.groups(K))
    if scheme.grid == "mxfp4":
        return {"weight_packed": packed, "weight_scale": (torch.uint8, scales)}
    return {
        "weight_packed": packed,
        "weight_scale": (torch.float8_e4m3fn, scales),
        "weight_global_scale": (torch.float32, (1,)),
    }


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Inverse of `encode`, for tensors that have the shapes of `layout`."""
    scales = tensors["weight_scale"].clone()
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    if scheme.grid == "fp8":
        return QTensor(tensors["weight"].clone().view(torch.uint8), scales, zeros, scheme)
    packed = tensors["weight_packed"]
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))  # bytes of the last word that none was written for
    codes = packing.unpack(whole.contiguous().view(torch.int32), scheme.bits, shape[1])
    if scheme.grid == "mxfp4":
        return QTensor(codes, scales.view(torch.float8_e8m0fnu), zeros, scheme)
    return QTensor(codes, scales, zeros, scheme, global_scale=tensors["weight_global_scale"].item())
