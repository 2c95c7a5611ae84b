"""Gradients of a model's loss, one of every mini-batch, layer by layer: in memory while they are few, else on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from compress.calib.capture import hooks
from compress.errors import CompressError
from compress.fisher.losses import Draw, Loss
from compress.models import Layer, weight_of

MEMORY = 1 << 30  # bytes of gradients that are kept in memory
STORED = torch.bfloat16


@dataclass(frozen=True)
class Gradients:
    """For every layer m gradients of its matrix W, flattened, with zeros for pruned weights; the sums of their squares."""

    of: Mapping[str, Float[Tensor, "m d"]]
    squares: Mapping[str, float]
    live: int  # weights that are not pruned, of all layers

    @property
    def mean_square(self) -> float:
        """The mean of the Fisher's diagonal over live weights."""
        count = len(next(iter(self.of.values())))
        return sum(self.squares.values()) / (count * max(self.live, 1))

    @property
    def unreached(self) -> list[str]:
        """The layers that the loss does not reach: all of their gradients are zero."""
        return [name for name, square in self.squares.items() if square == 0]


@contextmanager
def collect(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    keep: Mapping[str, Bool[Tensor, "_N _K"]],
    inputs: Mapping[str, Tensor],
    loss: Loss,
    draw: Draw,
    *,
    count: int,
    batch: int,
    spill: Path | None = None,
    memory: int = MEMORY,
) -> Iterator[Gradients]:
    """Take `count` gradients, each of the mean loss of `batch` samples drawn without replacement, for the weights in `keep`.

    The gradients of pruned weights are set to zero, which decouples these in the Fisher. A layer's gradient is stored and
    freed as soon as the backward pass has made it. Beyond `memory` bytes they go to files in a temporary folder in `spill`,
    by default where the system puts such things; it is gone when the context ends. Only the layers' weights, of all the
    model's parameters, will require gradients afterwards.
    """
    samples = len(next(iter(inputs.values())))
    if samples < count * batch:
        raise CompressError(
            f"{count} gradients of {batch} samples need {count * batch} samples, and there are {samples}. "
            f"Use --samples {count * batch}, or --gradients {samples // batch}."
        )
    size = count * STORED.itemsize * sum(layer.N * layer.K for layer in layers)
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(spill, size)) if size > memory else None
        stored = {layer.name: _matrix(folder, i, count, layer.N * layer.K) for i, layer in enumerate(layers)}
        squares = _fill(model, layers, keep, _batches(inputs, count, batch, draw), loss, draw, stored)
        yield Gradients(stored, squares, sum(int(keep[layer.name].sum()) for layer in layers))


def _fill(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    keep: Mapping[str, Tensor],
    batches: Iterator[Mapping[str, Tensor]],
    loss: Loss,
    draw: Draw,
    stored: Mapping[str, Tensor],
) -> dict[str, float]:
    """Run the backward passes; the sums of the squared gradients, by layer."""
    squares = dict.fromkeys(stored, 0.0)
    row = 0

    def store(layer: Layer) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = (weight.grad.t() if layer.kind == "conv1d" else weight.grad).reshape(layer.N, layer.K)
            gradient = gradient * keep[layer.name]
            squares[layer.name] += gradient.square().sum(dtype=torch.float64).item()
            stored[layer.name][row] = gradient.flatten().to("cpu", STORED)
            weight.grad = None

        return hook

    wanted = {id(weight_of(model.get_submodule(layer.name))): layer for layer in layers}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    weights = [parameter for parameter in model.parameters() if id(parameter) in wanted]
    with hooks([w.register_post_accumulate_grad_hook(store(wanted[id(w)])) for w in weights]), torch.enable_grad():
        for one in batches:
            value = loss(model, {name: tensor.to(model.device) for name, tensor in one.items()}, draw)
            if not torch.isfinite(value):
                raise CompressError("The loss is NaN or infinite on the calibration data. Check the model and the data.")
            value.backward()
            row += 1
    return squares


def _batches(inputs: Mapping[str, Tensor], count: int, batch: int, draw: Draw) -> Iterator[Mapping[str, Tensor]]:
    samples = len(next(iter(inputs.values())))
    order = torch.randperm(samples, generator=draw.generator)[: count * batch]
    for taken in order.split(batch):
        yield {name: tensor[taken] for name, tensor in inputs.items()}


def _matrix(folder: Path | None, number: int, count: int, numel: int) -> Float[Tensor, "m d"]:
    if folder is None:
        return torch.zeros(count, numel, dtype=STORED)
    flat = torch.from_file(str(folder / str(number)), shared=True, size=count * numel, dtype=STORED)
    return flat.view(count, numel)


@contextmanager
def _folder(spill: Path | None, size: int) -> Iterator[Path]:
    """A folder that ends with the context; raises where it has no room, for a full disk kills a mapped write."""
    place = spill or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise CompressError(f"Gradients cannot be stored in {place}: there is no such folder.")
    if size > (free := shutil.disk_usage(place).free):
        raise CompressError(
            f"The gradients need {size / 1e9:.1f} GB on disk, and {place} has {free / 1e9:.1f} GB free. "
            "Use fewer gradients, or set TMPDIR to a larger disk."
        )
    with tempfile.TemporaryDirectory(prefix="compress-gradients-", dir=place) as folder:
        yield Path(folder)
