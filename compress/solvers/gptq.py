"""GPTQ (arXiv 2210.17323) in its LDL form: each column is rounded after the errors of earlier columns are fed forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import ldl, matmul_nt
from compress.qtensor import QTensor, round_to_grid
from compress.solvers import grid, rtn
from compress.solvers.options import Options, Order
from compress.spec import Scheme

LEAF = 16  # columns in rank-1 updates; everything larger is a matrix product
HIGHEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factor:
    """H + damping = Ut diag(D) Ut^T, its rows and columns in the order `perm`."""

    Ut: Float[Tensor, "K K"]
    D: Float[Tensor, "K"]
    perm: Int64[Tensor, "K"]
    added: float
    notes: tuple[str, ...]


def solve(
    W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
) -> QTensor:
    """Codes that minimise tr((W-Q) H (W-Q)^T) greedily, column by column.

    With H = Ut D Ut^T the objective is `sum_j D_j (t_j - q_j)^2` with targets `t_j = w_j + sum_{i<j} (w_i - q_i) Ut_ij`;
    GPTQ's inverse-Cholesky recursion gives the same codes (its U_jj = D_j^-1/2) with three factorisations for one.
    Inputs that calibration never saw active have no coupling, and are rounded to nearest.
    """
    if stats is None:
        raise ValueError("GPTQ needs the layer's Hessian")
    factor = factorise(stats.H, scheme, options)
    if factor is None:
        reason = "the Hessian cannot be factorised" if stats.H.any() else "its inputs are all zero on the calibration data"
        return replace(rtn.solve(W, stats, scheme, scale_dtype, options), notes=(f"rounded to nearest: {reason}",))
    return _Columns(W.float(), factor, scheme, scale_dtype, options).run()


def factorise(H: Float[Tensor, "K K"], scheme: Scheme, options: Options) -> Factor | None:
    """Factorise the damped Hessian: damping doubles until it succeeds, then once more in float64; None when all fails."""
    mean = H.diagonal().mean().item()
    if not mean > 0:
        return None
    perm = visiting_order(H.diagonal(), scheme.group(len(H)), options.order)
    ordered = H[perm][:, perm]
    damping = options.damping
    while damping <= HIGHEST_DAMPING:
        if (found := _factor(ordered, damping * mean)) is not None:
            notes = () if damping == options.damping else (f"damping raised to {damping:g}",)
            return Factor(*found, perm, damping * mean, notes)
        damping *= 2
    if (found := _factor(ordered.double(), options.damping * mean)) is not None:
        return Factor(found[0].float(), found[1].float(), perm, options.damping * mean, ("factorised in float64",))
    return None


def _factor(H: Tensor, added: float) -> tuple[Tensor, Tensor] | None:
    damped = H.clone()
    damped.diagonal().add_(added)
    return ldl(damped)


def visiting_order(diagonal: Float[Tensor, "K"], group: int, order: Order) -> Int64[Tensor, "K"]:
    """The permutation that `Options.order` names."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return diagonal.argsort(descending=True, stable=True)
    inside = diagonal.view(-1, group).argsort(dim=1, descending=True, stable=True)
    groups = diagonal.view(-1, group).amax(1).argsort(descending=True, stable=True)
    return (inside + group * torch.arange(len(inside), device=diagonal.device)[:, None])[groups].flatten()


class _Columns:
    """The solve itself. Everything is transposed, so that a column of W is one contiguous row of memory."""

    def __init__(self, W: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype, options: Options) -> None:
        N, K = W.shape
        self.factor, self.scheme, self.scale_dtype, self.options = factor, scheme, scale_dtype, options
        self.group = scheme.group(K)
        self.W = W.t()[factor.perm]  # [K, N] in visiting order
        self.T = self.W.clone()  # targets: W plus the errors fed forward so far
        self.E = torch.empty_like(self.W)  # W - Q
        self.codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
        self.loss = torch.zeros(N, device=W.device)
        self.feed = factor.Ut.t().contiguous()  # [j, i]: what column i's error adds to column j's target
        self.group_of = (factor.perm // self.group).tolist()
        self.fits_late = options.order != "act"
        weights = torch.empty_like(factor.D).scatter_(0, factor.perm, factor.D)  # back in stored order
        if self.fits_late:
            self.scales = torch.empty(scheme.groups(K), N, device=W.device)
            self.zeros = torch.empty_like(self.scales)
        else:
            fitted = grid.fit(W.view(N, -1, self.group), weights.view(-1, self.group), scheme, scale_dtype, options.candidates)
            self.scales, self.zeros = fitted.scales.t().contiguous(), fitted.zeros.t().contiguous()

    def run(self) -> QTensor:
        K = len(self.W)
        self._solve(0, K)
        codes = torch.empty_like(self.codes)
        codes[self.factor.perm] = self.codes
        return QTensor(
            codes.t().contiguous(),
            self.scales.t().contiguous().to(self.scale_dtype),
            self.zeros.t().contiguous().byte(),
            self.scheme,
            error=self.loss - self.factor.added * self.E.square().sum(0),
            notes=self.factor.notes,
        )

    def _solve(self, start: int, stop: int) -> None:
        """Solve columns start..stop, whose targets already hold the errors of all columns before `start`.

        Halving makes every update but the innermost a matrix product, at every level of the memory hierarchy.
        """
        if stop - start <= LEAF:
            self._leaf(start, stop)
            return
        middle = start + self._half(stop - start)
        self._solve(start, middle)
        self.T[middle:stop] += matmul_nt(self.feed[middle:stop, start:middle], self.E[start:middle].t())
        self._solve(middle, stop)

    def _half(self, length: int) -> int:
        """Half of the columns, on a group boundary where there is one, so that a group's targets are ready when it begins."""
        unit = self.group if length > self.group else LEAF
        return max(unit, length // 2 // unit * unit)

    def _leaf(self, start: int, stop: int) -> None:
        for j in range(start, stop):
            if self.fits_late and j % self.group == 0:
                self._fit_group(j)
            target, g = self.T[j], self.group_of[j]
            scale, zero = self.scales[g], self.zeros[g]
            codes = round_to_grid(target, scale, zero, self.scheme.levels)
            self.codes[j] = codes
            q = codes.sub_(zero).mul_(scale)
            torch.sub(self.W[j], q, out=self.E[j])
            self.loss += (target - q).square_().mul_(self.factor.D[j])
            if j + 1 < stop:
                self.T[j + 1 : stop].addr_(self.feed[j + 1 : stop, j], self.E[j])

    def _fit_group(self, j: int) -> None:
        """Fit the group that begins at column j to its targets so far."""
        g, columns = self.group_of[j], slice(j, j + self.group)
        weights = self.factor.D[columns][None]
        fitted = grid.fit(
            self.T[columns].t().contiguous()[:, None], weights, self.scheme, self.scale_dtype, self.options.candidates
        )
        self.scales[g], self.zeros[g] = fitted.scales[:, 0], fitted.zeros[:, 0]
