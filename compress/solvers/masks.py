"""Which weights become zero: the cheapest ones of a layer in a pattern, exactly as many as asked for."""

from __future__ import annotations

from itertools import combinations
from math import comb, lcm

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.spec import Sparsity

WINDOW = 128  # columns among which SparseGPT compares weights (its block size)
MANY_ZEROS = 0.2  # of a layer's weights: more are there on purpose. Trained weights in bfloat16 have next to none
NM_GROUPS = (4, 8, 16)  # M of the N:M patterns that are looked for where a layer has fewer zeros than that
KEPT = "the zeros of the source are kept"  # the note of such a layer
MOST_SUBSETS = 128  # of an N:M group that are compared exactly: covers 2:4 (6) and 4:8 (70)


def weights_to_keep(W: Float[Tensor, "N K"]) -> Bool[Tensor, "N K"] | None:
    """Find the weights that are not zero in a layer that was pruned before; None for a layer that was not.

    A pruned layer has zeros in more than a fifth of its weights, or at least one among every 4, 8 or 16 inputs of each row.
    """
    zero = W == 0
    many = zero.float().mean() > MANY_ZEROS
    patterned = (bool(zero.unflatten(1, (-1, m)).any(2).all()) for m in NM_GROUPS if W.shape[1] % m == 0)
    return ~zero if many or any(patterned) else None


def smallest(costs: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Exactly `count` of the smallest entries; among equals the first ones."""
    flat = costs.flatten()
    if count == 0:
        return torch.zeros_like(costs, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(costs)


def by_cost(costs: Float[Tensor, "N K"], sparsity: Sparsity, *, per_row: bool = False) -> Bool[Tensor, "N K"]:
    """The pruned weights of a layer, given what each costs alone; blocks cost the sum of their weights.

    `per_row` spreads the zeros of an unstructured pattern evenly over the rows, as Wanda does.
    """
    N, K = costs.shape
    if sparsity.nm:
        kept, of = sparsity.nm
        ranks = costs.view(N, -1, of).argsort(dim=-1, stable=True).argsort(-1)
        return (ranks < of - kept).view(N, K)
    count = sparsity.pruned(N, K)
    rows, cols = sparsity.block
    if per_row and (rows, cols) == (1, 1):
        ends = [round(count * (n + 1) / N) for n in range(N)]
        quota = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=costs.device)
        return costs.argsort(dim=1, stable=True).argsort(1) < quota[:, None]
    blocks = costs.view(N // rows, rows, K // cols, cols).sum((1, 3))
    pruned: Tensor = smallest(blocks, count).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return pruned


def window(sparsity: Sparsity, K: int, group: int) -> int:
    """How many columns choose their zeros together: about WINDOW, in step with the groups that share a scale."""
    if sparsity.nm:
        return sparsity.nm[1]
    cols = sparsity.block[1]
    if group <= WINDOW:
        unit = lcm(group, cols)
        return min(K, max(unit, WINDOW // unit * unit))
    return max((w for w in range(cols, min(K, WINDOW) + 1, cols) if group % w == 0), default=cols)


def cheapest(
    T: Float[Tensor, "C N"], Ut: Float[Tensor, "C C"], D: Float[Tensor, "C"], sparsity: Sparsity, start: int, K: int
) -> Bool[Tensor, "C N"]:
    """Which weights of a window to keep, by the exact rise of the layer's error when later columns make up for the zeros.

    T are columns start..start+C of K of the updated weights, transposed, and `Ut diag(D) Ut^T` is the Schur complement of
    their Hessian. A block of columns B costs `sum_B D (Ut_BB^T t)^2`; for one column that is SparseGPT's t^2 / U_jj^2
    (arXiv 2301.00774). An N:M group compares all subsets of zeros where there are few, SparseGPT only single weights.
    """
    if sparsity.nm:
        return _best_subset(T, Ut, D, sparsity.nm[0])
    rows, cols = sparsity.block
    C, N = T.shape
    blocks = torch.stack([Ut[i : i + cols, i : i + cols] for i in range(0, C, cols)])  # [C/cols, cols, cols]
    costs = (blocks.mT @ T.view(-1, cols, N)).square_().mul_(D.view(-1, cols, 1)).sum(1)  # [C/cols, N]
    costs = costs.view(len(costs), -1, rows).sum(-1)
    total = sparsity.pruned(N, K)
    count = round(total * (start + C) / K) - round(total * start / K)
    pruned: Tensor = smallest(costs, count).repeat_interleave(cols, 0).repeat_interleave(rows, 1)
    return ~pruned


def _best_subset(T: Tensor, Ut: Tensor, D: Tensor, kept: int) -> Tensor:
    """Zeros Q cost `t_Q^T ([S^-1]_QQ)^-1 t_Q` for the Schur complement S: group OBS (arXiv 2203.07259)."""
    M, N = T.shape
    inverse: Tensor = torch.linalg.inv((Ut.double() * D.double()) @ Ut.double().t())
    if comb(M, kept) > MOST_SUBSETS:
        costs = T.double().square() / inverse.diagonal()[:, None]
        ranks: Tensor = costs.argsort(dim=0, stable=True).argsort(0)
        return ranks >= M - kept
    subsets = torch.tensor(list(combinations(range(M), M - kept)), device=T.device)  # [S, zeros]
    forms = torch.linalg.inv(inverse[subsets[:, :, None], subsets[:, None, :]]).to(T.dtype)  # [S, zeros, zeros]
    zeroed = T[subsets]  # [S, zeros, N]
    best = (zeroed * (forms @ zeroed)).sum(1).argmin(0)  # [N]
    keep = torch.ones(M, N, dtype=torch.bool, device=T.device)
    return keep.scatter_(0, subsets[best].t(), False)
