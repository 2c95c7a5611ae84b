"""Removing groups of inputs from a layer: which cost least, and how the others make up for them (group OBS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.linalg import damped_inverse

ROUNDS = 64  # of joint removals: as good as one by one (128 and 256 of 512 neurons of the reference model, 2026-11)


@dataclass(frozen=True)
class Removal:
    """Which units are left, the layer's new weight with zeros for the others, and the rise of its damped squared error."""

    kept: Bool[Tensor, "U"]
    W: Float[Tensor, "N K"]
    cost: float
    notes: tuple[str, ...] = ()


def remove(
    W: Float[Tensor, "N K"], H: Float[Tensor, "K K"], width: int, count: int, damping: float, rounds: int = ROUNDS
) -> Removal:
    """Remove `count` units of `width` consecutive inputs each, cheapest first, every time moving the weights that stay.

    Removing the inputs S costs tr(W_S ([H^-1]_SS)^-1 W_S^T) and moves W by -W_S ([H^-1]_SS)^-1 [H^-1]_S: (optimal brain
    surgeon with groups, arXiv 2203.07259 eq. 8, here for all rows at once); then H^-1 loses S. In float64. Up to `rounds`
    removals are chosen one by one; more are chosen in as many batches, each removed jointly and exactly.
    """
    inverse, notes = _inverse(H.double(), damping)
    left = W.double().clone()
    kept = torch.ones(W.shape[1] // width, dtype=torch.bool, device=W.device)
    inputs = torch.arange(W.shape[1], device=W.device).view(-1, width)
    total = 0.0
    for done in range(rounds):
        n = count * (done + 1) // rounds - count * done // rounds
        if n == 0:
            continue
        cost = saliency(left, inverse, kept, width).masked_fill(~kept, torch.inf)
        units = cost.argsort(stable=True)[:n]
        total += _take_(left, inverse, inputs[units].flatten())
        kept[units] = False
    return Removal(kept, left, total, notes)


def saliency(W: Float[Tensor, "N K"], inverse: Float[Tensor, "K K"], kept: Bool[Tensor, "U"], width: int) -> Float[Tensor, "U"]:
    """tr(W_S ([H^-1]_SS)^-1 W_S^T) of every unit; 0 for those that are gone."""
    costs: Tensor
    if width == 1:
        costs = W.square().sum(0) / torch.where(kept, inverse.diagonal(), 1)
        return costs
    U = len(kept)
    own = inverse.view(U, width, U, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()  # [U, width, width]
    own[~kept] = torch.eye(width, dtype=own.dtype, device=own.device)
    parts = W.view(len(W), U, width).transpose(0, 1)  # [U, N, width]
    costs = (torch.linalg.inv(own) * (parts.mT @ parts)).sum((1, 2))
    return costs


def _take_(W: Float[Tensor, "N K"], inverse: Float[Tensor, "K K"], S: Int64[Tensor, "S"]) -> float:
    """Remove inputs jointly from W and from the inverse, both in place; what that cost."""
    zeroed = W[:, S]
    solved = torch.linalg.solve(inverse[S][:, S], torch.cat([inverse[S], zeroed.t()], 1))  # [S, K + N]
    moves, weights = solved.split([W.shape[1], len(W)], 1)
    cost = float((weights.t() * zeroed).sum())
    W -= zeroed @ moves
    inverse -= inverse[:, S] @ moves
    W[:, S] = 0
    inverse[S] = 0
    inverse[:, S] = 0
    return cost


def _inverse(H: Float[Tensor, "K K"], damping: float) -> tuple[Float[Tensor, "K K"], tuple[str, ...]]:
    if not H.diagonal().mean() > 0:
        return torch.eye(len(H), dtype=H.dtype, device=H.device), ("chosen by size: its inputs do not vary",)
    inverse, used = damped_inverse(H, damping)
    return inverse, () if used == damping else (f"damping raised to {used:g}",)
