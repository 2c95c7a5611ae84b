"""GPTQ (arXiv 2210.17323) in its LDL form: each column is rounded after the errors of earlier columns are fed forward."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import ldl_, permuted
from compress.qtensor import QTensor
from compress.solvers import rtn
from compress.solvers.columns import Columns, Factor
from compress.solvers.descent import descend
from compress.solvers.grid import Storage
from compress.solvers.options import Options, Order
from compress.spec import LayerSpec, Scheme

HIGHEST_DAMPING = 1.0


def solve(
    W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
) -> QTensor:
    """Codes that minimise tr((W-Q) H (W-Q)^T) greedily, column by column.

    The LDL form of `columns`; GPTQ's inverse-Cholesky recursion gives the same codes (its U_jj = D_j^-1/2) with three
    factorisations for one. Inputs that calibration never saw active have no coupling, and are rounded to nearest.
    """
    if stats is None:
        raise ValueError("GPTQ needs the layer's Hessian")
    factor = factorise(stats.H, visiting_order(stats.H.diagonal(), scheme.group(len(stats.H)), options.order), options.damping)
    if isinstance(factor, str):
        return replace(rtn.solve(W, stats, scheme, scale_dtype, options), notes=(f"rounded to nearest: {factor}",))
    solved = Columns(W.float(), factor, LayerSpec(scheme), Storage.of(scheme, W, scale_dtype), options).run()
    assert isinstance(solved, QTensor)
    return refined(solved, W.float(), stats.H, factor, options)


def refined(
    q: QTensor,
    W: Float[Tensor, "N K"],
    H: Float[Tensor, "K K"],
    factor: Factor,
    options: Options,
    keep: Bool[Tensor, "N K"] | None = None,
) -> QTensor:
    """`q` after the coordinate descent that `options.sweeps` asks for, with the damping that its solver had."""
    if options.sweeps == 0:
        return q
    return descend(q, W, H, factor.added, visiting_order(H.diagonal(), q.scheme.group(len(H)), "group"), options.sweeps, keep)


def factorise(H: Float[Tensor, "K K"], perm: Int64[Tensor, "K"], damping: float) -> Factor | str:
    """Factorise the damped Hessian in the order `perm`, or say why that failed.

    Damping, a fraction of the mean diagonal, doubles until it succeeds; then comes one more try in float64.
    """
    mean = H.diagonal().mean().item()
    if not mean > 0:
        return "its inputs are all zero on the calibration data"
    asked = damping
    while damping <= HIGHEST_DAMPING:
        if (found := ldl_(permuted(H, perm), damping * mean)) is not None:
            notes = () if damping == asked else (f"damping raised to {damping:g}",)
            return Factor(*found, perm, damping * mean, notes)
        damping *= 2
    if (found := ldl_(permuted(H, perm).double(), asked * mean)) is not None:
        return Factor(found[0].float(), found[1].float(), perm, asked * mean, ("factorised in float64",))
    return "the Hessian cannot be factorised"


def visiting_order(diagonal: Float[Tensor, "K"], group: int, order: Order) -> Int64[Tensor, "K"]:
    """The permutation that `Options.order` names."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return diagonal.argsort(descending=True, stable=True)
    inside = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (inside + group * torch.arange(len(inside), device=diagonal.device)[:, None])[groups].flatten()
