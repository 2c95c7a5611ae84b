"""GPTQ's column loop over a block of columns as one Triton launch, for many rows and several layers at once.

A program has some rows of one layer, with the targets of all columns of the block in registers: a column is cut out by a masked
sum, rounded, and its error fed to the columns after it. Where scales are fitted on the way, a program does this too when it comes
to a group. Division is IEEE's and products are not fused with sums, so that codes equal a CPU's but for the order of sums. The
host multiplies errors into later blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from compress.kernels.decode import DTYPES

BLOCK = 128  # columns at most
ROWS = 8  # of a program, which is one warp: no sum leaves it, and with 16 registers spill


@dataclass(frozen=True)
class State:
    """L layers of one shape in the middle of their loops, transposed, their columns in visiting order; all float32.

    `E` holds W, and W - Q from where a column was visited; `T` the targets of columns not visited yet, with the errors of all
    earlier blocks in them; `group_of` the row of `scales` and `zeros` of every column; `loss` is `sum_j D_j (t_j - q_j)^2` of the
    columns visited. Where not `keep`, a weight becomes zero. Everything is contiguous and changed in place.
    """

    E: Float[Tensor, "L K N"]
    T: Float[Tensor, "L K N"]
    D: Float[Tensor, "L K"]
    scales: Float[Tensor, "L G N"]
    zeros: Float[Tensor, "L G N"]
    group_of: Int[Tensor, "L K"]
    codes: UInt8[Tensor, "L K N"]
    loss: Float[Tensor, "L N"]
    keep: Bool[Tensor, "L K N"] | None = None


@dataclass(frozen=True)
class Fit:
    """What scales are chosen from: the group's range times each of `factors`, in `dtype`, not below the least normal number.

    The range is what reaches farthest from zero, negated, on a symmetric grid, and otherwise from the least to the largest
    weight, zero among them; `shrinks` is then how much of it each candidate covers. `group` columns follow each other.
    """

    symmetric: bool
    group: int
    factors: Float[Tensor, "C"]
    shrinks: Float[Tensor, "C"]
    dtype: torch.dtype


@triton.jit
@no_type_check
def _cut(tile, k, j):
    """Row j of a tile."""
    return tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)


@triton.jit
@no_type_check
def nearest(steps, lowest, highest):
    """The nearest whole numbers within bounds that are whole numbers, too; halves go to even."""
    return (tl.minimum(tl.maximum(steps, lowest), highest) + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no fraction


@triton.jit
@no_type_check
def stored(scale, TINY: tl.constexpr, DTYPE: tl.constexpr):
    """A scale as it is stored, never zero."""
    scale = tl.where(tl.abs(scale) < TINY, TINY, scale)
    if tl.bfloat16 == DTYPE:  # by its bits, as the interpreter's cast does not round to nearest
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return scale.to(DTYPE).to(tl.float32)


@triton.jit
@no_type_check
def _fitted(
    v,
    weights,
    factors,
    shrinks,
    levels,
    CANDIDATES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The scale and zero point with the least `sum weights * (v - q)^2`, the first of equals."""
    low, high = tl.minimum(tl.min(v, axis=0), 0.0), tl.maximum(tl.max(v, axis=0), 0.0)
    one = tl.full(low.shape, 1.0, tl.float32)
    middle = one * ((levels + 1.0) / 2)
    scale, zero, least = one, middle, one
    for c in range(CANDIDATES):
        factor = tl.load(factors + c)
        if SYMMETRIC:
            candidate = -tl.where(high > -low, high, low) * factor
        else:
            candidate = (high - low) * factor
            middle = nearest(tl.div_rn(-low * tl.load(shrinks + c), tl.where(candidate == 0.0, 1.0, candidate)), 0.0, levels)
        candidate = stored(candidate, TINY, DTYPE)
        steps = v * tl.div_rn(one, candidate)[None, :]
        off = nearest(steps, -middle[None, :], levels - middle[None, :]) - steps
        error = tl.sum(off * off * weights[:, None], axis=0) * (candidate * candidate)
        better = (error < least) | (c == 0)
        scale, zero = tl.where(better, candidate, scale), tl.where(better, middle, zero)
        least = tl.where(better, error, least)
    return scale, zero


@triton.jit
@no_type_check
def _round_columns(
    E,
    T,
    Ut,
    D,
    scales,
    zeros,
    group_of,
    keep,
    codes,
    loss,
    factors,
    shrinks,
    K,
    N,
    G,
    start,
    C,
    group,
    levels,
    FIT: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns start .. start + C - 1; `levels` is the largest code. With FIT the block is made of whole groups."""
    layer = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    k = tl.arange(0, COLUMNS)
    first = (layer * K + start) * N
    Ut += layer * C * C
    tile = first + k[:, None] * N + n[None, :]
    within = (k < C)[:, None] & inside[None, :]
    targets = tl.load(T + tile, mask=within, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for from_ in range(0, C, group):
        if FIT:
            # What the weights of the group become while nothing is rounded: the recurrence below without rounding.
            v = targets
            for j in range(from_, from_ + group):
                later = tl.load(Ut + j * C + k, mask=(k > j) & (k < from_ + group), other=0.0)
                e = tl.load(E + first + j * N + n, mask=inside, other=0.0) - _cut(v, k, j)
                v += later[:, None] * e[None, :]
            among = (k >= from_) & (k < from_ + group)
            v = tl.where(among[:, None], v, 0.0)
            if HAS_KEEP:
                v = tl.where(tl.load(keep + tile, mask=within, other=0) != 0, v, 0.0)
            weights = tl.load(D + layer * K + start + k, mask=among, other=0.0)
            scale, zero = _fitted(v, weights, factors, shrinks, levels, CANDIDATES, SYMMETRIC, TINY, DTYPE)
            g = (layer * G + tl.load(group_of + layer * K + start + from_)) * N + n
            tl.store(scales + g, scale, mask=inside)
            tl.store(zeros + g, zero, mask=inside)
        w = tl.load(E + first + from_ * N + n, mask=inside, other=0.0)
        later = tl.load(Ut + from_ * C + k, mask=(k > from_) & (k < C), other=0.0)
        for j in range(from_, tl.minimum(from_ + group, C)):
            at, following = first + j * N + n, j + 1  # what comes next is loaded ahead: nothing else hides how long it takes
            next_w = tl.load(E + at + N, mask=inside & (following < C), other=0.0)
            next_later = tl.load(Ut + following * C + k, mask=(k > following) & (k < C) & (following < C), other=0.0)
            if not FIT:
                g = (layer * G + tl.load(group_of + layer * K + start + j)) * N + n
                scale, zero = tl.load(scales + g, mask=inside, other=1.0), tl.load(zeros + g, mask=inside, other=0.0)
            target = _cut(targets, k, j)
            level = nearest(tl.div_rn(target, scale), -zero, levels - zero)
            if HAS_KEEP:
                level = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, level, 0.0)
            q = level * scale
            error = w - q
            off = target - q
            total += off * off * tl.load(D + layer * K + start + j)
            targets += later[:, None] * error[None, :]
            tl.store(codes + at, (level + zero).to(tl.uint8), mask=inside)
            tl.store(E + at, error, mask=inside)
            w, later = next_w, next_later
    at = loss + layer * N + n
    tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


def round_columns_(state: State, Ut: Float[Tensor, "L K K"], start: int, stop: int, levels: int, fit: Fit | None = None) -> None:
    """Round columns start..stop of a `State`, with scales that stand there, or fitted on the way to groups in this block.

    What errors add to targets of later columns is `Ut`. Raises ValueError for more than `BLOCK` columns.
    """
    layers, K, N = state.E.shape
    C = stop - start
    if C > BLOCK:
        raise ValueError(f"a block of {C} columns; at most {BLOCK} fit a program's registers")
    none = state.scales
    with torch.cuda.device_of(state.E):  # Triton launches on the current device
        _round_columns[(-(-N // ROWS), layers)](
            state.E,
            state.T,
            Ut[:, start:stop, start:stop].contiguous(),
            state.D,
            state.scales,
            state.zeros,
            state.group_of,
            state.codes if state.keep is None else state.keep.view(torch.uint8),
            state.codes,
            state.loss,
            fit.factors if fit else none,
            fit.shrinks if fit else none,
            K,
            N,
            state.scales.shape[1],
            start,
            C,
            fit.group if fit else BLOCK,
            float(levels - 1),
            FIT=fit is not None,
            CANDIDATES=len(fit.factors) if fit else 0,
            SYMMETRIC=fit is not None and fit.symmetric,
            TINY=torch.finfo(fit.dtype).tiny if fit else 0.0,
            DTYPE=DTYPES[fit.dtype] if fit else tl.float32,
            HAS_KEEP=state.keep is not None,
            COLUMNS=max(16, triton.next_power_of_2(C)),
            ROWS=ROWS,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=False,
        )
