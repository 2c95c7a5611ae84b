"""Gradual pruning with fine-tuning in between: zeros grow by a cubic schedule, and the dense model teaches what is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.models import Anatomy, from_matrix, matrix, weight_of
from compress.progress import Track, silent
from compress.qtensor import Pruned, dense
from compress.sequential import Settings, SolvedBlock, SolvedLayer, batches_of
from compress.spec import LayerSpec, Plan

ROUNDS = 4  # of pruning and fine-tuning, where the pattern lets zeros grow
FIRST_SPARSITY = 0.5  # of the final one, in the first round
LEARNING_RATE = 0.01  # of a layer's root mean square weight; on the reference model at 70 % KL falls 0.70 -> 0.38 in 96 steps
TEMPERATURE = 2.0  # of the oBERT recipes (arXiv 2203.07259)

Prune = Callable[[PreTrainedModel, Plan], Iterable[SolvedBlock]]


def gradual(
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    settings: Settings,
    prune: Prune,
    steps: int,
    seed: int,
    track: Track = silent,
) -> Iterator[SolvedBlock]:
    """The blocks of a model that was pruned to `plan` in rounds and fine-tuned for `steps` steps in all.

    After the oBERT recipe: sparsities follow a cubic schedule, masks stay fixed between rounds, and the pruned layers' weights
    learn the dense model's predictions by KL at a temperature (of a model without logits, its hidden states by squared
    distance), on mini-batches of `inputs`. Holds the dense model and a float32 copy with gradients; the model is not changed.
    """
    if any(spec.scheme for spec in plan.layers.values()):
        raise CompressError("Fine-tuning moves weights off the grid; leave out --bits, and quantize the result.")
    student, teacher = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    nn.Module.to(student, settings.device, torch.float32)
    nn.Module.to(teacher, settings.device, settings.dtype)
    batches, rounds = _endless(inputs, seed, settings.device), schedule(plan)
    numbers = iter(track(range(steps), steps, "fine-tuning"))
    for i, at in enumerate(rounds):
        specs, masks = _prune_into(student, prune(student, at))
        share = steps * (i + 1) // len(rounds) - steps * i // len(rounds)
        _train(student, teacher, masks, batches, itertools.islice(numbers, share), share)
    for _ in numbers:  # lets a progress bar end
        pass
    return _blocks(model, student, anatomy, specs, settings.stored)


def schedule(plan: Plan) -> list[Plan]:
    """The plans of all rounds: s(t) = s (1 - (1 - first)(1 - t)^3); only the last one where an N:M pattern fixes the zeros."""
    if any(spec.sparsity and spec.sparsity.nm for spec in plan.layers.values()):
        return [plan]
    shares = [1 - (1 - FIRST_SPARSITY) * (1 - i / (ROUNDS - 1)) ** 3 for i in range(ROUNDS)]
    return [Plan({name: _scaled(spec, share) for name, spec in plan.layers.items()}) for share in shares]


def _scaled(spec: LayerSpec, share: float) -> LayerSpec:
    if spec.sparsity is None:
        return spec
    return replace(spec, sparsity=replace(spec.sparsity, fraction=spec.sparsity.fraction * share))


@torch.no_grad()
def _prune_into(
    student: PreTrainedModel, blocks: Iterable[SolvedBlock]
) -> tuple[dict[str, LayerSpec], dict[str, Bool[Tensor, "..."]]]:
    """Put solved layers into the student; what each became, and where its weight is kept."""
    specs, masks = {}, {}
    for one in [one for block in blocks for one in block.layers]:
        weight = weight_of(student.get_submodule(one.layer.name))
        weight.copy_(from_matrix(dense(one.solved), one.layer.kind, weight.shape))
        specs[one.layer.name], masks[one.layer.name] = one.spec, weight != 0
    return specs, masks


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    masks: Mapping[str, Bool[Tensor, "..."]],
    batches: Iterator[dict[str, Tensor]],
    numbers: Iterable[int],
    steps: int,
) -> None:
    """Some steps of AdamW on the kept weights, at rates like the layers' weights, which fall linearly to zero."""
    student.requires_grad_(False)
    weights = {name: weight_of(student.get_submodule(name)).requires_grad_(True) for name in masks}
    groups = [{"params": [weight], "lr": LEARNING_RATE * _size(weight, masks[name])} for name, weight in weights.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(1, steps))
    for _ in numbers:
        distance = _distance(student, teacher, next(batches))
        if not torch.isfinite(distance):
            raise CompressError("Fine-tuning diverged: the distance from the dense model is not finite. Use a lower sparsity.")
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        falling.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight *= masks[name]


def _size(weight: Float[Tensor, "..."], kept: Bool[Tensor, "..."]) -> float:
    """The root mean square of the weights that are kept."""
    return (weight.detach().square().sum() / kept.sum().clamp(min=1)).sqrt().item()


def _endless(inputs: Mapping[str, Tensor], seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Mini-batches of the calibration samples, in a new order each time around."""
    generator = torch.Generator().manual_seed(seed)
    count = len(next(iter(inputs.values())))
    while True:
        order = torch.randperm(count, generator=generator)
        for batch in batches_of({name: value[order] for name, value in inputs.items() if name != "labels"}):
            yield {name: value.to(device) for name, value in batch.items()}


def _distance(student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    found = student(**batch)
    with torch.no_grad():
        wanted = teacher(**batch)
    if found.get("logits") is None:
        squared: Tensor = (found[0].float() - wanted[0].float()).square()
        return squared.mean()
    return _kl(found.logits.flatten(0, -2).float(), wanted.logits.flatten(0, -2).float())


def _kl(found: Float[Tensor, "M V"], wanted: Float[Tensor, "M V"]) -> Float[Tensor, ""]:
    log_q, log_p = (values.div(TEMPERATURE).log_softmax(-1) for values in (found, wanted))
    return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def _blocks(
    model: PreTrainedModel, student: PreTrainedModel, anatomy: Anatomy, specs: Mapping[str, LayerSpec], stored: torch.dtype
) -> Iterator[SolvedBlock]:
    for block in anatomy.blocks:
        layers = []
        for layer in [layer for layer in anatomy.of_block(block) if layer.name in specs]:
            before, after = (matrix(one.get_submodule(layer.name)).detach().float().cpu() for one in (model, student))
            error = ((before - after).square().sum() / before.square().sum()).item()
            layers.append(SolvedLayer(layer, Pruned(after.to(stored)), specs[layer.name], None, error))
        yield SolvedBlock(block, tuple(layers))
