"""Whether a rotation helps: how far rounding alone takes a model's predictions, with it and without."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import evaluate
from compress.errors import CompressError
from compress.models import Anatomy, from_matrix, weight_of
from compress.qtensor import dense
from compress.sequential import Settings, batches_of, finite_weight, walk
from compress.solvers import solve
from compress.spec import Plan

CLEARLY = 0.95  # a smaller gain of rounding says nothing of what solvers gain: +-1 % on the reference model, at 4, 3 and 2 bits
INEXACT = 0.02  # nats; in bfloat16 a rotated model is 0.0003 from its own


@dataclass(frozen=True)
class Judgement:
    """KL to the dense model in nats per token: rounded to nearest as it is and rotated, and rotated alone."""

    plain: float
    rotated: float
    alone: float
    tokens: int

    @property
    def helps(self) -> bool:
        return self.rotated < CLEARLY * self.plain

    def __str__(self) -> str:
        chosen = "Rotated" if self.helps else "Not rotated"
        return (
            f"{chosen}: of {self.tokens:,} calibration tokens, rounding to nearest alone takes the predictions "
            f"{self.plain:.4f} nats (KL) from the dense model's, and {self.rotated:.4f} after rotation, which by itself "
            f"takes them {max(self.alone, 0.0):.1g}."
        )


def judge(
    model: PreTrainedModel,
    turned: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    settings: Settings,
) -> Judgement:
    """Compare a model and its rotated copy on the first batch of `inputs`, one block of either in memory at a time."""
    few = batches_of(inputs)[0]
    base = _hidden(model, anatomy, few, None, settings), _tail(model, settings)

    def distance(of: PreTrainedModel, rounded: Plan | None) -> float:
        hidden, tail = _hidden(of, anatomy, few, rounded, settings), _tail(of, settings)
        parts = zip(hidden.split(evaluate.ROWS_AT_A_TIME), base[0].split(evaluate.ROWS_AT_A_TIME), strict=True)
        with torch.no_grad():
            return sum(evaluate.distance(tail(rows), base[1](base_rows))[0] * len(rows) for rows, base_rows in parts) / len(
                hidden
            )

    plain, rotated, alone = distance(model, plan), distance(turned, plan), distance(turned, None)
    if not alone <= INEXACT:
        raise CompressError(
            f"{type(model).__name__} predicts something else once it is rotated ({alone:.2g} nats of KL): it does something "
            "between its layers that rotation does not know of. Leave out --rotate."
        )
    return Judgement(plain, rotated, alone, len(base[0]))


def _hidden(
    model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], plan: Plan | None, settings: Settings
) -> Float[Tensor, "M K"]:
    """What leaves the last block, a row per token, with the layers of a plan rounded to nearest or with none."""
    hidden: list[Tensor] = []
    with closing(walk(model, anatomy, inputs, settings)) as blocks:
        for name, block, passes in blocks:
            assert passes is not None
            if plan is not None:
                _round(block, name, anatomy, plan, settings)
            if name == anatomy.blocks[-1]:
                hidden = passes.outputs()
    rows = torch.cat(hidden)
    return rows[inputs["attention_mask"].bool()] if "attention_mask" in inputs else rows.flatten(0, 1)


def _round(block: nn.Module, name: str, anatomy: Anatomy, plan: Plan, settings: Settings) -> None:
    for layer in anatomy.of_block(name):
        if not (spec := plan.layers[layer.name]).dense:
            module = block.get_submodule(layer.name.removeprefix(f"{name}."))
            W = finite_weight(module, layer).clone()
            rounded = dense(solve(W, None, spec, settings.stored, settings.options))
            with torch.no_grad():
                weight_of(module).copy_(from_matrix(rounded, layer.kind, weight_of(module).shape))


def _tail(model: PreTrainedModel, settings: Settings) -> nn.Module:
    """From hidden states to logits, for one of the models that can be rotated."""
    norm, head = model.base_model.get_submodule("norm"), model.get_output_embeddings()
    assert head is not None
    return nn.Sequential(copy.deepcopy(norm), copy.deepcopy(head)).to(settings.device, settings.dtype)
