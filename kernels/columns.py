"""GPTQ's column loop over a block of columns as one Triton launch, for many rows and several layers at once.

A program has some rows of one layer, with the targets of all columns of the block in registers: a column is cut out by a masked
sum, rounded, and its error fed to the columns after it. Division is IEEE's and products are not fused with sums, so that codes
equal a CPU's but for the order of sums. The host multiplies errors into later blocks.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

BLOCK = 128  # columns at most
ROWS = 16  # of a program, which is one warp: no sum leaves it


@triton.jit
@no_type_check
def _round_columns(
    W,
    T,
    Ut,
    D,
    scales,
    zeros,
    group_of,
    keep,
    codes,
    E,
    loss,
    C,
    N,
    G,
    top,
    HAS_KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    k = tl.arange(0, COLUMNS)
    first = layer * C * N
    targets = tl.load(T + first + k[:, None] * N + n[None, :], mask=(k < C)[:, None] & inside[None, :], other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for j in range(C):
        at = first + j * N + n
        g = (layer * G + tl.load(group_of + layer * C + j)) * N + n
        scale, zero = tl.load(scales + g, mask=inside, other=1.0), tl.load(zeros + g, mask=inside, other=0.0)
        w = tl.load(W + at, mask=inside, other=0.0)
        later = tl.load(Ut + (layer * C + j) * C + k, mask=(k > j) & (k < C), other=0.0)
        target = tl.sum(tl.where((k == j)[:, None], targets, 0.0), axis=0)
        steps = tl.minimum(tl.maximum(tl.div_rn(target, scale), -4096.0), 4096.0)
        code = (steps + 12582912.0) - 12582912.0 + zero  # 1.5 * 2^23 leaves no bits for a fraction: halves go to even
        code = tl.minimum(tl.maximum(code, 0.0), top)
        if HAS_KEEP:
            code = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, code, zero)
        q = (code - zero) * scale
        error = w - q
        off = target - q
        total += off * off * tl.load(D + layer * C + j)
        targets += later[:, None] * error[None, :]
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
        tl.store(E + at, error, mask=inside)
    tl.store(loss + layer * N + n, total, mask=inside)


def round_columns(
    W: Float[Tensor, "L C N"],
    T: Float[Tensor, "L C N"],
    Ut: Float[Tensor, "L C C"],
    D: Float[Tensor, "L C"],
    scales: Float[Tensor, "L G N"],
    zeros: Float[Tensor, "L G N"],
    group_of: Int[Tensor, "L C"],
    levels: int,
    keep: Bool[Tensor, "L C N"] | None = None,
) -> tuple[UInt8[Tensor, "L C N"], Float[Tensor, "L C N"], Float[Tensor, "L N"]]:
    """Codes, errors W - Q, and `sum_j D_j (t_j - q_j)^2` of a block of C columns of L layers, all transposed and in float32.

    `T` are the targets with the errors of all earlier blocks in them, `group_of` the row of `scales` and `zeros` of every
    column; where not `keep`, a weight becomes zero. Raises ValueError for more than `BLOCK` columns.
    """
    layers, C, N = W.shape
    if C > BLOCK:
        raise ValueError(f"a block of {C} columns; at most {BLOCK} fit a program's registers")
    codes = torch.empty(layers, C, N, dtype=torch.uint8, device=W.device)
    E, loss = torch.empty(layers, C, N, device=W.device), torch.empty(layers, N, device=W.device)
    with torch.cuda.device_of(W):  # Triton launches on the current device
        _round_columns[(-(-N // ROWS), layers)](
            W.contiguous(),
            T.contiguous(),
            Ut.contiguous(),
            D.contiguous(),
            scales.contiguous(),
            zeros.contiguous(),
            group_of.to(torch.int32).contiguous(),
            codes if keep is None else keep.to(torch.uint8).contiguous(),
            codes,
            E,
            loss,
            C,
            N,
            scales.shape[1],
            float(levels - 1),
            HAS_KEEP=keep is not None,
            COLUMNS=max(16, triton.next_power_of_2(C)),
            ROWS=ROWS,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return codes, E, loss
