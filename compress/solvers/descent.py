"""Coordinate descent from a solved layer: scales and codes move, one after the other, to where the layer's error is least."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from compress.linalg import matmul_nt
from compress.qtensor import QTensor, round_to_grid
from compress.solvers import grid

LEAF = 16  # columns in rank-1 updates
CHUNK = 256  # columns between two updates of the gradient of all others
ROWS = 8192  # at a time: rows are independent, and the working copies five times as large
ENOUGH = 0.005  # a sweep that lowers the error by less is the last


def descend(
    q: QTensor,
    W: Float[Tensor, "N K"],
    H: Float[Tensor, "K K"],
    added: float,
    perm: Int64[Tensor, "K"],
    sweeps: int,
    keep: Bool[Tensor, "N K"] | None = None,
) -> QTensor:
    """Codes and scales with a smaller tr((W-Q) (H + added I) (W-Q)^T) than those of `q`, by up to `sweeps` sweeps.

    A sweep visits the columns in the order `perm`, which keeps groups whole: a group's scale moves to its least-squares
    optimum, rounded as it is stored, then its codes one by one to theirs, with all else fixed. The objective is a parabola in
    each, so no step raises it. Zero points stay, and so do zeros where `keep` says so. While the codes stand still, two sweeps
    bring the scales to where solving for all scales of a row at once would, within 0.1 % of the objective.
    """
    ordered = H[perm][:, perm].contiguous()
    ordered.diagonal().add_(added)
    parts = []
    for start in range(0, len(W), ROWS):
        cut = slice(start, start + ROWS)
        kept = None if keep is None else keep[cut]
        parts.append(_Descent(q.rows(start, start + ROWS), W[cut], ordered, added, perm, kept).run(sweeps))
    codes, scales, errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return replace(q, codes=codes, scales=scales, error=errors)


class _Descent:
    """The state of some rows: everything transposed and in visiting order, so that a column is a contiguous row of memory."""

    def __init__(self, q: QTensor, W: Tensor, H: Tensor, added: float, perm: Tensor, keep: Tensor | None) -> None:
        self.q, self.H, self.added, self.perm = q, H, added, perm
        self.group = q.scheme.group(len(H))
        self.groups = perm[:: self.group] // self.group
        self.scales = q.scales.t()[self.groups].float()  # [G, N]
        self.zeros = q.zeros.t()[self.groups].float()
        self.keep = None if keep is None else keep.t().contiguous()[perm]
        self.diagonal = H.diagonal().tolist()
        self.W = W.t().contiguous()[perm]  # [K, N]
        self.L = q.codes.t().contiguous()[perm].float() - self._per_column(self.zeros)  # Q in units of the scale
        self.Q = self.L * self._per_column(self.scales)
        self.G = matmul_nt(H, (self.Q - self.W).t())  # half the gradient
        self.S = torch.empty_like(self.Q)  # the step of every column in this sweep

    def _per_column(self, per_group: Float[Tensor, "G N"]) -> Float[Tensor, "K N"]:
        return per_group.repeat_interleave(self.group, 0)

    def run(self, sweeps: int) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N G"], Float[Tensor, "N"]]:
        """Codes, scales and the errors of the rows, for H without what was added."""
        objective = self._objective().sum()
        for _ in range(sweeps):
            before = objective
            self._sweep()
            objective = self._objective().sum()
            if before - objective < ENOUGH * before:
                break
        codes, scales = torch.empty_like(self.L, dtype=torch.uint8), torch.empty_like(self.scales)
        codes[self.perm] = (self.L + self._per_column(self.zeros)).byte()
        scales[self.groups] = self.scales
        errors = self._objective() - self.added * (self.Q - self.W).square_().sum(0)
        return codes.t().contiguous(), scales.t().contiguous().to(self.q.scales.dtype), errors

    def _objective(self) -> Float[Tensor, "N"]:
        return ((self.Q - self.W) * self.G).sum(0)

    def _sweep(self) -> None:
        K = len(self.Q)
        chunk = max(self.group, CHUNK // self.group * self.group)
        for start in range(0, K, chunk):
            stop = min(start + chunk, K)
            before = self.G[start:stop].clone()
            self._groups(start, stop)
            self.G[start:stop] = before  # what was added inside the chunk is added again with all the rest
            self.G += matmul_nt(self.H[:, start:stop], self.S[start:stop].t())

    def _groups(self, start: int, stop: int) -> None:
        """Visit the groups of start..stop, whose gradient is up to date, and leave their steps in S."""
        if stop - start > self.group:
            middle = start + (stop - start) // self.group // 2 * self.group
            self._groups(start, middle)
            self._forward(start, middle, stop)
            self._groups(middle, stop)
            return
        before = self.Q[start:stop].clone()
        self._scale(start, stop)
        self._codes(start, stop)
        torch.sub(self.Q[start:stop], before, out=self.S[start:stop])

    def _forward(self, start: int, middle: int, stop: int) -> None:
        self.G[middle:stop] += matmul_nt(self.H[middle:stop, start:middle], self.S[start:middle].t())

    def _scale(self, start: int, stop: int) -> None:
        g = start // self.group
        levels = self.L[start:stop]
        pull = matmul_nt(self.H[start:stop, start:stop], levels.t())
        curvature, slope = (pull * levels).sum(0), (levels * self.G[start:stop]).sum(0)
        best = grid.stored(self.scales[g] - slope / torch.where(curvature > 0, curvature, 1), self.q.scales.dtype)
        step = torch.where((curvature > 0) & best.isfinite(), best - self.scales[g], 0)
        self.scales[g] += step
        self.G[start:stop] += pull * step
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
        for j in range(start, stop):
            target = self.Q[j] - self.G[j] / self.diagonal[j]
            levels = round_to_grid(target, scale, zero, self.q.scheme.levels).sub_(zero)
            if self.keep is not None:
                levels *= self.keep[j]
            self.L[j] = levels
            q = levels.mul_(scale)
            torch.sub(q, self.Q[j], out=self.S[j])
            self.Q[j] = q
            if j + 1 < stop:
                self.G[j + 1 : stop].addr_(self.H[j + 1 : stop, j], self.S[j])
