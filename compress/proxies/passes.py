"""Passes of data through the dense model for the statistics that no other search needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calib.capture import hooks
from compress.calib.stats import rows_of
from compress.mixed import hessian
from compress.mixed.derivatives import WITHOUT, WITHOUT_SECOND, Objective, check_reached, differentiable, evaluate, placed
from compress.models import Layer, weight_of
from compress.sequential import batches_of

TOKENS_PER_IMAGE = 32
POSITIONS = 32  # of text that is all ones
PROBES = 8


@dataclass(frozen=True)
class Moments:
    """What the calibration data makes of a layer: mean squares of its input features, and the spread of its output.

    `gram` holds the inner products of the outputs for the first batch's samples, [samples, samples]; None where it does not
    see each of them.
    """

    input: Float[Tensor, "K"]
    spread: float
    gram: Float[Tensor, "B B"] | None


def gradients(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> dict[str, Tensor]:
    """The gradient of the mean loss by every layer's weight."""
    draw, total = objective.draw(), 0
    with differentiable(model, layers, device) as (work, weights):
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in batches_of(inputs):
            value, count = evaluate(work, objective.loss, placed(batch, work), draw, objective.predictions)
            made = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(weights, made, strict=True):
                found[name].add_(gradient, alpha=count)
            total += count
        check_reached({name: one.abs().sum().item() for name, one in found.items()}, work, "gradient", WITHOUT)
    return {name: one / total for name, one in found.items()}


def diagonals(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
    objective: Objective,
    device: torch.device,
    *,
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of every layer's block of the Hessian of the mean loss: the mean of z * (H z) over random signs z.

    Noise of the other entries of a row is left in each; their sum is Hutchinson's estimate of the trace (arXiv
    2006.00719). Raises for losses without a second derivative.
    """
    generator, draw, total = torch.Generator().manual_seed(seed), objective.draw(), 0
    with differentiable(model, layers, device) as (work, weights):
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in batches_of(inputs, hessian.TOKENS_AT_A_TIME):
            entries, count = hessian.probed(work, weights, placed(batch, work), objective, draw, probes, generator)
            for entry in entries:
                for name, value in entry.items():
                    found[name].add_(value, alpha=count / probes)
            total += count
        check_reached({name: one.abs().sum().item() for name, one in found.items()}, work, "second derivative", WITHOUT_SECOND)
    return {name: one / total for name, one in found.items()}


def virtual_gradients(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], device: torch.device, *, positive: bool = False
) -> dict[str, Tensor]:
    """The gradient of the sum of all outputs for an input of ones: a picture of ones, or text whose embeddings are ones.

    `positive` makes all parameters their magnitudes first (Synflow, arXiv 2006.05467), and works in float64, as the authors do.
    """
    if positive:
        model = copy.deepcopy(model).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
    with differentiable(model, layers, device) as (work, weights):
        outputs = work(**_ones(work, inputs))
        logits = outputs.get("logits")
        total = (outputs[0] if logits is None else logits).sum()
        found = torch.autograd.grad(total, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def _ones(work: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if work.main_input_name == "pixel_values":
        return {"pixel_values": torch.ones_like(inputs["pixel_values"][:1], dtype=work.dtype, device=work.device)}
    positions = min(POSITIONS, inputs["input_ids"].shape[1])
    features = weight_of(work.get_input_embeddings()).shape[1]
    return {"inputs_embeds": torch.ones(1, positions, features, dtype=work.dtype, device=work.device)}


def moments(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], device: torch.device
) -> dict[str, Moments]:
    """Moments of every layer's inputs and outputs; padding counts."""
    with differentiable(model, (), device) as (work, _):
        watched = {layer.name: _Watched(layer.K) for layer in layers}
        handles = [work.get_submodule(name).register_forward_hook(one.note) for name, one in watched.items()]
        with hooks(handles), torch.no_grad():
            for batch in batches_of(inputs):
                for one in watched.values():
                    one.samples = len(next(iter(batch.values())))
                work(**{name: value for name, value in placed(batch, work).items() if name != "labels"})
    return {name: one.moments() for name, one in watched.items()}


class _Watched:
    """Sums over the calls of one layer."""

    def __init__(self, K: int) -> None:
        self.input, self.rows = torch.zeros(K, dtype=torch.float64), 0
        self.sum, self.squares, self.count = 0.0, 0.0, 0
        self.samples = 0
        self.gram: Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = rows_of(args[0], module)
        self.input += rows.square().sum(0, dtype=torch.float64).cpu()
        self.rows += len(rows)
        self.sum += output.sum(dtype=torch.float64).item()
        self.squares += output.square().sum(dtype=torch.float64).item()
        self.count += output.numel()
        if self.gram is None and output.numel() and output.numel() % self.samples == 0:
            features = output.reshape(self.samples, -1)
            self.gram = (features @ features.t()).double().cpu()

    def moments(self) -> Moments:
        mean = self.sum / max(self.count, 1)
        variance = self.squares / max(self.count, 1) - mean**2
        return Moments((self.input / max(self.rows, 1)).float(), max(variance, 0.0) ** 0.5, self.gram)


def overlaps(found: Mapping[str, Moments]) -> dict[str, float]:
    """The mean similarity of a layer's outputs to those of every other layer, ||F_j^T F_i||^2 / (||F_i^T F_i|| ||F_j^T F_j||).

    The matrix of OMPQ (arXiv 2109.07865), from inner products of samples instead of features. A layer that does not see every
    sample, as an expert, counts as similar to none.
    """
    grams = {name: one.gram for name, one in found.items() if one.gram is not None and one.gram.norm() > 0}
    unit = {name: gram / gram.norm() for name, gram in grams.items()}
    result = dict.fromkeys(found, 0.0)
    for name, own in unit.items():
        others = [(own * other).sum().item() for at, other in unit.items() if at != name and other.shape == own.shape]
        result[name] = sum(others) / max(len(others), 1)
    return result


def taken(inputs: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The first samples, of so many tokens together, or an image for every 32 of them; at least one."""
    ids = inputs.get("input_ids")
    return _samples(inputs, max(1, tokens // (TOKENS_PER_IMAGE if ids is None else ids.shape[1])))


def _samples(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: value[:count] for name, value in inputs.items()}
