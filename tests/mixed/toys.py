"""Models whose derivatives are known or can be had by brute force, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from compress.mixed.derivatives import Objective
from compress.models import Layer, matrix

CPU = torch.device("cpu")


class Toy(PreTrainedModel):
    """Any module behind the interface of a model."""

    main_input_name = "x"

    def __init__(self, body: nn.Module) -> None:
        super().__init__(PreTrainedConfig())
        self.body = body.double()

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.body(x))


def toy(*modules: nn.Module) -> Toy:
    return Toy(nn.Sequential(*modules)).eval()


def layers_of(model: nn.Module) -> list[Layer]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [Layer(name, "conv2d" if isinstance(m, nn.Conv2d) else "linear", *matrix(m).shape) for name, m in found]


def objective(loss: Callable[[Tensor], Tensor], **given) -> Objective:
    """A loss of the model's output, the mean over samples."""

    def of(model, batch, _draw):
        return loss(model(**batch)["logits"])

    return Objective(of, of, lambda _model, batch, _outputs: len(batch["x"]), **given)


def quadratic(A: Tensor) -> tuple[Toy, Objective]:
    """A layer with one input, always 1, whose weight w costs w^T A w / 2."""
    model = toy(nn.Linear(1, len(A), bias=False))
    return model, objective(lambda out: 0.5 * ((out @ A) * out).sum(1).mean())


def symmetric(size: int, *, seed: int = 0) -> Tensor:
    A = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return A + A.t()


def exact_hessian(model: Toy, layer: Layer, inputs: dict[str, Tensor], objective: Objective) -> Tensor:
    """The block of one layer, by the reference implementation."""
    name = f"{layer.name}.weight"
    weight = model.get_parameter(name)

    def loss(flat: Tensor) -> Tensor:
        def run(**batch: Tensor) -> ModelOutput:
            return torch.func.functional_call(model, {name: flat.view_as(weight)}, kwargs=batch)

        return objective.curved(run, inputs, objective.draw())

    return torch.autograd.functional.hessian(loss, weight.detach().flatten())
