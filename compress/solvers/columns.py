"""The column loop of GPTQ and SparseGPT: each column is rounded or zeroed after the errors of earlier ones are fed forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.linalg import add_product_
from compress.qtensor import Pruned, QTensor, Solved, codes_of, round_steps
from compress.solvers import fused, grid, masks
from compress.solvers.options import Options
from compress.spec import LayerSpec

LEAF = 32  # columns in rank-1 updates; everything larger is a matrix product


@dataclass(frozen=True)
class Factor:
    """H + damping = Ut diag(D) Ut^T, its rows and columns in the order `perm`."""

    Ut: Float[Tensor, "K K"]
    D: Float[Tensor, "K"]
    perm: Int64[Tensor, "K"]
    added: float
    notes: tuple[str, ...]


class Columns:
    """One pass over the columns of W in the order of a factorisation.

    With H = Ut D Ut^T the objective tr((W-Q) H (W-Q)^T) is `sum_j D_j (t_j - q_j)^2` with targets
    `t_j = w_j + sum_{i<j} (w_i - q_i) Ut_ij`. Here q_j is t_j on the grid of `spec.scheme` (in the stored dtype without one),
    or zero: where `keep` says so, or else where `spec.sparsity` asks for zeros and they cost least.
    Everything is transposed, so that a column of W is one contiguous row of memory.
    """

    def __init__(
        self,
        W: Float[Tensor, "N K"],
        factor: Factor,
        spec: LayerSpec,
        storage: grid.Storage,
        options: Options,
        keep: Bool[Tensor, "N K"] | None = None,
    ) -> None:
        N, K = W.shape
        self.factor, self.spec, self.storage, self.options = factor, spec, storage, options
        self.W = W
        self.T = W.t().contiguous()
        self.E = self.T[factor.perm]  # [K, N] in visiting order: W, and W - Q from where a column was visited
        self.T.copy_(self.E)  # targets: W plus the errors fed forward so far
        self.loss = torch.zeros(N, device=W.device)  # of the columns visited, without what damping adds
        self.feed = factor.Ut.t()  # [j, i]: what column i's error adds to column j's target
        self.keep = None if keep is None else keep.t()[factor.perm]
        self.group = spec.scheme.group(K) if spec.scheme else K
        self.window = 0  # columns whose zeros are chosen together
        if spec.sparsity and keep is None:
            self.keep = torch.ones(K, N, dtype=torch.bool, device=W.device)
            self.window = masks.window(spec.sparsity, K, self.group if self.group < K else 1)
        if spec.scheme:
            self._prepare_grid(W)
        self.unit = min(self.group, self.window or K)  # columns whose zeros and scales are chosen before they are visited

    def _prepare_grid(self, W: Float[Tensor, "N K"]) -> None:
        scheme = self.spec.scheme
        assert scheme is not None
        N, K = W.shape
        self.codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
        self.group_index = self.factor.perm // self.group
        self.group_of = self.group_index.tolist()
        self.fits_late = self.options.order != "act"
        if self.fits_late:
            self.scales = torch.empty(scheme.groups(K), N, device=W.device)
            self.zeros = torch.empty_like(self.scales)
            return
        D = self.factor.D
        weights = torch.empty_like(D).scatter_(0, self.factor.perm, D)  # back in stored order
        fitted = grid.fit(W.view(N, -1, self.group), weights.view(-1, self.group), scheme, self.storage, self.options.candidates)
        self.scales, self.zeros = fitted.scales.t().contiguous(), fitted.zeros.t().contiguous()

    def result(self) -> Solved:
        """The layer, once all columns were visited."""
        if self.spec.scheme is None:
            E = torch.empty_like(self.E)
            E[self.factor.perm] = self.E
            return Pruned((self.W - E.t()).to(self.storage.dtype), self.loss, self.factor.notes)
        codes = torch.empty_like(self.codes)
        codes[self.factor.perm] = self.codes
        return QTensor(
            codes.t().contiguous(),
            self.storage.of_rounded(self.scales.t().contiguous()),
            self.zeros.t().contiguous().byte(),
            self.spec.scheme,
            error=self.loss,
            notes=self.factor.notes,
            global_scale=self.storage.global_scale,
        )

    def visit(self, start: int, stop: int) -> None:
        """Solve columns start..stop, whose targets already hold the errors of all columns before `start`.

        Halving makes every update but the innermost a matrix product, at every level of the memory hierarchy.
        """
        if stop - start <= LEAF:
            self._leaf(start, stop)
            return
        middle = start + self.half(stop - start)
        self.visit(start, middle)
        add_product_(self.T[middle:stop], self.feed[middle:stop, start:middle], self.E[start:middle])
        self.visit(middle, stop)

    def half(self, length: int) -> int:
        """Half of the columns, on a boundary of windows or groups where there is one: their targets are then ready."""
        unit = next((unit for unit in sorted((self.window, self.group), reverse=True) if 0 < unit < length), LEAF)
        return max(unit, length // 2 // unit * unit)

    def _leaf(self, start: int, stop: int) -> None:
        cut = slice(start, stop)
        T, E, feed = self.T[cut], self.E[cut], self.factor.Ut[cut, cut].contiguous()
        Q, levels = torch.empty_like(T), torch.empty_like(T)  # levels are Q in units of the scale
        rows = zip(T.unbind(), E.unbind(), Q.unbind(), levels.unbind(), strict=True)
        for i, (target, error, q, level) in enumerate(rows):
            j = start + i
            if j % self.unit == 0:
                self.begin(j)
            self._round(j, target, level, q)
            error.sub_(q)
            if j + 1 < stop:
                T[i + 1 :].addr_(feed[i, i + 1 :], error)
        if self.spec.scheme:
            self.codes[cut] = codes_of(levels, self.zeros[self.group_index[cut]], self.spec.scheme)
        self.loss += self.factor.D[cut] @ Q.sub_(T).square_() - self.factor.added * E.square().sum(0)

    @no_type_check  # as `round_steps`
    def _round(self, j: int, target: Float[Tensor, "N"], level: Float[Tensor, "N"], q: Float[Tensor, "N"]) -> None:
        """Write what column j becomes to `q`, and in units of its scale to `level`."""
        if self.spec.scheme is None:
            q.copy_(target.to(self.storage.dtype))
            if self.keep is not None:
                q.mul_(self.keep[j])
            return
        scale, zero = self.scales[self.group_of[j]], self.zeros[self.group_of[j]]
        round_steps(torch.div(target, scale, out=level), zero, self.spec.scheme, level)
        if self.keep is not None:
            level.mul_(self.keep[j])
        torch.mul(level, scale, out=q)

    def begin(self, j: int, fit: bool = True) -> None:
        """Choose the zeros of the window and, unless something else does, the scale of the group that begin at column j."""
        if self.window and j % self.window == 0:
            self._choose_zeros(j)
        if fit and self.spec.scheme and self.fits_late and j % self.group == 0:
            self._fit_group(j)

    def _choose_zeros(self, j: int) -> None:
        """Choose the zeros of the window that begins at column j by what each would cost with all later columns free."""
        assert self.spec.sparsity is not None
        assert self.keep is not None
        stop = min(j + self.window, len(self.E))
        Ut, D = self.factor.Ut[j:stop, j:stop], self.factor.D[j:stop]
        self.keep[j:stop] = masks.cheapest(self._updated(j, stop), Ut, D, self.spec.sparsity, j, len(self.E))

    def _updated(self, start: int, stop: int) -> Float[Tensor, "C N"]:
        """Columns start..stop of the weights that best make up for the errors of all columns before `start`.

        They are the targets of a loop that rounds nothing from here on: `v_j = T_j + sum_{start<=i<j} (w_i - v_i) Ut_ij`.
        """
        W = self.E[start:stop]  # not visited yet
        Ut, eye = self.factor.Ut[start:stop, start:stop], torch.eye(stop - start, device=W.device)
        inverse = torch.linalg.solve_triangular(Ut.t(), eye, upper=False, unitriangular=True)  # faster than solving for all rows
        return torch.addmm(W, inverse, W - self.T[start:stop], alpha=-1)

    def _fit_group(self, j: int) -> None:
        """Fit the group that begins at column j to its updated weights; a zero lies on every grid, so those do not count."""
        assert self.spec.scheme is not None
        g, stop = self.group_of[j], j + self.group
        W = self._updated(j, stop)
        if self.keep is not None:
            W = W * self.keep[j:stop]
        fitted = grid.fit_group(W, self.factor.D[j:stop], self.spec.scheme, self.storage, self.options.candidates)
        self.scales[g], self.zeros[g] = fitted.scales, fitted.zeros


def run(loops: Sequence[Columns]) -> list[Solved]:
    """Solve layers of one shape and spec, on a GPU all at once."""
    if not loops:
        return []
    if fused.serves(loops[0].W.device, loops[0].spec):
        fused.visit(loops)
    else:
        for loop in loops:
            loop.visit(0, len(loop.E))
    return [loop.result() for loop in loops]
