"""Triton kernels over planar weights: the fused product, the sum of its parts, and dequantization for a dense product.

The weight is the left operand, Y^T = Q X^T, which Hopper's matrix instruction takes from registers, where it was decoded; rows of
x are the small dimension. Up to 128 inputs of a group are multiplied at once, with one wait for the result. Groups are scaled
after it, when operands are small exact integers; in tall tiles before, to the weights of a dense product. K can be cut between
programs, whose float32 partial sums are added in a fixed order by a second launch: the same bytes every time.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from compress.kernels.decode import DTYPES, code_for, constant, decode, decode_run, minus_zero
from compress.kernels.launch import Launch
from compress.kernels.planar import SLICE, TILE, Tensors, blocks, slices
from compress.kernels.routing import route

SUMMED = 1024  # elements of the output that a program of `_sum_parts` adds
EXPANDED_WARPS = 4


@triton.jit
@no_type_check
def scaled(levels, scale, DTYPE: tl.constexpr):
    """Levels times their rows' scales, rounded once."""
    wide: tl.constexpr = DTYPE if scale.dtype == DTYPE else tl.float32
    return (levels.to(wide) * scale.to(wide)[:, None]).to(DTYPE)


@triton.jit(do_not_specialize=["M", "per_part", "per_token"])  # a new number of rows compiles nothing
@no_type_check
def _multiply(
    x,
    low,
    high,
    scales,
    zeros,
    bias,
    out,
    order,
    routes,
    M,
    N,
    K,
    padded_N,
    B,
    per_part,
    per_token,
    BITS: tl.constexpr,
    SLICES: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    FIRST: tl.constexpr,
    CODE: tl.constexpr,
):
    """One tile of Y^T from blocks part * per_part .. of K; GROUP and RUN count slices, GROUP is 0 for one scale per row.

    With EXPERTS the weights are those of several layers, and `routes` has three numbers for every tile of rows: its layer, and
    where in `order` its rows begin and end. Row r of the output is row r // per_token of x times the layer it was routed to.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    RUNS: tl.constexpr = SLICES // RUN
    TALL: tl.constexpr = 32 if SLICES == 8 else 64  # above, registers do not hold a group's sum beside the product's, twice
    part = tl.program_id(2)
    start = part * per_part
    stop = tl.minimum(start + per_part, B)
    if EXPERTS:
        route = routes + tl.program_id(0) * 3
        expert = tl.load(route).to(tl.int64)
        at_rows = tl.load(route + 1) + tl.arange(0, BM)
        present = at_rows < tl.load(route + 2)
        stop = tl.where(tl.load(route + 1) < tl.load(route + 2), stop, start)  # a tile without rows has nothing to do
        row = tl.load(order + at_rows, mask=present, other=0)
        source = row // per_token
        groups = B * SLICES // GROUP + (B * SLICES % GROUP != 0) if GROUP != 0 else 1
        high += expert * padded_N * B * 32
        low += expert * padded_N * B * 32
        scales += expert * groups * padded_N
        zeros += expert * groups * padded_N
    else:
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        present = row < M
        source = row
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i, k = tl.arange(0, 32), tl.arange(0, RUN * 32)
    word = ((n // 64).to(tl.int64) * B * 64 + n % 64)[:, None] * 32 + i[None, :]
    inputs = x + source.to(tl.int64)[None, :] * K + k[:, None]
    middle = minus_zero(tl.full((BN,), 2 ** (BITS - 1), tl.float32), FIRST, DTYPE)
    acc = tl.zeros((BN, BM), tl.float32)
    scale = tl.load(scales + (n if GROUP == 0 else start * RUNS // (GROUP // RUN) * padded_N + n))
    for b in range(start, stop):
        words = tl.load(low + word + b * 2048)
        highs = tl.load(high + word + b * 2048) if BITS == 3 else words
        for r in tl.static_range(RUNS):
            run = b * RUNS + r
            at = n if GROUP == 0 else run // (GROUP // RUN) * padded_N + n
            inside = present[None, :] if WHOLE else present[None, :] & (run * RUN * 32 + k < K)[:, None]
            operand = tl.load(inputs + run * RUN * 32, mask=inside, other=0.0)
            minus = middle if SYMMETRIC else minus_zero(tl.load(zeros + at), FIRST, DTYPE)
            levels = decode_run(words, highs, minus[:, None], r * RUN, BITS, RUN, DTYPE, CODE)
            if GROUP == 0:
                acc = tl.dot(levels, operand, acc, input_precision="ieee")
            elif BM > TALL:
                acc = tl.dot(scaled(levels, tl.load(scales + at), DTYPE), operand, acc, input_precision="ieee")
            else:
                following = tl.minimum(run + 1, stop * RUNS - 1) // (GROUP // RUN) * padded_N + n
                next_scale = tl.load(scales + following)  # a run ahead: too small to be loaded with the words
                acc += scale.to(tl.float32)[:, None] * tl.dot(levels, operand, input_precision="ieee")
                scale = next_scale
    if GROUP == 0:
        acc *= scale.to(tl.float32)[:, None]
    inside = present[None, :] & (n < N)[:, None]
    target = row.to(tl.int64)[None, :] * N + n[:, None]
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * M * N + target, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + target, acc.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["total"])
@no_type_check
def _sum_parts(parts, bias, out, total, N, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < total
    acc = tl.zeros((SIZE,), tl.float32)
    source = parts + at
    for _ in tl.static_range(PARTS):
        acc += tl.load(source, mask=inside, other=0.0)
        source += total
    if HAS_BIAS:
        acc += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "last"])
@no_type_check
def _expand(
    low,
    high,
    scales,
    zeros,
    out,
    first,
    last,
    K,
    padded_N,
    B,
    BITS: tl.constexpr,
    SLICES: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FIRST: tl.constexpr,
    CODE: tl.constexpr,
):
    """Q of one block of one tile, for rows first .. last - 1, which `out` begins with."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    b, tile = tl.program_id(0), first // 64 + tl.program_id(1)
    n, i = tile * 64 + tl.arange(0, 64), tl.arange(0, 32)
    word = (tile.to(tl.int64) * B + b) * 2048 + tl.arange(0, 64)[:, None] * 32 + i[None, :]
    words = tl.load(low + word)
    highs = tl.load(high + word) if BITS == 3 else words
    minus = minus_zero(tl.full((64,), 2 ** (BITS - 1), tl.float32), FIRST, DTYPE)
    row = (n - first).to(tl.int64)[:, None] * K
    for r in tl.static_range(SLICES // RUN):
        g = 0 if GROUP == 0 else (b * SLICES + r * RUN) // GROUP
        if not SYMMETRIC:
            minus = minus_zero(tl.load(zeros + g * padded_N + n), FIRST, DTYPE)
        scale = tl.load(scales + g * padded_N + n).to(tl.float32)[:, None]
        for j in tl.static_range(RUN):
            k = b * SLICES * 32 + (r * RUN + j) * 32 + i
            levels = decode(words, highs, minus[:, None], r * RUN + j, BITS, DTYPE, CODE)
            inside = (n < last)[:, None] & (k < K)[None, :]
            tl.store(out + row + k[None, :], (levels.to(tl.float32) * scale).to(DTYPE), mask=inside)


def constants(K: int, G: int, bits: int, symmetric: bool, dtype: torch.dtype, code: str) -> dict[str, Any]:
    """The compile-time arguments that the kernels share; `code` is the decoding PTX, or "" for casts."""
    S, group = slices(bits), 0 if G == 1 else K // G // SLICE
    return {
        "BITS": bits,
        "SLICES": S,
        "RUN": math.gcd(S, group, 4),  # slices of a block that are certain to share a group and are multiplied at once
        "GROUP": group,
        "SYMMETRIC": symmetric,
        "FIRST": constant(bits, dtype, code),
        "CODE": code,
    }


def multiply(
    x: Float[Tensor, "M K"],
    tensors: Tensors,
    bias: Float[Tensor, "N"] | None,
    N: int,
    G: int,
    bits: int,
    launch: Launch,
) -> Float[Tensor, "M N"]:
    """`x Q^T + bias` for contiguous x of float16, bfloat16 or float32; sums in float32, rounded once."""
    return _launched(x, tensors, bias, N, G, bits, launch, len(x), -(-len(x) // launch.BM), None)


def multiply_experts(
    x: Float[Tensor, "M K"], tensors: Tensors, experts: Int[Tensor, "R"], N: int, G: int, bits: int, launch: Launch
) -> Float[Tensor, "R N"]:
    """Row r of the result is row r // (R / M) of x times the weight of expert `experts[r]`, all in one launch.

    `tensors` are the planar ones of every expert, stacked.
    """
    order, routes = route(experts, len(tensors["low"]), launch.BM)
    return _launched(x, tensors, None, N, G, bits, launch, len(experts), len(routes), (order, routes))


def _launched(
    x: Tensor,
    tensors: Tensors,
    bias: Tensor | None,
    N: int,
    G: int,
    bits: int,
    launch: Launch,
    rows: int,
    tiles: int,
    routing: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The product's launch and, where K was cut, the one that adds up the parts."""
    K = x.shape[1]
    B, low, scales = blocks(K, bits), tensors["low"], tensors["scales"]
    high, zeros = tensors.get("high", low), tensors.get("zeros")
    per_part = -(-B // launch.parts)
    parts = -(-B // per_part)
    out = torch.empty(rows, N, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts, rows, N, dtype=torch.float32, device=x.device) if parts > 1 else out
    order, routes = (out, out) if routing is None else routing
    _multiply[(tiles, -(-N // launch.BN), parts)](
        x,
        low,
        high,
        scales,
        scales if zeros is None else zeros,
        out if bias is None else bias,
        sums,
        order,
        routes,
        rows,
        N,
        K,
        scales.shape[-1],
        B,
        per_part,
        rows // len(x),
        **constants(K, G, bits, zeros is None, x.dtype, code_for(bits, x.dtype, x.device)),
        EXPERTS=routing is not None,
        HAS_BIAS=bias is not None,
        WHOLE=K % (SLICE * slices(bits)) == 0,
        PARTIAL=parts > 1,
        BN=launch.BN,
        BM=launch.BM,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )
    if parts > 1:
        compiled_for = {"HAS_BIAS": bias is not None, "PARTS": parts, "SIZE": SUMMED, "enable_fp_fusion": True}
        _sum_parts[(-(-rows * N // SUMMED),)](sums, out if bias is None else bias, out, rows * N, N, **compiled_for)
    return out


def expand(tensors: Tensors, first: int, last: int, K: int, G: int, bits: int, dtype: torch.dtype) -> Float[Tensor, "rows K"]:
    """Q of rows first .. last - 1, rounded to float16, bfloat16 or float32; `first` is a multiple of TILE."""
    low, scales, zeros = tensors["low"], tensors["scales"], tensors.get("zeros")
    if first % TILE or dtype not in DTYPES:
        raise ValueError(f"rows from {first} on in {dtype}: start at a multiple of {TILE}, in a dtype of {list(DTYPES)}")
    B = blocks(K, bits)
    out = torch.empty(last - first, K, dtype=dtype, device=low.device)
    _expand[(B, -(-(last - first) // TILE))](
        low,
        tensors.get("high", low),
        scales,
        scales if zeros is None else zeros,
        out,
        first,
        last,
        K,
        scales.shape[1],
        B,
        **constants(K, G, bits, zeros is None, dtype, code_for(bits, dtype, low.device)),
        num_warps=EXPANDED_WARPS,
        enable_fp_fusion=True,
    )
    return out


def multiply_expanded(
    x: Float[Tensor, "M K"],
    tensors: Tensors,
    bias: Float[Tensor, "N"] | None,
    N: int,
    G: int,
    bits: int,
    rows: int,
) -> Float[Tensor, "M N"]:
    """`x Q^T + bias` by dense products with `rows` rows of Q at a time, which are dequantized into scratch memory."""
    M, K = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    dtype = x.dtype if x.dtype in DTYPES else torch.float32
    for first in range(0, N, rows):
        last = min(first + rows, N)
        Q = expand(tensors, first, last, K, G, bits, dtype).to(x.dtype)
        torch.mm(x, Q.t(), out=out[:, first:last])
    return out if bias is None else out.add_(bias)
