"""The inputs of a chain of blocks, replaying one block, and which of its layers share an input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from compress.calib.stats import unfolding
from compress.errors import CompressError

FEW_TOKENS = 8  # through a whole model


class Stop(Exception):  # noqa: N818  (not an error)
    """Ends a forward pass that has shown what it was run for."""


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden state (its first positional or a keyword argument).

    None of them is a cache: a cache would grow with each replay, and keep keys and values of weights that have changed since.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: str | None = None  # the keyword that carries the hidden state, None when it is positional

    def __post_init__(self) -> None:
        assert not any(isinstance(value, Cache) for value in (*self.args, *self.kwargs.values())), "a cache is replayed"


@dataclass
class Chain:
    """What a chain of blocks is fed: the hidden state entering the first block and, for every block, its other arguments."""

    hidden: list[Tensor] = field(default_factory=list)  # [batch]
    calls: list[list[Call]] = field(default_factory=list)  # [batch][block]


def record(model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> Chain:
    """Run the model over the batches with every block replaced by a stand-in that notes its arguments.

    Costs the embeddings only. Raises when a block is not fed by the one before it: such a model is no chain.
    """
    chain = Chain()
    pool: list[Tensor] = []
    as_tuple = _returns_tuple(model, blocks, batches[0])
    _check_once(model, blocks, batches[0], as_tuple)
    for batch in batches:
        first, calls = _record_batch(model, blocks, batch, as_tuple)
        chain.hidden.append(first)
        chain.calls.append([_interned(call, pool) for call in calls])
    return chain


def _record_batch(
    model: nn.Module, blocks: Sequence[str], batch: Mapping[str, Tensor], as_tuple: bool, stops: bool = True
) -> tuple[Tensor, list[Call]]:
    """What enters the first block, and the calls of all; unless it `stops` there, the rest of the model is run, too."""
    calls: list[Call] = []
    first: list[Tensor] = []
    marker: list[Tensor] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split(args, kwargs)
            if len(calls) == len(blocks):
                raise _Again(name)
            if not isinstance(hidden, Tensor) or (marker and (hidden is not marker[0] or name != blocks[len(calls)])):
                raise CompressError(
                    f"Cannot follow {type(model).__name__} at {name}: its input is not the output of the block before it. "
                    "Only models whose blocks form one chain are supported."
                )
            calls.append(call)
            if not marker:
                first.append(hidden)
                marker.append(hidden.clone())
            if len(calls) == len(blocks) and stops:
                raise Stop
            return (marker[0],) if as_tuple else marker[0]

        return forward

    with replaced_forwards(model, blocks, stand_in):
        run_until_stop(lambda: model(**batch))
    if len(calls) != len(blocks):
        missed = blocks[len(calls)]
        raise CompressError(f"Cannot follow {type(model).__name__}: {missed} is never called in its forward pass.")
    return first[0], calls


def _returns_tuple(model: nn.Module, blocks: Sequence[str], batch: Mapping[str, Tensor]) -> bool:
    """Whether the model expects a tuple of its blocks: with the wrong answer the next block is not fed by the last."""
    try:
        _record_batch(model, blocks, batch, as_tuple=False)
        return False
    except (CompressError, IndexError, TypeError) as error:
        try:
            _record_batch(model, blocks, batch, as_tuple=True)
            return True
        except (CompressError, IndexError, TypeError):
            raise error from None


class _Again(Exception):  # noqa: N818  (not an error of ours)
    """A block is called once more, after all blocks were called."""


def _check_once(model: nn.Module, blocks: Sequence[str], batch: Mapping[str, Tensor], as_tuple: bool) -> None:
    """Raise for a model that runs its blocks more than once, as ALBERT does; seen on a few tokens, through the whole model."""
    few = {name: value[:1, :FEW_TOKENS] if value.ndim == 2 else value[:1] for name, value in batch.items()}
    try:
        _record_batch(model, blocks, few, as_tuple, stops=False)
    except _Again as again:
        raise CompressError(
            f"{type(model).__name__} runs {again} more than once in a forward pass, so that one weight has inputs of several "
            "depths, which calibration cannot follow. Use --method rtn, which needs none."
        ) from None
    except (CompressError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return  # what comes after the blocks does not take a stand-in's output


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call]:
    """The hidden state among a block's arguments, and the call without it; no cache is kept."""
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if args:
        return args[0], Call(args[1:], kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return kwargs[name], Call((), {k: v for k, v in kwargs.items() if k != name}, name)


@contextmanager
def replaced_forwards(model: nn.Module, names: Sequence[str], stand_in: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of the modules of these names by what `stand_in` makes of each name."""
    name_of = {model.get_submodule(name): name for name in names}
    with replaced_forwards_of(list(name_of), lambda module: stand_in(name_of[module])):
        yield


@contextmanager
def replaced_forwards_of(modules: Sequence[nn.Module], stand_in: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules by what `stand_in` makes of each."""
    own = {module: vars(module)["forward"] for module in modules if "forward" in vars(module)}  # rather than their class's
    try:
        for module in modules:
            module.forward = stand_in(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
            vars(module).update({"forward": own[module]} if module in own else {})


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks when done."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until_stop(forward: Callable[[], Any]) -> Any:
    """Run without gradients; None when a hook stopped the pass early."""
    try:
        with torch.no_grad():
            return forward()
    except Stop:
        return None


def _interned(call: Call, pool: list[Tensor]) -> Call:
    """The call with equal tensors shared: masks and rotary tables repeat over batches and blocks."""
    return Call(
        tuple(_map_tensors(a, lambda t: _shared(t, pool)) for a in call.args),
        {k: _map_tensors(v, lambda t: _shared(t, pool)) for k, v in call.kwargs.items()},
        call.hidden,
    )


def _shared(tensor: Tensor, pool: list[Tensor]) -> Tensor:
    for other in pool:
        if other is tensor or (other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor)):
            return other
    pool.append(tensor)
    return tensor


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, change) for k, v in value.items()}
    return value


def replay(block: nn.Module, hidden: Tensor, call: Call, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The block's first output for one batch; floating arguments are converted to `dtype`."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    args = tuple(_map_tensors(a, place) for a in call.args)
    kwargs = {k: _map_tensors(v, place) for k, v in call.kwargs.items()}
    if call.hidden is None:
        args = (place(hidden), *args)
    else:
        kwargs[call.hidden] = place(hidden)
    output = block(*args, **kwargs)
    first: Tensor = output[0] if isinstance(output, (tuple, ModelOutput)) else output
    return first


def subsets(block: nn.Module, names: Sequence[str], forward: Callable[[], Any]) -> list[tuple[str, ...]]:
    """The named layers of a block grouped by the input they read, in calling order, seen in one forward pass.

    Layers of one group share a Hessian; convolutions must also unfold alike. A layer that is not called as a module
    (its weight is used directly, or an expert was never chosen) appears in no group.
    """
    inputs: list[tuple[Tensor, Any]] = []  # kept alive, so that no two inputs can be the same object by accident
    groups: list[list[str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            geometry = unfolding(module)
            for (seen, other), group in zip(inputs, groups, strict=True):
                if seen is args[0] and other == geometry:
                    group.append(name)
                    return
            inputs.append((args[0], geometry))
            groups.append([name])

        return hook

    with hooks([block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]):
        run_until_stop(forward)
    first = {name: i for i, group in reversed([*enumerate(groups)]) for name in group}  # a layer called twice counts once
    return [kept for i, group in enumerate(groups) if (kept := tuple(n for n in dict.fromkeys(group) if first[n] == i))]
