"""GPTQ for layers whose outputs' errors count together: blocks of rows make up for what earlier ones did to the model's loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import ldl_, matmul_nt, permuted
from compress.qtensor import QTensor, dequantize
from compress.solvers import columns, gptq, grid, pruners
from compress.solvers.columns import Columns
from compress.solvers.descent import descend
from compress.solvers.options import Options
from compress.solvers.rtn import output_error
from compress.spec import LayerSpec, Scheme

BLOCKS = 16  # of rows: KL falls by 15 % at 3 bits, by 13 % with 8, 12 % with 4 and 8 % with 2 (reference model)
DAMPING = 0.1  # of the mean diagonal; 0.01 gains less where tokens are few
APART = "its rows were solved apart: the gradients of its outputs cannot be factorised"


def solve(
    W: Float[Tensor, "N K"],
    stats: LayerStats,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: Options,
    keep: Bool[Tensor, "N K"] | None = None,
) -> QTensor:
    """Codes that greedily minimise tr(O E H E^T) for E = W - Q, with O = `stats.outputs` and H damped.

    O (x) H is the Kronecker form of the Hessian of the model's loss (K-FAC, arXiv 1503.05671), which YAQA (arXiv 2505.22988)
    rounds by: it makes every weight's target of all weights before it, in rows and columns, from an estimate of both factors
    by power iteration. Here H is the usual one, and rows go in a few blocks, each an ordinary layer with a target of its own:
    with O = A D A^T in blocks of rows, A unit upper, the objective is `sum_b tr(D_b T_b H T_b^T)` with
    `T_b = E_b + sum_{c<b} A_cb^T E_c`. Inside a block rows count alone. Then `options.sweeps` rounds go over all blocks by
    coordinate descent, a sweep each, with the errors of all others fixed. Weights outside `keep` are zero in the result.
    """
    assert stats.outputs is not None
    group = scheme.group(len(stats.H))
    factor = gptq.factorise(stats.H, gptq.visiting_order(stats.H.diagonal(), group, options.order), options.damping)
    added = DAMPING * stats.outputs.diagonal().mean()
    blocks = dealt(stats.outputs.diagonal())
    rows = torch.cat(blocks)
    moments = permuted(stats.outputs, rows)
    moments.diagonal().add_(added)
    upper = ldl_(moments.clone())
    if isinstance(factor, str) or upper is None:
        apart = _apart(W, stats, scheme, scale_dtype, options, keep)
        return apart if isinstance(factor, str) else replace(apart, notes=(*factor.notes, APART))
    ordered, storage = W.float()[rows], grid.Storage.of(scheme, W, scale_dtype)
    masks = [None if keep is None else keep[block] for block in blocks]
    E = torch.zeros_like(ordered)
    found: list[QTensor] = []
    for cut, mask in zip(cuts(blocks), masks, strict=True):
        target = ordered[cut] + fed_forward(upper[0], E, cut)
        q = columns.run([Columns(target, factor, LayerSpec(scheme), storage, options, mask)])[0]
        assert isinstance(q, QTensor)
        found.append(q)
        E[cut] = ordered[cut] - dequantize(q)
    for _ in range(options.sweeps):
        for b, cut in enumerate(cuts(blocks)):
            target = ordered[cut] + made_up(moments, E, cut)
            found[b] = descend([gptq.descent_of(found[b], target, stats.H, factor, masks[b])], 1)[0]
            E[cut] = ordered[cut] - dequantize(found[b])
    back = rows.argsort()
    codes, scales, zeros = (
        torch.cat(column)[back] for column in zip(*((q.codes, q.scales, q.zeros) for q in found), strict=True)
    )
    error = output_error(E, stats.H)[back]
    return QTensor(codes, scales, zeros, scheme, error=error, notes=factor.notes, global_scale=storage.global_scale)


def _apart(
    W: Float[Tensor, "N K"],
    stats: LayerStats,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: Options,
    keep: Bool[Tensor, "N K"] | None,
) -> QTensor:
    """Solve every row on its own, as effort default does."""
    if keep is None:
        return gptq.solve(W, stats, scheme, scale_dtype, options)
    solved = pruners.finish(W.float(), ~keep, stats, LayerSpec(scheme), scale_dtype, options)
    assert isinstance(solved, QTensor)
    return solved


def dealt(weight: Float[Tensor, "N"]) -> list[Int64[Tensor, "n"]]:
    """The rows in blocks, dealt out by falling weight: alike in what they weigh, and neighbours, which go together, apart."""
    falling = weight.argsort(descending=True, stable=True)
    return [falling[b::BLOCKS] for b in range(min(BLOCKS, len(weight)))]


def cuts(blocks: Sequence[Int64[Tensor, "_"]]) -> list[slice]:
    """Where the blocks are, one below the other."""
    ends = list(itertools.accumulate(len(block) for block in blocks))
    return [slice(end - len(block), end) for block, end in zip(blocks, ends, strict=True)]


def fed_forward(Ut: Float[Tensor, "N N"], E: Float[Tensor, "N K"], cut: slice) -> Float[Tensor, "n K"]:
    """How far the errors of all rows before `cut` move its target, while the rows after it are free to make up for the rest."""
    if cut.start == 0:
        return torch.zeros_like(E[cut])
    pulled = matmul_nt(Ut[: cut.start, cut].t(), E[: cut.start].t())
    moved: Tensor = torch.linalg.solve_triangular(Ut[cut, cut].t(), pulled, upper=False, unitriangular=True)
    return moved


def made_up(O: Float[Tensor, "N N"], E: Float[Tensor, "N K"], cut: slice) -> Float[Tensor, "n K"]:  # noqa: E741
    """How far the errors of all other rows, which stay, move the target of the rows in `cut`."""
    own = O[cut, cut]
    pulled = matmul_nt(O[cut], E.t()) - matmul_nt(own, E[cut].t())
    return torch.cholesky_solve(pulled, torch.linalg.cholesky(own))
