"""What is pruned as one: a weight, a block of a row, or the zeros of an N:M group; and what each costs the loss."""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.errors import CompressError
from compress.solvers.masks import MOST_SUBSETS
from compress.spec import Sparsity


def width(sparsity: Sparsity) -> int:
    """C, the consecutive weights of a unit; raises for a pattern whose units are not consecutive in a row."""
    rows, cols = sparsity.block
    if rows > 1 or sparsity.pattern == "row":
        raise CompressError(
            f"Pruning on the loss cannot do pattern {sparsity.pattern}: it takes single weights, N:M groups and blocks of one "
            f"row, such as block:1x{max(cols, 4)}. Methods alps and sparsegpt do."
        )
    return sparsity.nm[1] if sparsity.nm else cols


def count(sparsity: Sparsity, N: int, K: int) -> int:
    """How many units become sparse: for N:M all of them."""
    return N * K // sparsity.nm[1] if sparsity.nm else sparsity.pruned(N, K)


def costs(
    w: Float[Tensor, "U C"], inverse: Float[Tensor, "U C C"], sparsity: Sparsity
) -> tuple[Float[Tensor, "U"], Bool[Tensor, "U C"]]:
    """The rise of the loss when the weights Q of a unit become zero and all others make up for it, and which Q that are.

    It is `w_Q^T ([F^-1]_QQ)^-1 w_Q / 2`, exactly, for the quadratic model with Fisher F (oBERT, arXiv 2203.07259, for
    blocks); `inverse` are the units' diagonal blocks of F^-1. An N:M group compares all its subsets where there are few, else
    it gives up the weights that are cheapest alone.
    """
    if sparsity.nm is None:
        if w.shape[1] == 1:
            return 0.5 * w[:, 0].square() / inverse[:, 0, 0], torch.ones_like(w, dtype=torch.bool)
        return _cost(w, inverse), torch.ones_like(w, dtype=torch.bool)
    kept, of = sparsity.nm
    if comb(of, kept) > MOST_SUBSETS:
        alone = w.square() / inverse.diagonal(dim1=1, dim2=2)
        zeros = alone.argsort(dim=1, stable=True)[:, : of - kept]
        sub = inverse.gather(1, zeros[:, :, None].expand(-1, -1, of)).gather(2, zeros[:, None].expand(-1, of - kept, -1))
        return _cost(w.gather(1, zeros), sub), _scatter(w, zeros)
    subsets = torch.tensor(list(combinations(range(of), of - kept)), device=w.device)
    each = torch.stack([_cost(w[:, Q], inverse[:, Q[:, None], Q]) for Q in subsets])  # [S, U]
    cheapest = each.min(0)
    return cheapest.values, _scatter(w, subsets[cheapest.indices])


def _cost(w: Float[Tensor, "U Q"], inverse: Float[Tensor, "U Q Q"]) -> Float[Tensor, "U"]:
    """Half of `w^T inverse^-1 w` by elimination, for all units at once: batched solvers are slow for a few unknowns."""
    w, S = w.clone(), inverse.clone()
    total = torch.zeros_like(w[:, 0])
    for k in range(w.shape[1]):
        pivot = S[:, k, k]
        total += w[:, k].square() / pivot
        factor = S[:, k + 1 :, k] / pivot[:, None]
        w[:, k + 1 :] -= factor * w[:, k, None]
        S[:, k + 1 :, k + 1 :] -= factor[:, :, None] * S[:, k, None, k + 1 :]
    return 0.5 * total


def _scatter(w: Tensor, zeros: Tensor) -> Bool[Tensor, "U C"]:
    return torch.zeros_like(w, dtype=torch.bool).scatter_(1, zeros, True)
