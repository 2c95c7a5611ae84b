"""Dequantize, then multiply: what every fast kernel is compared with, and what runs where there is none."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, Shaped, UInt8
from torch import Tensor

from compress.kernels.minifloat import Form, values_of
from compress.kernels.packing import unpack

SCRATCH_CPU = 1 << 20  # dequantized weights alive at once: 4 MB in float32, which stays in a core's cache
SCRATCH_GPU = 1 << 24  # launches, not memory, are what a GPU has to save


def dequantize(
    codes: UInt8[Tensor, "N K"],
    scales: Shaped[Tensor, "N G"],
    zeros: UInt8[Tensor, "N G"],
    g_idx: Int[Tensor, "K"] | None = None,
    form: Form = "int",
    global_scale: float = 1.0,
) -> Float[Tensor, "N K"]:
    """`scale * (u - zero)` in float32; without `g_idx` the groups are contiguous and of one size.

    Codes of a form other than "int" are `scale / global_scale * number(u)`.
    """
    N, K = codes.shape
    if form != "int":
        steps = scales.float() / global_scale
        return values_of(codes, form).view(N, scales.shape[1], -1).mul_(steps[..., None]).view(N, K)
    if g_idx is not None:
        index = g_idx.long()
        return (codes.float() - zeros[:, index].float()).mul_(scales[:, index].float())
    grouped = codes.view(N, scales.shape[1], -1).float()
    return grouped.sub_(zeros[..., None].float()).mul_(scales[..., None].float()).view(N, K)


def linear(
    x: Float[Tensor, "*M K"],
    codes: UInt8[Tensor, "N K"],
    scales: Float[Tensor, "N G"],
    zeros: UInt8[Tensor, "N G"],
    bias: Float[Tensor, "N"] | None = None,
    g_idx: Int[Tensor, "K"] | None = None,
) -> Float[Tensor, "*M N"]:
    """`x Q^T + bias`, exact weights and sums in float32, rounded once to x's dtype; holds all of Q for the call."""
    out = x.float() @ dequantize(codes, scales, zeros, g_idx).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_words(
    x: Float[Tensor, "M K"],
    words: Int32[Tensor, "N W"],
    scales: Shaped[Tensor, "N G"],
    zeros: UInt8[Tensor, "N G"],
    bits: int,
    g_idx: Int[Tensor, "K"] | None = None,
    form: Form = "int",
    global_scale: float = 1.0,
) -> Float[Tensor, "M N"]:
    """`x Q^T` from packed words, a bounded tile of rows of Q at a time; works for every width, scheme and device."""
    M, K = x.shape
    N = words.shape[0]
    compute = compute_dtype(x)
    inputs, out = x.to(compute), torch.empty(M, N, dtype=x.dtype, device=x.device)
    rows = max(1, (SCRATCH_GPU if x.is_cuda else SCRATCH_CPU) // K)
    for start in range(0, N, rows):
        tile = slice(start, start + rows)
        Q = dequantize(unpack(words[tile], bits, K), scales[tile], zeros[tile], g_idx, form, global_scale)
        out[:, tile] = inputs @ Q.to(compute).t()
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply in: x's own, but float32 for float16 on a CPU, which has no usable float16 arithmetic."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
