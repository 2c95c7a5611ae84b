"""Coordinate descent from a solved layer: scales and codes move, one after the other, to where the layer's error is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from compress.linalg import add_product_, matmul_nt, permuted
from compress.qtensor import QTensor, codes_of, round_steps, values_of
from compress.solvers import fused, grid
from compress.spec import LayerSpec

LEAF = 32  # columns in rank-1 updates
ROWS = 8192  # at a time: rows are independent, and the working copies five times as large
ENOUGH = 0.005  # a sweep that lowers the error by less is the last

Result = tuple[UInt8[Tensor, "n K"], Shaped[Tensor, "n G"], Float[Tensor, "n"]]


@dataclass(frozen=True)
class Start:
    """Where a descent begins."""

    q: QTensor
    W: Float[Tensor, "N K"]
    H: Float[Tensor, "K K"]
    added: float
    perm: Int64[Tensor, "K"]
    keep: Bool[Tensor, "N K"] | None = None

    def ordered(self) -> Float[Tensor, "K K"]:
        """H + added I in visiting order."""
        ordered = permuted(self.H, self.perm)
        ordered.diagonal().add_(self.added)
        return ordered

    def rows(self, cut: slice) -> Start:
        """The descent of some rows; rows are independent."""
        keep = None if self.keep is None else self.keep[cut]
        return replace(self, q=self.q.rows(cut.start, cut.stop), W=self.W[cut], keep=keep)


def descend(starts: Sequence[Start], sweeps: int) -> list[QTensor]:
    """Codes and scales with a smaller tr((W-Q) (H + added I) (W-Q)^T) than those of every `q`, by up to `sweeps` sweeps.

    A sweep visits the columns in the order `perm`, which keeps groups whole: a group's scale moves to its least-squares
    optimum, rounded as it is stored, then its codes one by one to theirs, with all else fixed. The objective is a parabola in
    each, so no step raises it. Zero points stay, and so do zeros where `keep` says so. While the codes stand still, two sweeps
    bring the scales to where solving for all scales of a row at once would, within 0.1 % of the objective. The layers are of one
    shape and scheme; a GPU takes them all at once.
    """
    if sweeps == 0 or not starts:
        return [start.q for start in starts]
    if fused.serves(starts[0].W.device, LayerSpec(starts[0].q.scheme)):
        descents = [Descent(start, start.ordered()) for start in starts]
        fused.descend(descents, sweeps)
        return [_joined(start.q, [descent.result()]) for start, descent in zip(starts, descents, strict=True)]
    return [_joined(start.q, _in_parts(start, sweeps)) for start in starts]


def _joined(q: QTensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> QTensor:
    codes, scales, errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return replace(q, codes=codes, scales=scales, error=errors)


def _in_parts(start: Start, sweeps: int) -> list[Result]:
    H, parts = start.ordered(), []
    for first in range(0, len(start.W), ROWS):
        descent = Descent(start.rows(slice(first, first + ROWS)), H)
        descent.run(sweeps)
        parts.append(descent.result())
    return parts


class Descent:
    """The state of some rows: everything transposed and in visiting order, so that a column is a contiguous row of memory.

    In a sweep a column's steps reach the gradient of the columns after it. Those before it catch up only if another sweep
    follows: the error needs no gradient, as a step s from where the gradient is 2 g changes it by `s (2 g + H_jj s)`.
    """

    def __init__(self, start: Start, H: Float[Tensor, "K K"]) -> None:
        q, perm = start.q, start.perm
        self.q, self.H, self.added, self.perm = q, H, start.added, perm
        self.group = q.scheme.group(len(H))
        self.groups = perm[:: self.group] // self.group
        self.storage = grid.Storage(q.scales.dtype, q.global_scale)
        self.scales = q.steps.t()[self.groups]  # [G, N]
        self.zeros = q.zeros.t()[self.groups].float()
        self.keep = None if start.keep is None else start.keep.t().contiguous()[perm]
        self.diagonal = H.diagonal()
        self.divisors = self.diagonal.tolist()
        self.W = start.W.t().contiguous()[perm]  # [K, N]
        self.L = values_of(q.codes.t().contiguous()[perm], self._per_column(self.zeros), q.scheme)  # Q in units of the scale
        self.Q = self.L * self._per_column(self.scales)
        self.G = matmul_nt(H, (self.Q - self.W).t())  # half the gradient
        self.S = torch.empty_like(self.Q)  # the step of every column in this sweep
        self.objective = (self.Q - self.W).mul_(self.G).sum(0)

    def _per_column(self, per_group: Float[Tensor, "G N"]) -> Float[Tensor, "K N"]:
        return per_group.repeat_interleave(self.group, 0)

    def run(self, sweeps: int) -> None:
        """Descend on the spot."""
        for left in reversed(range(sweeps)):
            before = self.objective.sum()
            self._groups(0, len(self.Q), left > 0)
            if self.enough(before, self.objective.sum()):
                break
            if left:
                self._catch_up(0, len(self.Q))

    @staticmethod
    def enough(before: Float[Tensor, ""], after: Float[Tensor, ""]) -> bool:
        """Whether a sweep that took the error from `before` to `after` is the last."""
        return bool(before - after < ENOUGH * before)

    def result(self) -> Result:
        """Codes, scales and the errors of the rows, for H without what was added."""
        codes, scales = torch.empty_like(self.L, dtype=torch.uint8), torch.empty_like(self.scales)
        codes[self.perm] = codes_of(self.L, self._per_column(self.zeros), self.q.scheme)
        scales[self.groups] = self.scales
        off = (self.L * self._per_column(self.scales)).sub_(self.W)
        errors = self.objective - self.added * off.square_().sum(0)
        return codes.t().contiguous(), self.storage.of_rounded(scales.t().contiguous()), errors

    def _groups(self, start: int, stop: int, again: bool) -> None:
        """Visit the groups of start..stop, whose gradient is up to date, and leave their steps in S.

        With `again`, the gradient of each is then up to date with its own steps and those of groups before it.
        """
        if stop - start > self.group:
            middle = self._middle(start, stop)
            self._groups(start, middle, again)
            self._forward(start, middle, stop)
            self._groups(middle, stop, again)
            return
        Q, G, S = self.Q[start:stop], self.G[start:stop], self.S[start:stop]
        before = Q.clone()
        gradient = G.clone() if again else G
        self.scale(start, stop)
        self._codes(start, stop)
        self.objective += torch.addcmul(2 * G, self.diagonal[start:stop, None], S).mul_(S).sum(0)
        torch.sub(Q, before, out=S)
        if again:
            G.copy_(gradient)
            add_product_(G, self.H[start:stop, start:stop], S)

    def _catch_up(self, start: int, stop: int) -> None:
        """Add the steps of every group to the gradient of the groups before it."""
        if stop - start > self.group:
            middle = self._middle(start, stop)
            self._catch_up(start, middle)
            self._catch_up(middle, stop)
            add_product_(self.G[start:middle], self.H[start:middle, middle:stop], self.S[middle:stop])

    def _middle(self, start: int, stop: int) -> int:
        return start + (stop - start) // self.group // 2 * self.group

    def _forward(self, start: int, middle: int, stop: int) -> None:
        add_product_(self.G[middle:stop], self.H[middle:stop, start:middle], self.S[start:middle])

    def scale(self, start: int, stop: int) -> None:
        """Move the scale of the group start..stop."""
        g = start // self.group
        levels = self.L[start:stop]
        pull = matmul_nt(self.H[start:stop, start:stop], levels.t())
        curvature, slope = (pull * levels).sum(0), (levels * self.G[start:stop]).sum(0)
        best = self.storage.rounded(self.scales[g] - slope / torch.where(curvature > 0, curvature, 1))
        step = torch.where((curvature > 0) & best.isfinite(), best - self.scales[g], 0)
        self.scales[g] += step
        self.objective += step * (2 * slope + curvature * step)
        self.G[start:stop].addcmul_(pull, step)
        self.Q[start:stop] = levels * self.scales[g]

    def _codes(self, start: int, stop: int) -> None:
        """Visit the columns of a group; S holds the steps of their codes alone."""
        if stop - start > LEAF:
            middle = start + max(LEAF, (stop - start) // 2 // LEAF * LEAF)
            self._codes(start, middle)
            self._forward(start, middle, stop)
            self._codes(middle, stop)
            return
        scale, zero = self.scales[start // self.group], self.zeros[start // self.group]
        inverse, H, old = scale.reciprocal(), self.H[start:stop, start:stop].contiguous(), self.Q[start:stop].neg()
        rows = zip(old.unbind(), *(state[start:stop].unbind() for state in (self.L, self.G, self.S)), strict=True)
        for j, (minus, level, gradient, step) in enumerate(rows, start):
            target = torch.addcmul(level, gradient, inverse, value=-1 / self.divisors[j])
            round_steps(target, zero, self.q.scheme, level)
            if self.keep is not None:
                level.mul_(self.keep[j])
            torch.addcmul(minus, level, scale, out=step)
            if j + 1 < stop:
                self.G[j + 1 : stop].addr_(H[j - start, j - start + 1 :], step)
        torch.mul(self.L[start:stop], scale, out=self.Q[start:stop])
