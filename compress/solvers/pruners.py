"""Layer-wise pruning: a mask by magnitude, Wanda, ALPS or exact OBS, the best weights on it, and their grid if there is one."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.qtensor import Pruned, QTensor, Solved, dense
from compress.solvers import alps, columns, gptq, masks, obs, rtn
from compress.solvers.columns import Columns
from compress.solvers.descent import descend
from compress.solvers.grid import Storage
from compress.solvers.options import Options
from compress.solvers.refit import refit
from compress.spec import LayerSpec, Sparsity


def magnitude(
    W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options
) -> Solved:
    """Zero the smallest weights. Needs no calibration; with it, the others can still be refitted."""
    W = W.float()
    return finish(W, masks.by_cost(W.square(), _sparsity(spec)), stats, spec, stored, options)


def wanda(W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options) -> Solved:
    """Zero the smallest |w| ||x||, every row on its own (arXiv 2306.11695)."""
    W, H = W.float(), _hessian(stats)
    return finish(W, masks.by_cost(W.square() * H.diagonal(), _sparsity(spec), per_row=True), stats, spec, stored, options)


def alternating(
    W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options
) -> Solved:
    """The mask that ALPS finds (arXiv 2406.07831)."""
    W, H = W.float(), _damped(_hessian(stats), options)
    return finish(W, alps.mask(W, H, _sparsity(spec)), stats, spec, stored, options)


def exact(W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options) -> Solved:
    """The mask of exact OBS, weight by weight (arXiv 2208.11580); K^3 a row, for small layers and as a yardstick."""
    W, H = W.float(), _damped(_hessian(stats), options)
    return finish(W, obs.mask(W, H, _sparsity(spec)), stats, spec, stored, options)


def sparsegpt(
    W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options
) -> Solved:
    """SparseGPT (arXiv 2301.00774): zeros chosen and made up for column by column, together with rounding to a grid.

    Without a grid the weights are then refitted on the zeros it chose, if `options.refit` says so.
    """
    W, H = W.float(), _hessian(stats)
    factor = gptq.factorise(H, torch.arange(len(H), device=H.device), options.damping)
    if isinstance(factor, str):
        return _note(magnitude(W, None, spec, stored, options), f"pruned by magnitude: {factor}")
    loop = Columns(W, factor, spec, Storage.of(spec.scheme, W, stored), replace(options, order="natural"))
    solved = columns.run([loop])[0]
    if isinstance(solved, QTensor):
        return descend([gptq.descent_of(solved, W, H, factor, dense(solved) != 0)], options.sweeps)[0]
    if not options.refit:
        return solved
    return _note(finish(W, solved.weight == 0, stats, spec, stored, options, dense(solved)), *factor.notes)


def finish(
    W: Float[Tensor, "N K"],
    pruned: Bool[Tensor, "N K"],
    stats: LayerStats | None,
    spec: LayerSpec,
    stored: torch.dtype,
    options: Options,
    start: Float[Tensor, "N K"] | None = None,
) -> Solved:
    """The layer with the zeros of a mask: refitted if `options.refit` says so, and on the grid if there is one.

    The refitted V has H (W - V) = 0 on its support, so for every Q with the same zeros
    `tr((W-Q) H (W-Q)^T) = tr((W-V) H (W-V)^T) + tr((V-Q) H (V-Q)^T)`: rounding V by GPTQ is rounding for W.
    """
    keep = ~pruned
    if stats is None:
        V = W * keep
        return Pruned(V.to(stored)) if spec.scheme is None else rtn.solve(V, None, spec.scheme, stored, options)
    V = refit(W, _damped(stats.H, options), keep, start) if options.refit else W * keep
    if spec.scheme is None:
        solved: Solved = Pruned(V.to(stored))
    else:
        solved = _rounded(V, keep, stats, spec, stored, options)
    return replace(solved, error=rtn.output_error(W - dense(solved), stats.H))


def _rounded(V: Tensor, keep: Tensor, stats: LayerStats, spec: LayerSpec, stored: torch.dtype, options: Options) -> Solved:
    assert spec.scheme is not None
    perm = gptq.visiting_order(stats.H.diagonal(), spec.scheme.group(len(stats.H)), options.order)
    factor = gptq.factorise(stats.H, perm, options.damping)
    if isinstance(factor, str):
        return _note(rtn.solve(V, None, spec.scheme, stored, options), f"rounded to nearest: {factor}")
    solved = columns.run([Columns(V, factor, spec, Storage.of(spec.scheme, V, stored), options, keep)])[0]
    assert isinstance(solved, QTensor)
    return descend([gptq.descent_of(solved, V, stats.H, factor, keep)], options.sweeps)[0]


def _sparsity(spec: LayerSpec) -> Sparsity:
    assert spec.sparsity is not None
    return spec.sparsity


def _hessian(stats: LayerStats | None) -> Float[Tensor, "K K"]:
    if stats is None:
        raise ValueError("this method needs the layer's Hessian")
    return stats.H


def _damped(H: Float[Tensor, "K K"], options: Options) -> Float[Tensor, "K K"]:
    damped = H.clone()
    mean = H.diagonal().mean()
    damped.diagonal().add_(options.damping * torch.where(mean > 0, mean, 1))
    return damped


def _note(solved: Solved, *notes: str) -> Solved:
    return replace(solved, notes=solved.notes + notes)
