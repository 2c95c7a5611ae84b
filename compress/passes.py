"""The forward passes of calibration data through one block of the model, from layer to layer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from compress import experts
from compress.calib import capture
from compress.calib.capture import Chain
from compress.calib.residual import Source
from compress.calib.stats import DriftSum, HessianSum, LayerStats, Seen, rows_of
from compress.calib.stepwise import Stepwise, keep_input, keep_output, pause_at
from compress.errors import CompressError
from compress.models import free_memory, matrix

Sum = TypeVar("Sum", bound=HessianSum)

HELD_PER_INPUT = 3  # a paused pass holds a few tensors as large as the block's input and the paused layer's


class Passes:
    """The forward passes of all calibration batches through one block, taken together from layer to layer.

    A pass that pauses at a layer holds its activations; once these would take a quarter of the free memory, the passes of
    further batches are given up at each layer and start again from the block's input for the next.
    """

    def __init__(
        self,
        block: nn.Module,
        chain: Chain,
        index: int,
        masks: Sequence[Bool[Tensor, "B T"] | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block, self.chain, self.index, self.masks, self.device, self.dtype = block, chain, index, masks, device, dtype
        self.paused: dict[int, Stepwise] = {}
        self.dense: Passes | None = None  # of the dense block, where the dense model runs along
        self.sources: Mapping[str, Source] = {}  # by layer, what its output is added to

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.paused.values():
            one.cancel()
        self.paused.clear()

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

    def _pass(self, batch: int) -> Stepwise:
        return self.paused.pop(batch, None) or Stepwise(lambda: self._forward(batch))

    def stats(self, layer: str, name: str) -> LayerStats:
        """What reaches a layer of the block, everything before it as it is now; layers come in calling order.

        `name` is for errors.
        """
        module = self.block.get_submodule(layer)
        K = matrix(module).shape[1]
        if self.dense is None:
            return self.feed(module, HessianSum(K, self.device), name).stats()
        W = matrix(module).detach() if layer in self.sources else None
        total, moved = HessianSum(K, self.device), DriftSum(self.device, W)
        with closing(self.dense.seen(layer)) as dense:
            for batch, mine in enumerate(self.seen(layer)):
                if mine.x is not None:
                    total.add(rows_of(mine.x, module, self.masks[batch]))
                moved.add(mine, next(dense), module, self.masks[batch], self.chain.hidden[batch].shape)
        drift, notes = moved.drift()
        return replace(_finite(total, name).stats(), drift=drift, notes=notes)

    def feed(self, module: nn.Module, total: Sum, name: str) -> Sum:
        """Add all inputs that reach `module` to `total`, and return it; `name` is for errors."""
        for (x, _), mask in zip(self._reached(module), self.masks, strict=True):
            if x is not None:
                total.add(rows_of(x, module, mask))
        return _finite(total, name)

    def seen(self, layer: str) -> Generator[Seen, None, None]:
        """What a layer has to do with in every batch; the passes then wait there."""
        source = self.sources.get(layer)
        for x, one in self._reached(self.block.get_submodule(layer)):
            yield Seen(x, None if source is None else self._sum(source, one))

    def _sum(self, source: Source, one: Stepwise) -> Tensor | None:
        """What a layer's output is added to in a pass that waits at it; None where that was not passed."""
        y = one.inputs.get(self.block.get_submodule(source.input_of))
        if y is None or source.output_of is None:
            return y
        return y + one.outputs[self.block.get_submodule(source.output_of)]

    def _reached(self, module: nn.Module) -> Generator[tuple[Tensor | None, Stepwise], None, None]:
        """The input of `module` for every batch, None where it is not called, and the pass, which waits there."""
        budget = free_memory(self.device) // 4
        with capture.hooks([pause_at(module), *self._keeping()]):
            for batch in range(len(self.masks)):
                one = self._pass(batch)
                experts.keep(self.block, self.masks[batch])
                try:
                    x = one.advance()
                    yield x, one
                    if x is not None:
                        budget -= HELD_PER_INPUT * (x.nbytes + self.chain.hidden[batch].nbytes)
                        if budget > 0:
                            self.paused[batch] = one
                finally:  # after an interruption, too, no thread may run on while the process ends
                    if self.paused.get(batch) is not one:
                        one.cancel()

    def _keeping(self) -> Iterator[Any]:
        """Hooks that keep what outputs are added to."""
        yield from (keep_input(self.block.get_submodule(name)) for name in {one.input_of for one in self.sources.values()})
        named = {one.output_of for one in self.sources.values()}
        yield from (keep_output(self.block.get_submodule(name)) for name in named if name is not None)

    def outputs(self) -> list[Tensor]:
        """The block's output for every batch."""
        outputs = []
        for batch, mask in enumerate(self.masks):
            one = self._pass(batch)
            experts.keep(self.block, mask)
            try:
                one.advance()
            finally:
                one.cancel()
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
