"""Exact OBS, weight by weight (Optimal Brain Compression, arXiv 2208.11580): the yardstick for faster methods."""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.errors import CompressError
from compress.spec import Sparsity

BYTES_AT_A_TIME = 1 << 28  # of the inverse Hessians of the rows that are worked on together


def mask(W: Float[Tensor, "N K"], H: Float[Tensor, "K K"], sparsity: Sparsity) -> Bool[Tensor, "N K"]:
    """Prune, in every row, the weight whose removal costs least with all others adjusted, again and again.

    Removing p costs w_p^2 / [H^-1]_pp; the others move by -w_p / [H^-1]_pp times column p of H^-1, which then loses row and
    column p. Rows are independent, so an unstructured layer takes the cheapest next removal of any row until it has enough.
    In an N:M pattern a group that has its zeros is passed over. K^3 operations a row, in float64.
    """
    if sparsity.block != (1, 1):
        raise CompressError(f"Method obs prunes single weights, not {sparsity.pattern}; sparsegpt and alps do.")
    N, K = W.shape
    inverse = torch.linalg.inv(H.double())
    rows = max(1, BYTES_AT_A_TIME // (8 * K * K))
    traces = [_trace(part.double(), inverse, sparsity) for part in W.split(rows)]
    order, costs = torch.cat([order for order, _ in traces]), torch.cat([cost for _, cost in traces])
    steps = order.shape[1]
    counts = [steps] * N if sparsity.nm else _cheapest(costs.tolist(), sparsity.pruned(N, K))
    pruned = torch.zeros(N, K, dtype=torch.bool, device=W.device)
    taken = torch.arange(steps, device=W.device)[None] < torch.tensor(counts, device=W.device)[:, None]
    pruned[torch.arange(N, device=W.device)[:, None].expand_as(order)[taken], order[taken]] = True
    return pruned


def _trace(w: Tensor, inverse: Tensor, sparsity: Sparsity) -> tuple[Int64[Tensor, "R S"], Float[Tensor, "R S"]]:
    """For every row the weights in the order of their removal, and what each removal costs."""
    R, K = w.shape
    w, Hi = w.clone(), inverse.repeat(R, 1, 1)
    zeros_left = torch.full((R, K // sparsity.nm[1]), sparsity.nm[1] - sparsity.nm[0], device=w.device) if sparsity.nm else None
    steps = int(zeros_left[0].sum()) if zeros_left is not None else K
    gone = torch.zeros(R, K, dtype=torch.bool, device=w.device)
    at = torch.arange(R, device=w.device)
    order, costs = [], []
    for _ in range(steps):
        cost = w.square() / Hi.diagonal(dim1=1, dim2=2)
        barred = gone
        if zeros_left is not None and sparsity.nm:
            barred = gone | (zeros_left == 0).repeat_interleave(sparsity.nm[1], 1)
        cost, p = cost.masked_fill(barred, torch.inf).min(1)
        column = Hi[at, :, p]  # [R, K]
        pivot = column[at, p]
        w -= (w[at, p] / pivot)[:, None] * column
        Hi -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        gone[at, p] = True
        w[gone] = 0
        Hi[at, p, p] = 1  # out of the way: the weight is zero, and barred
        if zeros_left is not None and sparsity.nm:
            zeros_left[at, p // sparsity.nm[1]] -= 1
        order.append(p)
        costs.append(cost)
    return torch.stack(order, 1), torch.stack(costs, 1)


def _cheapest(costs: list[list[float]], count: int) -> list[int]:
    """How many removals each row makes when the cheapest next one of any row is always taken."""
    taken = [0] * len(costs)
    heap = [(row[0], n) for n, row in enumerate(costs)]
    heapq.heapify(heap)
    for _ in range(count):
        _, n = heapq.heappop(heap)
        taken[n] += 1
        if taken[n] < len(costs[n]):
            heapq.heappush(heap, (costs[n][taken[n]], n))
    return taken
