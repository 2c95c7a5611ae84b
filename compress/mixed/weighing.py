"""How errors in layers' outputs weigh on the model's loss, for as many blocks at a time as memory holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.machine import free_memory
from compress.mixed import derivatives, gradients
from compress.models import Anatomy, Layer
from compress.progress import Track

CPU = torch.device("cpu")
DEFAULT = "Use --effort default, which does without."
LEFT_TO_SOLVERS = 2  # moments of waiting blocks take one of so many parts of the memory


@dataclass
class Weighing:
    """Backward passes of the dense model, each over all calibration data and for some blocks.

    `needed` is what a pass takes beside its moments, `passes` counts those that were done. Their number depends on the memory
    that is free, the moments do not.
    """

    device: torch.device
    track: Track
    needed: int
    passes: int = 0

    @staticmethod
    def of(
        model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], device: torch.device, track: Track
    ) -> Weighing:
        """Raises where the loss has no gradient, or a pass for the largest block does not fit in the memory that is free."""
        free, copied = free_memory(device), derivatives.copied_bytes(model, device)
        largest = max(_bytes(anatomy.of_block(name)) for name in anatomy.blocks)
        if copied + largest > free:
            raise CompressError(_refusal(device, free, copied, None, largest))
        goal = _objective(model, inputs)
        graph = gradients.graph_bytes(model, anatomy.layers, inputs, goal, device)
        if copied + graph + largest > free:
            raise CompressError(_refusal(device, free, copied, graph, largest))
        return Weighing(device, track, copied + graph)

    def moments(
        self, model: PreTrainedModel, blocks: Sequence[Sequence[Layer]], inputs: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Float[Tensor, "_ _"]]]:
        """The moments of the gradients in the outputs of every block's layers, block by block.

        Those of one pass wait for their turn; the next one begins when the first block is asked for whose are not there.
        """
        goal = _objective(model, inputs)
        start = 0
        while start < len(blocks):
            stop = start + self._fitting(blocks[start:])
            layers = list(itertools.chain(*blocks[start:stop]))
            found = self._pass(model, layers, inputs, goal, _doing(start, stop, len(blocks))) if layers else {}
            for block in blocks[start:stop]:
                yield {layer.name: found.pop(layer.name) for layer in block}
            start = stop

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say."""
        if self.passes <= 1:
            return ()
        return (f"Memory did not hold what gradients say about all blocks at once: that took {self.passes} backward passes.",)

    def _fitting(self, blocks: Sequence[Sequence[Layer]]) -> int:
        """How many of the blocks one pass can do: at least one."""
        room = min(free_memory(self.device) - self.needed, free_memory(CPU) // LEFT_TO_SOLVERS)
        count = 1
        while count < len(blocks) and _bytes(list(itertools.chain(*blocks[: count + 1]))) <= room:
            count += 1
        return count

    def _pass(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        inputs: Mapping[str, Tensor],
        goal: derivatives.Objective,
        doing: str,
    ) -> dict[str, Float[Tensor, "_ _"]]:
        self.passes += 1
        return gradients.output_moments(model, layers, inputs, goal, self.device, self.track, doing)


def _objective(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> derivatives.Objective:
    return derivatives.objective(model, inputs, asked="kl", instead=DEFAULT)


def _bytes(layers: Sequence[Layer]) -> int:
    """What the moments of layers take while they add up, the largest one twice."""
    sizes = [4 * layer.N**2 for layer in layers]
    return sum(sizes) + max(sizes, default=0)


def _doing(start: int, stop: int, total: int) -> str:
    part = "" if (start, stop) == (0, total) else f", blocks {start + 1} to {stop} of {total}"
    return f"weighing outputs by the loss{part}"


def _refusal(device: torch.device, free: int, copied: int, graph: int | None, moments: int) -> str:
    parts = [f"{copied / 1e9:.2f} for the model in float32"] if copied else []
    parts += ["more for the gradients of a batch" if graph is None else f"{graph / 1e9:.2f} for the gradients of a batch"]
    parts += [f"{moments / 1e9:.2f} for what they say about the largest block"]
    least = (copied + (graph or 0) + moments) / 1e9
    return (
        f"--effort best needs {'more than ' if graph is None else ''}{least:.2f} GB of free memory on {device}: "
        f"{', '.join(parts)}. There are {free / 1e9:.2f}. {DEFAULT}"
    )
