"""The column loop and coordinate descent on a GPU: kernels for blocks of columns, and batched products between them.

Layers of one shape go together. Each keeps its state in views of tensors that hold all of theirs, so that what has no kernel -
windows of zeros, groups wider than a block - is still done by the loops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.kernels.dispatch import HAS_TRITON
from compress.solvers import grid
from compress.spec import LayerSpec

if TYPE_CHECKING:
    from compress.kernels.columns import Fit
    from compress.solvers.columns import Columns
    from compress.solvers.descent import Descent

BLOCK = 128  # columns of a launch


def has_kernel(device: torch.device) -> bool:
    """Whether a block of columns can be one launch there."""
    return device.type == "cuda" and HAS_TRITON


def serves(device: torch.device, spec: LayerSpec) -> bool:
    """Whether layers of that spec can be solved by launches."""
    return has_kernel(device) and spec.scheme is not None and spec.scheme.grid == "int"


def visit(loops: Sequence[Columns]) -> None:
    """Visit all columns of layers of one shape and spec."""
    from compress.kernels.columns import State, round_columns_

    one = loops[0]
    scheme, fit = one.spec.scheme, _fit(one)
    assert scheme is not None
    held = _together(loops, ("E", "T", "scales", "zeros", "codes", "loss", "keep"))
    Ut, D = (_stacked([getattr(loop.factor, name) for loop in loops]) for name in ("Ut", "D"))
    state = State(D=D, group_of=_stacked([loop.group_index for loop in loops]).int(), **held)
    of_groups = BLOCK // one.group * one.group if fit else one.group if one.fits_late else BLOCK
    block = min(size for size in (BLOCK, of_groups, one.window) if size)

    def solve(start: int, stop: int) -> None:
        if stop - start <= block:
            for loop in loops:
                loop.begin(start, fit is None)
            round_columns_(state, Ut, start, stop, scheme.levels, fit)
            return
        middle = start + one.half(stop - start)
        solve(start, middle)
        state.T[:, middle:stop].baddbmm_(Ut[:, start:middle, middle:stop].mT, state.E[:, start:middle])
        solve(middle, stop)

    solve(0, len(one.E))
    for loop in loops:
        loop.loss -= loop.factor.added * loop.E.square().sum(0)


def _fit(loop: Columns) -> Fit | None:
    """How a launch fits the scales of its groups; None where they are fitted before it."""
    from compress.kernels.columns import Fit

    scheme, group = loop.spec.scheme, loop.group
    assert scheme is not None
    if not loop.fits_late or group > BLOCK or loop.window % group:
        return None
    factors, shrinks = (table.to(loop.W.device) for table in grid.ranges(scheme, loop.options.candidates))
    return Fit(scheme.symmetric, group, factors, shrinks, loop.storage.dtype)


def descend(descents: Sequence[Descent], sweeps: int) -> None:
    """Descend in layers of one shape and scheme, each until it has enough."""
    batch = _Batch(descents)
    for left in reversed(range(sweeps)):
        before = batch.state.objective.sum(1)
        batch.groups(0, batch.K, left > 0)
        if left == 0:
            return
        each = zip(batch.descents, before, batch.state.objective.sum(1), strict=True)
        going = [one for one, *errors in each if not one.enough(*errors)]
        if not going:
            return
        batch.catch_up(0, batch.K)
        if len(going) < len(batch.descents):
            batch = _Batch(going)


class _Batch:
    """The sweeps of `Descent` over layers of one shape and scheme, with launches for what it does column by column."""

    def __init__(self, descents: Sequence[Descent]) -> None:
        from compress.kernels.descent import State

        self.descents, self.group, self.scheme = descents, descents[0].group, descents[0].q.scheme
        self.dtype = descents[0].storage.dtype
        held = _together(descents, ("L", "G", "S", "scales", "zeros", "objective", "keep"))
        self.H = _stacked([one.H for one in descents])
        self.K = self.H.shape[1]
        self.block = BLOCK // self.group * self.group if self.group <= BLOCK else self.group
        diagonal = self.H.diagonal(dim1=1, dim2=2).contiguous()
        self.state = State(diagonal=diagonal, recips=(-1 / diagonal.double()).float(), **held)

    def groups(self, start: int, stop: int, again: bool) -> None:
        """Visit whole groups; with `again`, their gradient is then up to date with their steps."""
        if stop - start > self.block:
            middle = _middle(start, stop, self.block)
            self.groups(start, middle, again)
            self._forward(start, middle, stop)
            self.groups(middle, stop, again)
        elif self.group <= BLOCK:
            self._launch(start, stop)
        else:
            self._wide_group(start, stop, again)

    def catch_up(self, start: int, stop: int) -> None:
        """Add the steps of every block to the gradient of the blocks before it."""
        if stop - start > self.block:
            middle = _middle(start, stop, self.block)
            self.catch_up(start, middle)
            self.catch_up(middle, stop)
            self.state.G[:, start:middle].baddbmm_(self.H[:, start:middle, middle:stop], self.state.S[:, middle:stop])

    def _wide_group(self, start: int, stop: int, again: bool) -> None:
        """A group that no launch can hold: its scale moves first, then its codes block by block."""
        cut, g = slice(start, stop), start // self.group
        L, G, S, scales = self.state.L[:, cut], self.state.G[:, cut], self.state.S[:, cut], self.state.scales[:, g, None]
        before, gradient = L * scales, G.clone()
        for one in self.descents:
            one.scale(start, stop)
        self._codes(start, stop)
        torch.sub(L * scales, before, out=S)
        if again:
            torch.baddbmm(gradient, self.H[:, cut, cut], S, out=G)

    def _codes(self, start: int, stop: int) -> None:
        if stop - start <= BLOCK:
            self._launch(start, stop)
            return
        middle = _middle(start, stop, BLOCK)
        self._codes(start, middle)
        self._forward(start, middle, stop)
        self._codes(middle, stop)

    def _forward(self, start: int, middle: int, stop: int) -> None:
        self.state.G[:, middle:stop].baddbmm_(self.H[:, middle:stop, start:middle], self.state.S[:, start:middle])

    def _launch(self, start: int, stop: int) -> None:
        from compress.kernels.descent import descend_

        descend_(self.state, self.H, start, stop, self.group, self.scheme.levels, self.dtype)


def _middle(start: int, stop: int, unit: int) -> int:
    """About halfway, a multiple of `unit` columns from the start."""
    return start + max(unit, (stop - start) // 2 // unit * unit)


def _together(many: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Tensors of all of them, one after the other in memory, which those of each become views of."""
    given = [name for name in names if getattr(many[0], name) is not None]
    held = {name: _stacked([getattr(one, name).contiguous() for one in many]) for name in given}
    for name, tensor in held.items():
        for one, view in zip(many, tensor, strict=True):
            setattr(one, name, view)
    return held


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[L, ...]; without a copy of one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
