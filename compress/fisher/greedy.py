"""What units cost when those of one Fisher block are pruned one after the other, each with the earlier ones made up for."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.fisher import obert, units
from compress.fisher.factor import factorise
from compress.spec import Sparsity


def costs(
    w: Float[Tensor, "d"], G: Float[Tensor, "m d"], done: Bool[Tensor, "U"], damping: float, block: int, sparsity: Sparsity
) -> tuple[Float[Tensor, "U"], Bool[Tensor, "U C"]]:
    """For every unit the dearest removal up to its own, and its zeros; units that are `done` go first and cost nothing.

    oBERT takes the costs of all units at once, as if the others stayed. Here every block removes its cheapest unit, moves the
    other weights, takes the unit's rows and columns out of F^-1 and goes on, as exact OBS does (arXiv 2208.11580). With the
    running maximum as its cost a threshold over blocks takes whole beginnings of these sequences.
    """
    C = units.width(sparsity)
    found = [
        _panel(w[start:stop], G[:, start:stop], done[start // C : stop // C], damping, block, sparsity)
        for start, stop in obert.panels(G, block)
    ]
    cost, zeros = zip(*found, strict=True)
    return torch.cat(cost), torch.cat(zeros)


def _panel(
    w: Tensor, G: Tensor, done: Tensor, damping: float, block: int, sparsity: Sparsity
) -> tuple[Float[Tensor, "U"], Bool[Tensor, "U C"]]:
    C = units.width(sparsity)
    inverse = torch.cholesky_inverse(factorise(obert.fisher(G, damping, block, w.device)))
    missing = len(inverse) * block - len(w)  # the last block is filled up: with units that are done
    W = torch.nn.functional.pad(w, (0, missing)).double().view(-1, block)
    gone = torch.nn.functional.pad(done, (0, missing // C), value=True).view(len(W), -1)
    cost, zeros = _removals(W, inverse, gone, sparsity)
    return cost.flatten()[: len(done)], zeros.flatten(0, 1)[: len(done)]


def _removals(
    W: Float[Tensor, "n B"], inverse: Float[Tensor, "n B B"], done: Bool[Tensor, "n U"], sparsity: Sparsity
) -> tuple[Float[Tensor, "n U"], Bool[Tensor, "n U C"]]:
    """`costs` for n blocks at once; changes `inverse`."""
    n, C = len(W), W.shape[1] // done.shape[1]
    at, W = torch.arange(n, device=W.device), W.clone()
    zeros = torch.zeros(*done.shape, C, dtype=torch.bool, device=W.device)
    cost = torch.where(done, -torch.inf, torch.inf).to(W.dtype)
    highest = torch.full_like(cost[:, 0], -torch.inf)
    left = ~done
    while bool(left.any()):
        each, subsets = units.costs(W.view(-1, C), obert.diagonal_blocks(inverse, C), sparsity)
        cheapest, unit = each.view(n, -1).masked_fill(~left, torch.inf).min(1)
        busy = left.any(1)
        picked = subsets.view(n, -1, C)[at, unit] & busy[:, None]
        highest = torch.where(busy, torch.maximum(highest, cheapest), highest)
        cost[at[busy], unit[busy]] = highest[busy]
        zeros[at[busy], unit[busy]] = picked[busy]
        left[at, unit] = False
        _eliminate(W, inverse, unit[:, None] * C + torch.arange(C, device=W.device), picked)
    return cost, zeros


def _eliminate(W: Tensor, inverse: Tensor, Q: Tensor, picked: Tensor) -> None:
    """Zero the picked ones of the weights Q of every block, move the others, and take them out of F^-1."""
    n, B = W.shape
    eye = torch.eye(Q.shape[1], dtype=W.dtype, device=W.device)
    columns = inverse.gather(2, Q[:, None].expand(n, B, -1)) * picked[:, None]
    S = columns.gather(1, Q[:, :, None].expand(-1, -1, Q.shape[1]))
    S = torch.where(picked[:, :, None] & picked[:, None], S, eye)
    Y = columns.mT / S if Q.shape[1] == 1 else torch.linalg.solve(S, columns.mT)  # [n, C, B]
    w = W.gather(1, Q) * picked
    W -= (w[:, None] @ Y)[:, 0]
    inverse.baddbmm_(columns, Y, alpha=-1)
    W.scatter_(1, Q, W.gather(1, Q).masked_fill(picked, 0))
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    diagonal.scatter_(1, Q, torch.where(picked, 1, diagonal.gather(1, Q)))
