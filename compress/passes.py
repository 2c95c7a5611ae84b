"""The forward passes of calibration data through one block of the model, from layer to layer."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from compress import experts
from compress.calib import capture
from compress.calib.capture import Chain
from compress.calib.replay import Replay, stopping
from compress.calib.residual import Source
from compress.calib.stats import DriftSum, HessianSum, LayerStats, Seen, rows_of
from compress.errors import CompressError
from compress.machine import free_memory
from compress.models import matrix

Sum = TypeVar("Sum", bound=HessianSum)

COPIES = 4  # of an expert's Hessian and of its weights there are while it is solved, at most
AT_ONCE = 2 << 30  # bytes of them that are held for many experts: what fills a GPU, and a CPU needs no more


class Passes:
    """The forward passes of all calibration batches through one block, taken together from layer to layer.

    A pass that stopped at a layer remembers what the layers before it returned; once that would take a quarter of the free
    memory, passes of further batches are forgotten at each layer, and start again from the block's input for the next. `name` is
    the block's.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        chain: Chain,
        index: int,
        masks: Sequence[Bool[Tensor, "_ T"] | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.block, self.chain, self.index, self.masks = name, block, chain, index, masks
        self.device, self.dtype = device, dtype
        self.stopped: dict[int, Replay] = {}  # by batch
        self.dense: Passes | None = None  # of the dense block, where the dense model runs along
        self.sources: Mapping[str, Source] = {}  # by layer, what its output is added to

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.clear()

    def watch(self, sources: Mapping[str, Source]) -> None:
        """Compare what layers' outputs are added to with the dense model's, too."""
        self.sources = sources
        if self.dense is not None:
            self.dense.sources = sources

    def first(self) -> Tensor:
        """The first batch, through the whole block."""
        return self._forward(0)

    def _forward(self, batch: int) -> Tensor:
        call = self.chain.calls[batch][self.index]
        return capture.replay(self.block, self.chain.hidden[batch], call, self.device, self.dtype)

    def _pass(self, batch: int) -> Replay:
        return self.stopped.pop(batch, None) or Replay(lambda: self._forward(batch))

    def stats(self, order: Sequence[tuple[str, ...]]) -> Iterator[Iterator[tuple[tuple[str, ...], LayerStats]]]:
        """What reaches layers, given in calling order and those of one input together, everything before them as it is by then.

        It comes input by input, but for many experts at once: for as many as have room in AT_ONCE, and in a quarter of the free
        memory. All that comes at once is to be taken before more is asked for.
        """
        for _, known_together in itertools.groupby(order, lambda subset: experts.known_at(self.block, subset[0])[0]):
            left = list(known_together)
            while left:
                taken = left[: self._fitting(left)]
                left = left[len(taken) :]
                yield zip(taken, self._stats([layer for layer, *_ in taken]), strict=True)

    def _fitting(self, subsets: Sequence[tuple[str, ...]]) -> int:
        """How many of the experts' layers to take at once, so that all turns are about as large."""
        if len(subsets) == 1:
            return 1
        largest = COPIES * torch.float32.itemsize * max(self._elements(subset) for subset in subsets)
        room = max(1, min(free_memory(self.device) // 4, AT_ONCE) // largest)
        turns = -(-len(subsets) // room)
        return -(-len(subsets) // turns)

    def _elements(self, subset: tuple[str, ...]) -> int:
        """Of the Hessian of layers with one input, and of their weights."""
        weights = [matrix(self.block.get_submodule(layer)) for layer in subset]
        return weights[0].shape[1] ** 2 + sum(W.numel() for W in weights)

    def _stats(self, layers: Sequence[str]) -> Iterator[LayerStats]:
        """Of layers whose inputs are known at once."""
        sums = {layer: self._sums(self.block.get_submodule(layer), layer in self.sources) for layer in layers}
        with closing(self._beside(layers[0])) as passes:
            for batch, (mine, dense) in enumerate(passes):
                mask, shape = self.masks[batch], self.chain.hidden[batch].shape
                for layer, (module, total, moved) in sums.items():
                    seen = self._seen(layer, mine)
                    if seen.x is not None:
                        total.add(rows_of(seen.x, module, mask))
                    if self.dense is not None and dense is not None and not moved.selected:
                        moved.add(seen, self.dense._seen(layer, dense), module, mask, shape)
        for layer in layers:
            _, total, moved = sums.pop(layer)
            stats = _finite(total, f"{self.name}.{layer}" if self.name else layer).stats()
            drift, notes = moved.drift() if self.dense is not None else (None, ())
            yield replace(stats, drift=drift, notes=notes)

    def _sums(self, module: nn.Module, added: bool) -> tuple[nn.Module, HessianSum, DriftSum]:
        W = matrix(module).detach()
        return module, HessianSum(W.shape[1], self.device), DriftSum(self.device, W if added and self.dense is not None else None)

    def _beside(self, layer: str) -> Generator[tuple[Replay, Replay | None], None, None]:
        """The passes of all batches as they wait where the input of a layer is known, and those of the dense block, if any."""
        with closing(self._reached(experts.known_at(self.block, layer)[0])) as mine:
            if self.dense is None:
                yield from ((one, None) for one in mine)
                return
            with closing(self.dense._reached(experts.known_at(self.dense.block, layer)[0])) as dense:
                yield from zip(mine, dense, strict=True)

    def feed(self, module: nn.Module, total: Sum, name: str) -> Sum:
        """Add all inputs that reach `module` to `total`, and return it; `name` is for errors."""
        for one, mask in zip(self._reached(module), self.masks, strict=True):
            if one.seen is not None:
                total.add(rows_of(one.seen, module, mask))
        return _finite(total, name)

    def _seen(self, layer: str, one: Replay) -> Seen:
        """What a layer has to do with in a pass that waits where its input is known."""
        number, source = experts.known_at(self.block, layer)[1], self.sources.get(layer)
        x = one.seen if one.seen is None or number is None else one.seen.of(number)
        return Seen(x, None if source is None else self._sum(source, one))

    def _sum(self, source: Source, one: Replay) -> Tensor | None:
        """What a layer's output is added to in a pass that waits at it; None where that was not passed."""
        y = one.inputs.get(self.block.get_submodule(source.input_of))
        if y is None or source.output_of is None:
            return y
        return y + one.outputs[self.block.get_submodule(source.output_of)]

    def _reached(self, module: nn.Module) -> Generator[Replay, None, None]:
        """The pass of every batch, stopped at `module` with its input in `seen`; at its end, with None, if that is not called."""
        budget = free_memory(self.device) // 4
        inputs_of = {self.block.get_submodule(one.input_of) for one in self.sources.values()}
        outputs_of = {self.block.get_submodule(one.output_of) for one in self.sources.values() if one.output_of is not None}
        with stopping(self.block, module, inputs_of, outputs_of) as advance:
            for batch in range(len(self.masks)):
                one = self._pass(batch)
                experts.keep(self.block, self.masks[batch])
                if one.at is not module:
                    advance(one)
                yield one
                if one.at is module:
                    budget -= one.nbytes + one.seen.nbytes
                    if budget > 0:
                        self.stopped[batch] = one

    def outputs(self) -> list[Tensor]:
        """The block's output for every batch."""
        outputs = []
        with stopping(self.block, None) as advance:
            for batch, mask in enumerate(self.masks):
                one = self._pass(batch)
                experts.keep(self.block, mask)
                advance(one)
                assert one.output is not None
                outputs.append(one.output)
        return outputs


def _finite(total: Sum, name: str) -> Sum:
    if not torch.isfinite(total.lower).all():
        raise CompressError(
            f"The inputs of {name} are NaN or infinite on the calibration data. Check the model's weights, or run it "
            "in a wider type with --dtype float32."
        )
    return total
