"""Coordinate descent over a block of columns as one Triton launch, for many rows and several layers at once.

As in `columns`, a program has some rows of one layer, here with half the gradient of all columns of the block in registers, which
every step of a scale or a code moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from compress.kernels.columns import BLOCK, ROWS, _cut, nearest, stored
from compress.kernels.decode import DTYPES


@dataclass(frozen=True)
class State:
    """L layers of one shape, transposed, their columns and groups in visiting order; all float32, contiguous, changed in place.

    L are levels, Q in units of the scale, G half the gradient, H (Q - W), and S what the last visit of a column added to Q;
    `objective` keeps count of that. `recips` are -1 / H_jj. Where not `keep`, a level stays zero.
    """

    L: Float[Tensor, "L K N"]
    G: Float[Tensor, "L K N"]
    S: Float[Tensor, "L K N"]
    scales: Float[Tensor, "L G N"]
    zeros: Float[Tensor, "L G N"]
    diagonal: Float[Tensor, "L K"]
    recips: Float[Tensor, "L K"]
    objective: Float[Tensor, "L N"]
    keep: Bool[Tensor, "L K N"] | None = None


@triton.jit
@no_type_check
def _descend(
    L,
    G,
    S,
    scales,
    zeros,
    H,
    diagonal,
    recips,
    objective,
    keep,
    K,
    N,
    groups,
    start,
    C,
    group,
    top,
    SCALES: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns start .. start + C - 1: of whole groups, or with their scales where they are if not SCALES."""
    layer = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    k = tl.arange(0, COLUMNS)
    present = k < C
    first = (layer * K + start) * N
    H += layer * C * C
    tile = first + k[:, None] * N + n[None, :]
    within = present[:, None] & inside[None, :]
    gradient = tl.load(G + tile, mask=within, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for from_ in range(0, C, group):
        stop = tl.minimum(from_ + group, C)
        g = (layer * groups + (start + from_) // group) * N + n
        before, zero = tl.load(scales + g, mask=inside, other=1.0), tl.load(zeros + g, mask=inside, other=0.0)
        scale = before
        if SCALES:
            pull = tl.zeros((COLUMNS, ROWS), tl.float32)
            for j in range(from_, stop):
                row = tl.load(H + j * C + k, mask=present, other=0.0)
                pull += row[:, None] * tl.load(L + first + j * N + n, mask=inside, other=0.0)[None, :]
            among = (k >= from_) & (k < stop)
            levels = tl.load(L + tile, mask=among[:, None] & inside[None, :], other=0.0)
            curvature, slope = tl.sum(pull * levels, axis=0), tl.sum(levels * gradient, axis=0)
            best = stored(before - tl.div_rn(slope, tl.where(curvature > 0, curvature, 1.0)), TINY, DTYPE)
            step = tl.where((curvature > 0) & (tl.abs(best) < float("inf")), best - before, 0.0)
            scale = before + step
            total += step * (2 * slope + curvature * step)
            gradient += pull * step[None, :]
            tl.store(scales + g, scale, mask=inside)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
        level = tl.load(L + first + from_ * N + n, mask=inside, other=0.0)
        row = tl.load(H + from_ * C + k, mask=present, other=0.0)
        for j in range(from_, stop):
            at, following = first + j * N + n, j + 1  # what comes next is loaded ahead, as in the column loop
            next_level = tl.load(L + at + N, mask=inside & (following < C), other=0.0)
            next_row = tl.load(H + following * C + k, mask=present & (following < C), other=0.0)
            half = _cut(gradient, k, j)
            target = level + tl.load(recips + layer * K + start + j) * half * inverse
            new = nearest(target, -zero, top - zero)
            if HAS_KEEP:
                new = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, new, 0.0)
            q = new * scale
            step = q - level * scale
            total += step * (2 * half + tl.load(diagonal + layer * K + start + j) * step)
            gradient += row[:, None] * step[None, :]
            tl.store(L + at, new, mask=inside)
            tl.store(S + at, q - level * before, mask=inside)
            level, row = next_level, next_row
    tl.store(G + tile, gradient, mask=within)
    at = objective + layer * N + n
    tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


def descend_(state: State, H: Float[Tensor, "L K K"], start: int, stop: int, group: int, levels: int, dtype: torch.dtype) -> None:
    """Move scales, stored in `dtype`, and codes of columns start..stop one by one to where the error is least.

    These are whole groups, or a part of one, whose scale then stays. The gradient of the block is afterwards that of the new Q.
    Raises ValueError for more than `BLOCK` columns.
    """
    layers, K, N = state.L.shape
    C = stop - start
    if C > BLOCK:
        raise ValueError(f"a block of {C} columns; at most {BLOCK} fit a program's registers")
    with torch.cuda.device_of(state.G):  # Triton launches on the current device
        _descend[(-(-N // ROWS), layers)](
            state.L,
            state.G,
            state.S,
            state.scales,
            state.zeros,
            H[:, start:stop, start:stop].contiguous(),
            state.diagonal,
            state.recips,
            state.objective,
            state.G if state.keep is None else state.keep.view(torch.uint8),
            K,
            N,
            state.scales.shape[1],
            start,
            C,
            group,
            float(levels - 1),
            SCALES=group <= C,
            TINY=torch.finfo(dtype).tiny,
            DTYPE=DTYPES[dtype],
            HAS_KEEP=state.keep is not None,
            COLUMNS=max(16, triton.next_power_of_2(C)),
            ROWS=ROWS,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=False,
        )
