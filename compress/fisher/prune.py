"""Prune a whole model on its loss, in steps: gradients, what every unit costs, the cheapest of all layers, the update."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.fisher import gradients, greedy, losses, mfac, obert, units
from compress.fisher.gradients import Gradients
from compress.fisher.losses import Draw, Loss
from compress.models import Anatomy, Layer, from_matrix, matrix, weight_of
from compress.qtensor import Pruned
from compress.sequential import Settings, SolvedBlock, SolvedLayer
from compress.solvers.masks import smallest
from compress.spec import LayerSpec, Plan, Sparsity

METHODS: dict[str, ModuleType] = {"obert": obert, "mfac": mfac}
BLOCKS = {"obert": 64, "mfac": 2048}


@dataclass(frozen=True)
class Options:
    """How to prune on the loss; each default was chosen by measurement (benchmarks/classifier.py).

    The Fisher is estimated from `gradients` gradients of `batch` samples each, anew in each of the `recompute` steps.
    `damping` is added to it, as a fraction of its mean diagonal; the papers' is absolute, and so depends on the scale of the
    loss. `block` is the number of consecutive weights whose interactions count, 0 for those of a whole layer (mfac only),
    None for the method's own. `greedy` removes the units of a block one after the other, where the oBERT paper takes their
    costs as if the others stayed; M-FAC always does that. `threshold` "global" compares the costs of all layers that have one
    pattern, so that a layer may get more or fewer zeros than the plan says, all together exactly as many; "layer" keeps to the
    plan. `loss` is one of losses.LOSSES, None for the one that fits; `mask_token` is what masked-lm needs. Gradients that
    memory does not hold go to the folder `spill`.
    """

    method: str = "obert"
    gradients: int = 128
    batch: int = 1
    damping: float = 1e-3
    block: int | None = None
    recompute: int = 4
    greedy: bool = True
    threshold: str = "global"
    loss: str | None = None
    mask_token: int | None = None
    seed: int = 0
    spill: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CompressError(f"There is no method {self.method}; choose one of {', '.join(METHODS)}.")
        if self.threshold not in ("global", "layer"):
            raise CompressError(f"The threshold is {self.threshold}; choose global or layer.")
        if self.damping <= 0:
            raise CompressError(f"damping is {self.damping:g}; it is a fraction of the Fisher's mean diagonal, above 0.")
        if min(self.gradients, self.batch, self.recompute) < 1:
            raise CompressError(
                f"gradients is {self.gradients}, batch {self.batch} and recompute {self.recompute}; use at least 1 of each."
            )
        if self.block is not None and self.block < (1 if self.method == "obert" else 0):
            raise CompressError(f"The Fisher block is {self.block}; use a positive number of weights, such as 64.")

    def block_of(self, numel: int, unit: int) -> int:
        """B for a layer of `numel` weights in units of some; raises where the one asked for cuts through them."""
        if self.block is None:
            return max(1, BLOCKS[self.method] // unit) * unit
        if self.block % unit:
            raise CompressError(
                f"Fisher blocks of {self.block} weights cut through units of {unit} weights. Use a multiple of {unit}."
            )
        return self.block or numel


@dataclass
class _State:
    """A layer being pruned: its weights so far, which of them are kept, and which of its units are done."""

    layer: Layer
    sparsity: Sparsity
    block: int
    weight: Float[Tensor, "d"]
    keep: Bool[Tensor, "d"]
    done: Bool[Tensor, "U"]

    @property
    def wanted(self) -> int:
        return units.count(self.sparsity, self.layer.N, self.layer.K)


def run(
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    settings: Settings,
    options: Options,
) -> Iterator[SolvedBlock]:
    """Yield the blocks of a model pruned on its loss, after all of the work is done; they look like those of sequential.run.

    Works on a float32 copy; the model is not changed. A layer's spec has the sparsity that it got.
    """
    states = _states(model, anatomy, plan, options, settings.device)
    name = losses.choose(model, inputs, options.mask_token, options.loss)
    loss, work = losses.LOSSES[name], copy.deepcopy(model).float().to(settings.device).eval()
    for step in range(1, options.recompute + 1):
        draw = Draw(torch.Generator().manual_seed(options.seed + step), options.mask_token)
        _step(work, states, step, name, loss, draw, inputs, options)
    del work
    for block in anatomy.blocks:
        own = [states.pop(layer.name) for layer in anatomy.of_block(block) if layer.name in states]
        yield SolvedBlock(block, tuple(_solved(state, model, settings.stored) for state in own))


def densities(final: float, steps: int) -> list[float]:
    """The fraction of weights that is left after each step: every step keeps the same fraction of what is there (M-FAC)."""
    return [final ** (step / steps) for step in range(1, steps)] + [final]


def _states(model: PreTrainedModel, anatomy: Anatomy, plan: Plan, options: Options, device: torch.device) -> dict[str, _State]:
    states = {}
    for layer in anatomy.layers:
        spec = plan.layers[layer.name]
        if spec.scheme is not None:
            raise CompressError(
                f"The plan quantizes {layer.name}; {options.method} only prunes. Quantize its result, or use --method alps."
            )
        if spec.sparsity is None or not units.count(spec.sparsity, layer.N, layer.K):
            continue
        C = units.width(spec.sparsity)
        W = matrix(model.get_submodule(layer.name)).detach().to(device, torch.float32, copy=True).flatten()
        if not torch.isfinite(W).all():
            raise CompressError(
                f"The weight of {layer.name} has NaN or infinite values. Nothing was written; check the checkpoint."
            )
        keep, done = torch.ones_like(W, dtype=torch.bool), torch.zeros(len(W) // C, dtype=torch.bool, device=device)
        states[layer.name] = _State(layer, spec.sparsity, options.block_of(len(W), C), W, keep, done)
    if not states:
        raise CompressError("The plan prunes nothing.")
    return states


def _step(
    work: PreTrainedModel,
    states: Mapping[str, _State],
    step: int,
    name: str,
    loss: Loss,
    draw: Draw,
    inputs: Mapping[str, Tensor],
    options: Options,
) -> None:
    """Estimate the Fisher, prune the cheapest units up to this step's share, and let the other weights make up for them."""
    keep = {one: state.keep.view(state.layer.N, state.layer.K) for one, state in states.items()}
    layers = [state.layer for state in states.values()]
    with gradients.collect(
        work, layers, keep, inputs, loss, draw, count=options.gradients, batch=options.batch, spill=options.spill
    ) as found:
        if step == 1:
            _check_reached(found, name)
        damping = options.damping * found.mean_square
        _choose(states, found, damping, step, options)
        for one, state in states.items():
            state.weight = METHODS[options.method].update(state.weight, found.of[one], ~state.keep, damping, state.block)
    for one, state in states.items():
        weight = weight_of(work.get_submodule(one))
        with torch.no_grad():
            weight.copy_(from_matrix(state.weight.view(state.layer.N, state.layer.K), state.layer.kind, weight.shape))


def _check_reached(found: Gradients, name: str) -> None:
    if len(found.unreached) == len(found.of):
        raise CompressError(
            f"All gradients of the {name} loss are zero, and so is the Fisher. Choose another loss or other data."
        )
    if found.unreached:
        more = f" and {len(found.unreached) - 1} more layers" if found.unreached[1:] else ""
        raise CompressError(
            f"The {name} loss does not reach {found.unreached[0]}{more}: the gradients are zero. Choose another loss, or leave "
            f"the layer dense with --skip '{found.unreached[0]}'."
        )


def _choose(states: Mapping[str, _State], found: Gradients, damping: float, step: int, options: Options) -> None:
    """Add this step's units to the zeros: the cheapest, layers compared as `options.threshold` says."""
    for pool in _pools(states, options):
        costs, zeros = [], {}
        for one, state in pool.items():
            cost, zeros[one] = _costs(state, found.of[one], damping, options)
            costs.append(cost)
        chosen = smallest(torch.cat(costs), _target(list(pool.values()), step, options.recompute))
        for (one, state), picked in zip(pool.items(), chosen.split([len(c) for c in costs]), strict=True):
            new = picked & ~state.done
            state.keep &= ~(zeros[one] & new[:, None]).flatten()
            state.done = picked


def _pools(states: Mapping[str, _State], options: Options) -> list[dict[str, _State]]:
    if options.threshold == "layer":
        return [{one: state} for one, state in states.items()]
    pools: dict[str, dict[str, _State]] = {}
    for one, state in states.items():
        pools.setdefault(state.sparsity.pattern, {})[one] = state
    return list(pools.values())


def _costs(state: _State, G: Tensor, damping: float, options: Options) -> tuple[Float[Tensor, "U"], Bool[Tensor, "U C"]]:
    """What every unit costs and which of its weights become zero; units that are done stay so, at no cost."""
    C = units.width(state.sparsity)
    if options.greedy and options.method == "obert":
        return greedy.costs(state.weight, G, state.done, damping, state.block, state.sparsity)
    inverse = METHODS[options.method].inverse_blocks(G, damping, state.block, C, state.weight.device)
    cost, zeros = units.costs(state.weight.double().view(-1, C), inverse, state.sparsity)
    return cost.masked_fill_(state.done, -torch.inf), zeros


def _target(states: Sequence[_State], step: int, steps: int) -> int:
    """How many units of a pool are sparse after a step."""
    wanted = sum(state.wanted for state in states)
    if step == steps:
        return wanted
    weights = sum(state.weight.numel() for state in states)
    zeros = sum(state.sparsity.zeros(state.layer.N, state.layer.K) for state in states)
    density = densities(1 - zeros / weights, steps)[step - 1]
    return round(wanted * (1 - density) * weights / zeros)


def _solved(state: _State, model: PreTrainedModel, stored: torch.dtype) -> SolvedLayer:
    layer = state.layer
    W = matrix(model.get_submodule(layer.name)).detach().float().cpu()
    V = state.weight.view(layer.N, layer.K).cpu().to(stored)
    error = ((W - V.float()).square().sum() / W.square().sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
    return SolvedLayer(layer, Pruned(V), LayerSpec(None, _realised(state)), None, error)


def _realised(state: _State) -> Sparsity:
    if state.sparsity.nm:
        return state.sparsity
    most = len(state.done) - 0.25  # a global threshold may leave a layer nothing, and a fraction is below 1
    return Sparsity(min(int(state.done.sum()), most) / len(state.done), state.sparsity.pattern)
