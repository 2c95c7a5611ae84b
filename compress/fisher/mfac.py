"""Matrix-free products with the inverse empirical Fisher (M-FAC, arXiv 2107.03356), for blocks larger than m, or a whole matrix.

F = damping * I + G^T G / m for m gradients G, never formed. M-FAC's recursion over the gradients is the Woodbury identity,
used here as such: with A = m * damping * I + G G^T, which is m x m and factorised in float64,
`F^-1 = (I - G^T A^-1 G) / damping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from compress.fisher.factor import factorise

PANEL_BYTES = 1 << 27  # of one working copy of some columns of G


@dataclass(frozen=True)
class InverseFisher:
    """F^-1 of the weights whose gradients are G; `L` is the lower Cholesky factor of A."""

    G: Float[Tensor, "m d"]
    L: Float64[Tensor, "m m"]
    damping: float

    @staticmethod
    def of(G: Float[Tensor, "m d"], damping: float, device: torch.device) -> InverseFisher:
        return InverseFisher(G, _factor(gram(G, device), damping), damping)

    def product(self, x: Float[Tensor, "d"]) -> Float64[Tensor, "d"]:
        """F^-1 x."""
        small = torch.cholesky_solve(times(self.G, x.double())[:, None], self.L)[:, 0]
        return (x.double() - times_transposed(self.G, small)) / self.damping

    def blocks(self, unit: int) -> Float64[Tensor, "U C C"]:
        """The diagonal blocks of F^-1 for units of C = `unit` consecutive weights; C = 1 is the diagonal."""
        found = []
        for columns in panels(self.G, self.L.device, unit):
            Z = torch.linalg.solve_triangular(self.L, columns, upper=False)  # G^T A^-1 G = Z^T Z
            Z = Z.view(len(Z), -1, unit).transpose(0, 1)
            found.append((torch.eye(unit, dtype=Z.dtype, device=Z.device) - Z.mT @ Z) / self.damping)
        return torch.cat(found)


def inverse_blocks(
    G: Float[Tensor, "m d"], damping: float, block: int, unit: int, device: torch.device
) -> Float64[Tensor, "U C C"]:
    """The units' diagonal blocks of F^-1, F in blocks of `block` consecutive weights."""
    return torch.cat([InverseFisher.of(part, damping, device).blocks(unit) for part in G.split(block, 1)])


def update(
    w: Float[Tensor, "d"], G: Float[Tensor, "m d"], pruned: Bool[Tensor, "d"], damping: float, block: int
) -> Float[Tensor, "d"]:
    """The weights with zeros where `pruned`, and the others moved to the minimum of the quadratic model for these zeros.

    For the kept weights K and the zeros Q of a block, `delta_K = F_KK^-1 F_KQ w_Q`, and by Woodbury
    `delta_K = G_K^T (m * damping * I + G_K G_K^T)^-1 G_Q w_Q`: exact for any number of zeros at the price of one m x m
    factorisation. M-FAC adds up the updates of single weights.
    """
    parts = zip(w.split(block), G.split(block, 1), pruned.split(block), strict=True)
    return torch.cat([_update_block(*part, damping) for part in parts])


def _update_block(w: Tensor, G: Tensor, pruned: Tensor, damping: float) -> Tensor:
    right = times(G, (w * pruned).double())
    if not bool(right.any()):
        return torch.where(pruned, 0, w)
    L = _factor(gram(G, w.device, ~pruned), damping)
    step = times_transposed(G, torch.cholesky_solve(right[:, None], L)[:, 0])
    return torch.where(pruned, 0, w.double() + step).to(w.dtype)


def gram(G: Float[Tensor, "m d"], device: torch.device, keep: Bool[Tensor, "d"] | None = None) -> Float64[Tensor, "m m"]:
    """G G^T over the weights in `keep`."""
    total = torch.zeros(len(G), len(G), dtype=torch.float64, device=device)
    start = 0
    for columns in panels(G, device):
        stop = start + columns.shape[1]
        total += (columns if keep is None else columns * keep[start:stop]) @ columns.t()
        start = stop
    return total


def times(G: Float[Tensor, "m d"], x: Float64[Tensor, "d"]) -> Float64[Tensor, "m"]:
    """G x."""
    total, start = torch.zeros(len(G), dtype=torch.float64, device=x.device), 0
    for columns in panels(G, x.device):
        total += columns @ x[start : start + columns.shape[1]]
        start += columns.shape[1]
    return total


def times_transposed(G: Float[Tensor, "m d"], y: Float64[Tensor, "m"]) -> Float64[Tensor, "d"]:
    """G^T y."""
    return torch.cat([columns.t() @ y for columns in panels(G, y.device)])


def panels(G: Float[Tensor, "m d"], device: torch.device, unit: int = 1) -> Iterator[Float64[Tensor, "m c"]]:
    """Some columns of G at a time, whole units of them, in float64."""
    size = max(1, PANEL_BYTES // (8 * len(G) * unit)) * unit
    for columns in G.split(size, 1):
        yield columns.to(device, torch.float64)


def _factor(gram: Tensor, damping: float) -> Tensor:
    A = gram.clone()
    A.diagonal().add_(len(A) * damping)
    return factorise(A)
