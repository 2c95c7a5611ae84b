"""What the derivatives of a model's loss need: the loss, once and twice differentiable, and the model in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calib.capture import hooks
from compress.errors import CompressError
from compress.fisher import losses
from compress.fisher.losses import Draw, Loss
from compress.models import Layer, weight_of

Count = Callable[[PreTrainedModel, Mapping[str, Tensor], Mapping[str, Tensor]], int]
WITHOUT = "Methods kl and interlayer need no derivative."
WITHOUT_SECOND = f"Methods fisher and output need only the gradient. {WITHOUT}"


@dataclass(frozen=True)
class Objective:
    """A mean loss to be differentiated once, `loss`, or twice, `curved`; and of how many predictions each is the mean.

    `predictions` counts them for a batch and what the model made of it. All randomness of a pass over the data comes from
    `seed`, so that every pass sees the same function. `instead` is what to do where it has no gradient.
    """

    loss: Loss
    curved: Loss
    predictions: Count
    mask_token: int | None = None
    seed: int = 0
    instead: str = WITHOUT

    def draw(self) -> Draw:
        return Draw(torch.Generator().manual_seed(self.seed), self.mask_token)


def objective(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    mask_token: int | None = None,
    asked: str | None = None,
    seed: int = 0,
    instead: str = WITHOUT,
) -> Objective:
    """The objective of a loss by name, by default the one that suits the model and the data.

    For kl the gradients are those of sampled labels, whose second moment is the Hessian of the divergence, and second
    derivatives those of the divergence itself; any model has it, with labels or without.
    """
    name = losses.choose(model, inputs, mask_token, asked)
    loss = losses.LOSSES[name]
    curved = losses.divergence if name == "kl" else loss
    return Objective(loss, curved, partial(losses.predictions, name), mask_token, seed, instead)


def copied_bytes(model: PreTrainedModel, device: torch.device) -> int:
    """What the model takes on `device` while it is `differentiable`: nothing where it is there and in float32 already."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    there = all(parameter.dtype == dtype and parameter.device.type == device.type for parameter in model.parameters())
    return 0 if there else dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def differentiable(
    model: PreTrainedModel, layers: Sequence[Layer], device: torch.device
) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor]]]:
    """The model on `device` and the weights of `layers`, its only parameters that require gradients until the context ends.

    In float32, or float64 where it is in that: the model itself where it is so already, else a copy.
    """
    work = copy.deepcopy(model) if copied_bytes(model, device) else model
    nn.Module.to(work, device, torch.promote_types(model.dtype, torch.float32))
    required = [(parameter, parameter.requires_grad) for parameter in work.parameters()]
    weights = {layer.name: weight_of(work.get_submodule(layer.name)) for layer in layers}
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        yield work, weights
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)


def placed(batch: Mapping[str, Tensor], work: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.to(work.device, work.dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()}


def evaluate(
    work: PreTrainedModel, loss: Loss, batch: Mapping[str, Tensor], draw: Draw, predictions: Count, instead: str = WITHOUT
) -> tuple[Tensor, int]:
    """The mean loss of a batch, with its graph, and the number of predictions.

    Raises for a loss without a gradient, and says what to do `instead`.
    """
    outputs: list[Mapping[str, Tensor]] = []

    def note(_module: nn.Module, _args: object, output: Mapping[str, Tensor]) -> None:
        outputs.append(output)

    with hooks([work.register_forward_hook(note)]), torch.enable_grad():
        value = loss(work, batch, draw)
    if not torch.isfinite(value):
        raise CompressError("The loss is NaN or infinite on the calibration data. Check the model and the data.")
    if not value.requires_grad:
        raise CompressError(f"The loss of {type(work).__name__} is not differentiable. {instead}")
    return value, predictions(work, batch, outputs[0])


def check_reached(found: Mapping[str, float], work: PreTrainedModel, derivative: str, instead: str) -> None:
    """Raise where a derivative is zero for all layers."""
    if not any(found.values()):
        raise CompressError(
            f"The {derivative} of {type(work).__name__}'s loss on the calibration data is zero for all layers. {instead}"
        )
