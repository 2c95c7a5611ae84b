"""ALPS (arXiv 2406.07831): a mask found by ADMM on the layer's whole least-squares problem."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.linalg import matmul_nt
from compress.solvers import masks
from compress.spec import Sparsity

FIRST_PENALTY, LOWEST_PENALTY, HIGHEST_PENALTY = 0.1, 1e-4, 1e6
ITERATIONS, CHECKED_EVERY = 300, 3
SETTLED, SETTLED_AFTER = 3e-4, 30  # the share of the kept weights that still changes; iterations


def mask(W: Float[Tensor, "N K"], H: Float[Tensor, "K K"], sparsity: Sparsity) -> Bool[Tensor, "N K"]:
    """The weights to prune so that least squares on the others comes closest to tr((V-W) H (V-W)^T) = 0.

    Splits V into a free copy B and a sparse copy D and alternates between them, with a penalty rho on B - D that rises until
    D's support settles. H is scaled to a unit diagonal and decomposed once, so an iteration is two products with its
    eigenvectors. The penalty's schedule is that of the authors' code.
    """
    norm = H.diagonal().sqrt()
    values, E = torch.linalg.eigh((H / (norm * norm[:, None])).double())
    values, E = values.clamp(min=0).float(), E.float().contiguous()
    target = W * norm
    return _Alternation(target, values, E, sparsity).run()


class _Alternation:
    """B is free, D sparse, V their multiplier; all are held as [N, K], B and D in the scaled coordinates."""

    def __init__(self, target: Tensor, values: Tensor, E: Tensor, sparsity: Sparsity) -> None:
        self.target, self.values, self.E, self.sparsity = target, values, E, sparsity
        self.Et = E.t().contiguous()
        self.pull = matmul_nt(matmul_nt(target, self.Et) * values, E)  # target H
        self.restart()

    def restart(self) -> None:
        self.pruned = masks.by_cost(self.target.square(), self.sparsity)
        self.D = self.target.masked_fill(self.pruned, 0)
        self.V = torch.zeros_like(self.target)

    def run(self) -> Bool[Tensor, "N K"]:
        rho, raised, before = FIRST_PENALTY, False, self.pruned
        kept = max(1, int((~self.pruned).sum()))
        for iteration in range(1, ITERATIONS + 1):
            B = self._step(rho)
            if iteration % CHECKED_EVERY:
                continue
            changed = int((self.pruned != before).sum()) / 2
            before = self.pruned
            if changed / kept > 0.1:
                rho, raised = rho * 1.3, True
            elif changed / kept > 0.005:
                rho, raised = rho * 1.2, True
            elif changed > 0.5 and raised:
                rho *= 1.1
            elif raised or rho < LOWEST_PENALTY:
                break
            else:  # too weak a penalty, or too strong a one: nothing ever moved
                rho /= 5
                self.restart()
            rho = min(rho, HIGHEST_PENALTY)
            if iteration >= SETTLED_AFTER and raised and changed / kept < SETTLED:
                break
        return masks.by_cost(B.square(), self.sparsity)

    def _step(self, rho: float) -> Tensor:
        right = self.pull - self.V + rho * self.D
        B = matmul_nt(matmul_nt(right, self.Et) / (self.values + rho), self.E)
        free = B + self.V / rho
        self.pruned = masks.by_cost(free.square(), self.sparsity)
        self.D = free.masked_fill(self.pruned, 0)
        self.V += rho * (B - self.D)
        return B
