"""Forward passes through a block that stop where a layer's input is known and are taken up again once the layer is solved.

A pass is taken up by running the block again from its input; submodules that ended in an earlier run answer from memory. What
is computed twice are norms, attention products and sums: everything that is no submodule with a matrix. No pass needs a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.calib.capture import Stop, replaced_forwards_of

Key = tuple[Any, ...]  # of one call of a module: the key of the call around it, the module, and how often it was called in there


@dataclass(frozen=True)
class Ended:
    """What a module returned, and the versions of the tensors in it, which change when somebody writes to them."""

    result: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(result: Any) -> Ended:
        tensors = tuple(_tensors(result))
        return Ended(result, tensors, tuple(tensor._version for tensor in tensors))

    @property
    def valid(self) -> bool:
        """Whether every tensor still is what the module returned."""
        return all(tensor._version == version for tensor, version in zip(self.tensors, self.versions, strict=True))


class Replay:
    """The forward pass of one batch through a block, as far as it has come.

    `at` is the module that it stopped at and `seen` that module's input; `output` is there once the pass has ended. `inputs` and
    `outputs` are those of the modules that were asked for, as far as they were passed.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.forward = forward
        self.ended: dict[Key, Ended] = {}
        self.at: nn.Module | None = None
        self.seen: Any = None
        self.output: Tensor | None = None
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what the pass remembers, but for its input where it stopped."""
        held = {tensor.data_ptr(): tensor.nbytes for one in self.ended.values() for tensor in one.tensors}
        return sum(held.values())


@dataclass
class _Frame:
    """A call that has not returned yet: its key, how often it called each module, and what it remembers of these calls."""

    key: Key
    counts: Counter[nn.Module] = field(default_factory=Counter)
    inner: list[Key] = field(default_factory=list)


class Runner:
    """Runs passes through one block up to `target`, or to the end for None.

    `inputs_of` and `outputs_of` are modules whose input or output passes note.
    """

    def __init__(
        self, target: nn.Module | None, inputs_of: Collection[nn.Module] = (), outputs_of: Collection[nn.Module] = ()
    ) -> None:
        self.target, self.inputs_of, self.outputs_of = target, frozenset(inputs_of), frozenset(outputs_of)
        self.current: Replay | None = None
        self.frames: list[_Frame] = []

    def advance(self, one: Replay) -> Any:
        """Take a pass up: returns the input of `target`, or None where the pass ended without calling it."""
        self.current, self.frames = one, [_Frame(())]
        one.at = one.seen = None
        try:
            with torch.no_grad():
                one.output = one.forward()
        except Stop:
            pass
        finally:
            self.current, self.frames = None, []
        return one.seen

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for the forward of a submodule; the pass that runs is the current one."""
        one = self.current
        if one is None:  # not a pass of this runner
            return forward(*args, **kwargs)
        if module in self.inputs_of:
            one.inputs[module] = args[0]
        if module is self.target:
            one.at, one.seen = module, args[0]
            raise Stop
        outer = self.frames[-1]
        key = (outer.key, module, outer.counts[module])
        outer.counts[module] += 1
        known = one.ended.get(key)
        result = known.result if known is not None and known.valid else self._computed(one, key, lambda: forward(*args, **kwargs))
        outer.inner.append(key)
        if module in self.outputs_of:
            one.outputs[module] = result
        return result

    def _computed(self, one: Replay, key: Key, forward: Callable[[], Any]) -> Any:
        """Run a module and remember what it returns instead of what its own submodules returned."""
        one.ended.pop(key, None)
        self.frames.append(_Frame(key))
        result = forward()
        for inner in self.frames.pop().inner:
            one.ended.pop(inner, None)
        one.ended[key] = Ended.of(result)
        return result


@contextmanager
def stopping(
    block: nn.Module,
    target: nn.Module | None,
    inputs_of: Collection[nn.Module] = (),
    outputs_of: Collection[nn.Module] = (),
) -> Iterator[Callable[[Replay], Any]]:
    """Have passes through `block` stop at `target`; yields what takes a pass up, `Runner.advance`."""
    runner = Runner(target, inputs_of, outputs_of)
    watched = {*runner.inputs_of, *runner.outputs_of, *([target] if target is not None else [])}
    modules = [m for m in block.modules() if m is not block and (m in watched or _has_matrix(m))]
    others = [m for m in watched if m not in set(modules)]  # a stand-in for experts' inputs is no submodule

    def stand_in(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        return lambda *args, **kwargs: runner.call(module, forward, args, kwargs)

    with replaced_forwards_of([*modules, *others], stand_in):
        yield runner.advance


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module is worth remembering: running it again multiplies by a matrix."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, model outputs included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
