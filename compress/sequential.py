"""The loop: block by block, capture inputs, accumulate Hessians, solve every layer, and go on with the compressed block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calib import capture
from compress.calib.capture import Call, Chain
from compress.calib.stats import HessianSum, LayerStats, rows_of
from compress.errors import CompressError
from compress.models import Anatomy, Layer, from_matrix, matrix, weight_of
from compress.qtensor import QTensor, dequantize
from compress.solvers import SOLVERS
from compress.solvers.options import Options
from compress.solvers.rtn import output_error
from compress.spec import Plan, Scheme

TOKENS_AT_A_TIME = 4096  # of one forward pass


@dataclass(frozen=True)
class Settings:
    """How to solve: a method of `SOLVERS`, its options, where and in which dtype blocks run, and how scales are stored."""

    method: str
    options: Options
    device: torch.device
    dtype: torch.dtype
    scale_dtype: torch.dtype


@dataclass(frozen=True)
class SolvedLayer:
    """A solved layer with its errors relative to the dense layer: of the output on calibration data, and of the weight."""

    layer: Layer
    q: QTensor
    output_error: float | None
    weight_error: float


@dataclass(frozen=True)
class SolvedBlock:
    name: str
    layers: tuple[SolvedLayer, ...]


def run(
    model: PreTrainedModel, anatomy: Anatomy, plan: Plan, inputs: Mapping[str, Tensor] | None, settings: Settings
) -> Iterator[SolvedBlock]:
    """Yield the blocks of a model solved, in order; every block sees the outputs of the compressed blocks before it.

    `inputs` are the model's arguments for the calibration samples, stacked along dimension 0; None for a method that needs
    none. The model is not changed: one block at a time is copied, so memory does not grow with depth.
    """
    batches = _batches(inputs) if inputs is not None else []
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else None for batch in batches]
    chain = _chain(model, anatomy, batches) if batches else None
    orders: dict[tuple[type[nn.Module], tuple[str, ...]], list[tuple[str, ...]]] = {}
    for i, name in enumerate(anatomy.blocks):
        block = copy.deepcopy(model.get_submodule(name)).to(settings.device, settings.dtype)
        layers = [layer for layer in anatomy.of_block(name) if plan.layers[layer.name].scheme]
        replay = _Replay(block, chain, i, masks, settings) if chain else None
        if replay is None:
            yield SolvedBlock(name, tuple(_solve(layers, block, name, None, plan, settings, ())))
            continue
        local = tuple(_local(layer, name) for layer in layers)
        key = (type(block), local)
        if key not in orders:  # blocks of one class call their layers in one order
            orders[key] = capture.subsets(block, local, lambda: replay.run(0))  # noqa: B023  (called at once)
        yield SolvedBlock(name, tuple(_solve_block(layers, block, name, orders[key], replay, plan, settings)))
        if i + 1 < len(anatomy.blocks):
            replay.advance()


def _batches(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    first = next(iter(inputs.values()))
    tokens = first.shape[1] if first.ndim == 2 else TOKENS_AT_A_TIME // 8
    size = max(1, TOKENS_AT_A_TIME // tokens)
    return [{name: value[i : i + size] for name, value in inputs.items()} for i in range(0, len(first), size)]


def _chain(model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[dict[str, Tensor]]) -> Chain:
    if anatomy.blocks != ("",):
        return capture.record(model, anatomy.blocks, batches)
    name = model.main_input_name  # the whole model is one block: its main input plays the hidden state
    rest = [{k: v for k, v in batch.items() if k != name} for batch in batches]
    return Chain([batch[name] for batch in batches], [[Call((), kwargs, name)] for kwargs in rest])


class _Replay:
    """One block with everything it needs to run over the calibration batches."""

    def __init__(
        self, block: nn.Module, chain: Chain, index: int, masks: Sequence[Bool[Tensor, "B T"] | None], settings: Settings
    ) -> None:
        self.block, self.chain, self.index, self.masks, self.settings = block, chain, index, masks, settings

    def run(self, batch: int) -> Tensor:
        call = self.chain.calls[batch][self.index]
        return capture.replay(self.block, self.chain.hidden[batch], call, self.settings.device, self.settings.dtype)

    def advance(self) -> None:
        """Replace every batch's hidden state by the block's output."""
        for batch in range(len(self.chain.hidden)):
            self.chain.hidden[batch] = capture.run_until_stop(lambda: self.run(batch))  # noqa: B023  (called at once)

    def stats(self, module: nn.Module, name: str) -> LayerStats:
        """The Hessian of the inputs that reach `module`, with everything before it as it is now."""
        total = HessianSum(matrix(module).shape[1], self.settings.device)
        for batch, mask in enumerate(self.masks):
            handle = capture.watch_input(module, lambda x: total.add(rows_of(x, module, mask)))  # noqa: B023
            with capture.hooks([handle]):
                capture.run_until_stop(lambda: self.run(batch))  # noqa: B023
        stats = total.stats()
        if not torch.isfinite(stats.H).all():
            raise CompressError(
                f"The inputs of {name} are NaN or infinite on the calibration data. Check the model's weights, or run it "
                "in a wider type with --dtype float32."
            )
        return stats


def _solve_block(
    layers: Sequence[Layer],
    block: nn.Module,
    prefix: str,
    order: Sequence[tuple[str, ...]],
    replay: _Replay,
    plan: Plan,
    settings: Settings,
) -> Iterator[SolvedLayer]:
    """Solve layers in the order they are called; layers that read one input share its Hessian."""
    by_local = {_local(layer, prefix): layer for layer in layers}
    for subset in order:
        together = [by_local.pop(name) for name in subset]
        stats = replay.stats(block.get_submodule(subset[0]), together[0].name)
        yield from _solve(together, block, prefix, stats, plan, settings, ())
    left = list(by_local.values())
    never = ("rounded to nearest: never called on the calibration data",)
    yield from _solve(left, block, prefix, None, plan, settings, never)


def _solve(
    layers: Sequence[Layer],
    block: nn.Module,
    prefix: str,
    stats: LayerStats | None,
    plan: Plan,
    settings: Settings,
    notes: tuple[str, ...],
) -> Iterator[SolvedLayer]:
    """Solve layers with one Hessian and put the results into the block; layers of one scheme are stacked and solved at once."""
    schemes: dict[Scheme, list[Layer]] = {}
    for layer in layers:
        scheme = plan.layers[layer.name].scheme
        assert scheme is not None
        schemes.setdefault(scheme, []).append(layer)
    solve = SOLVERS[settings.method if stats else "rtn"]
    for scheme, same in schemes.items():
        modules = [block.get_submodule(_local(layer, prefix)) for layer in same]
        weights = [_finite(matrix(module), layer.name) for module, layer in zip(modules, same, strict=True)]
        solved = solve(torch.cat(weights), stats, scheme, settings.scale_dtype, settings.options)
        start = 0
        for layer, module, W in zip(same, modules, weights, strict=True):
            q = solved.rows(start, start + layer.N)
            start += layer.N
            Q = dequantize(q)
            with torch.no_grad():
                weight_of(module).copy_(from_matrix(Q, layer.kind, weight_of(module).shape))
            yield _relative(layer, q, W, Q, stats, notes)


def _relative(layer: Layer, q: QTensor, W: Tensor, Q: Tensor, stats: LayerStats | None, notes: tuple[str, ...]) -> SolvedLayer:
    output = None
    if q.error is not None and stats is not None:
        output = (q.error.sum() / output_error(W, stats.H).sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
    weight = ((W - Q).square().sum() / W.square().sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
    q = QTensor(q.codes.cpu(), q.scales.cpu(), q.zeros.cpu(), q.scheme, notes=q.notes + notes)
    return SolvedLayer(layer, q, output, weight)


def _finite(W: Float[Tensor, "N K"], name: str) -> Float[Tensor, "N K"]:
    if not torch.isfinite(W).all():
        raise CompressError(f"The weight of {name} has NaN or infinite values. Nothing was written; check the checkpoint.")
    return W.detach().float()


def _local(layer: Layer, block: str) -> str:
    return layer.name.removeprefix(block + ".") if block else layer.name
