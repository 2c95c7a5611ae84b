"""GPTQ (arXiv 2210.17323) in its LDL form: each column is rounded after the errors of earlier columns are fed forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import ldl_, permuted
from compress.qtensor import QTensor
from compress.solvers import columns, rtn
from compress.solvers.columns import Columns, Factor
from compress.solvers.descent import Start, descend
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
    return solve_alike([W], [stats], scheme, scale_dtype, options)[0]


def solve_alike(
    weights: Sequence[Float[Tensor, "N K"]],
    stats: Sequence[LayerStats],
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: Options,
) -> list[QTensor]:
    """`solve` for layers of one shape, on a GPU all at once."""
    weights = [W.float() for W in weights]
    found: dict[int, QTensor] = {}
    factors: dict[int, Factor] = {}
    for i, known in enumerate(stats):
        perm = visiting_order(known.H.diagonal(), scheme.group(len(known.H)), options.order)
        factor = factorise(known.H, perm, options.damping)
        if isinstance(factor, str):
            plain = rtn.solve(weights[i], known, scheme, scale_dtype, options)
            found[i] = replace(plain, notes=(f"rounded to nearest: {factor}",))
        else:
            factors[i] = factor
    spec = LayerSpec(scheme)
    solved = columns.run(
        [Columns(weights[i], factor, spec, Storage.of(scheme, weights[i], scale_dtype), options) for i, factor in factors.items()]
    )
    starts = [
        descent_of(cast("QTensor", q), weights[i], stats[i].H, factor)
        for (i, factor), q in zip(factors.items(), solved, strict=True)
    ]
    found |= zip(factors, descend(starts, options.sweeps), strict=True)
    return [found[i] for i in range(len(weights))]


def descent_of(
    q: QTensor, W: Float[Tensor, "N K"], H: Float[Tensor, "K K"], factor: Factor, keep: Bool[Tensor, "N K"] | None = None
) -> Start:
    """A descent from `q` with the damping that its solver had."""
    return Start(q, W, H, factor.added, visiting_order(H.diagonal(), q.scheme.group(len(H)), "group"), keep)


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
