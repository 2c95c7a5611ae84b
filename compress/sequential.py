"""The loop: block by block, capture inputs, accumulate Hessians, solve every layer, and go on with the compressed block."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import experts
from compress.calib import capture
from compress.calib.capture import Call, Chain
from compress.calib.narrow import narrow_
from compress.calib.residual import Wiring, wiring_of
from compress.calib.stats import LayerStats
from compress.errors import CompressError
from compress.models import Anatomy, Layer, from_matrix, matrix, weight_of
from compress.passes import Passes
from compress.qtensor import Solved, dense
from compress.solvers import solve_alike
from compress.solvers.masks import KEPT, weights_to_keep
from compress.solvers.options import Options
from compress.solvers.rtn import output_error
from compress.solvers.target import corrected
from compress.spec import LayerSpec, Plan

NO_MOMENTS: Iterable[Mapping[str, Tensor]] = itertools.repeat(MappingProxyType({}))
TOKENS_AT_A_TIME = 4096  # of one forward pass
FEW_TOKENS = 2  # per input of an expert's layer
NEVER_CALLED = "never called on the calibration data"  # why a layer stays dense that its block does not run as a module
INPUTS_ALONE = "corrected for the drift of its inputs alone: its output is added to no other tensor as it is"
COARSE = 4  # bits of layers, at most, beside whose errors those of bfloat16 do not count


@dataclass(frozen=True)
class Settings:
    """How to solve: a quantizer and a pruner by name, their options, where and in which dtype blocks run.

    `stored` is the dtype on disk of scales, or of the weights where there are none. With `narrow`, linear layers may multiply in
    bfloat16 where that is faster.
    """

    quantizer: str
    pruner: str
    options: Options
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    narrow: bool = True


@dataclass(frozen=True)
class SolvedLayer:
    """A solved layer with its errors relative to the dense layer: of the output on calibration data, and of the weight.

    The output error is that of W on the inputs that the compressed blocks before make, whatever the target was: what corrects
    a target for their drift counts as error here.
    """

    layer: Layer
    solved: Solved
    spec: LayerSpec
    output_error: float | None
    weight_error: float


@dataclass(frozen=True)
class SolvedBlock:
    name: str
    layers: tuple[SolvedLayer, ...]


def run(
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    inputs: Mapping[str, Tensor] | None,
    settings: Settings,
    moments: Iterable[Mapping[str, Float[Tensor, "_ _"]]] = NO_MOMENTS,
    done: Sequence[Callable[[], SolvedBlock]] = (),
) -> Iterator[SolvedBlock]:
    """Yield the blocks of a model solved, in order; every block sees the outputs of the compressed blocks before it.

    `inputs` are the model's arguments for the calibration samples, stacked along dimension 0; None for a method that needs
    none. Inside a block too, a layer sees the compressed layers before it (GPTQ's "true sequential"). The model is not
    changed: one block at a time is copied, so memory does not grow with depth. `moments` are those of the gradients of layers'
    outputs, of every block by layer, for effort that weighs errors by them; a block's are asked for as its turn comes.
    `done` read the first blocks as they were solved before: these come at once, and are only run where a block is left to solve.
    """
    yield from (read() for read in done)
    if len(done) == len(anatomy.blocks):
        return
    wirings: dict[tuple[type[nn.Module], tuple[str, ...]], Wiring] = {}
    coarse = all(spec.scheme and spec.scheme.bits <= COARSE for spec in plan.layers.values())
    narrow = settings.narrow and coarse
    with closing(walk(model, anatomy, inputs, settings, settings.options.corrected, narrow)) as blocks:
        for number, ((name, block, passes), weighing) in enumerate(zip(blocks, moments, strict=False)):
            layers = {_local(layer, name): layer for layer in anatomy.of_block(name) if not plan.layers[layer.name].dense}
            wiring, key = Wiring(), (type(block), tuple(layers))
            if passes is not None:
                if key not in wirings:  # of the first block, solved or not, so that going on changes nothing
                    wirings[key] = wiring_of(block, list(layers), passes.first, sums=passes.dense is not None)
                wiring = wirings[key]
                passes.watch(wiring.sources)
            if number < len(done):
                for one in done[number]().layers:
                    _put(block.get_submodule(_local(one.layer, name)), one.layer, dense(one.solved.to(settings.device)))
            else:
                yield SolvedBlock(name, tuple(_solve_block(layers, block, wiring, passes, plan, settings, weighing)))


def dense_stats(
    model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], settings: Settings
) -> Iterator[tuple[Layer, Float[Tensor, "N K"], LayerStats | None]]:
    """Every layer of the dense model with its weight and what reaches it, block by block; None where nothing does.

    Memory is bounded as in `run`: one block, and one Hessian, which layers with one input share, or those of some experts.
    """
    with closing(walk(model, anatomy, inputs, settings)) as blocks:
        for name, block, passes in blocks:
            assert passes is not None
            left = {_local(layer, name): layer for layer in anatomy.of_block(name)}
            for subset, stats in itertools.chain.from_iterable(passes.stats(capture.subsets(block, list(left), passes.first))):
                for local in subset:
                    layer = left.pop(local)
                    yield layer, finite_weight(block.get_submodule(local), layer), stats
            for local, layer in left.items():
                yield layer, finite_weight(block.get_submodule(local), layer), None


def walk(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor] | None,
    settings: Settings,
    beside: bool = False,
    narrow: bool = False,
) -> Generator[tuple[str, nn.Module, Passes | None], None, None]:
    """The blocks in order: name, a copy to change, and the calibration passes through it, None where there are no inputs.

    The next block is fed by this one as the caller leaves it. With `beside`, the dense model runs along, with a copy of
    one block of its own. With `narrow`, linear layers multiply in bfloat16 where that is faster. Close the generator when
    leaving early.
    """
    batches = batches_of(inputs, TOKENS_AT_A_TIME) if inputs is not None else []
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else None for batch in batches]
    chain = _chain(model, anatomy, batches) if batches else None
    dense = replace(chain) if chain and beside else None
    runs_in = settings.device, settings.dtype
    for i, name in enumerate(anatomy.blocks):
        block = copy.deepcopy(model.get_submodule(name)).to(*runs_in)
        if narrow:
            narrow_(block)
        if chain is None:
            yield name, block, None
            continue
        with ExitStack() as both:
            passes = both.enter_context(Passes(name, block, chain, i, masks, *runs_in))
            if dense is not None:
                passes.dense = both.enter_context(Passes(name, copy.deepcopy(block), dense, i, masks, *runs_in))
            yield name, block, passes
            if i + 1 < len(anatomy.blocks):
                chain.hidden = passes.outputs()
                if dense is not None and passes.dense is not None:
                    dense.hidden = passes.dense.outputs()


def batches_of(inputs: Mapping[str, Tensor], at_a_time: int = TOKENS_AT_A_TIME) -> list[dict[str, Tensor]]:
    """The inputs in batches of so many tokens, or of an image for every 512 of them; at least one sample each."""
    first = next(iter(inputs.values()))
    tokens = first.shape[1] if first.ndim == 2 else TOKENS_AT_A_TIME // 8
    size = max(1, at_a_time // tokens)
    return [{name: value[i : i + size] for name, value in inputs.items()} for i in range(0, len(first), size)]


def _chain(model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[dict[str, Tensor]]) -> Chain:
    if anatomy.blocks != ("",):
        return capture.record(model, anatomy.blocks, batches)
    name = model.main_input_name  # the whole model is one block: its main input plays the hidden state
    rest = [{k: v for k, v in batch.items() if k != name} for batch in batches]
    return Chain([batch[name] for batch in batches], [[Call((), kwargs, name)] for kwargs in rest])


@dataclass(frozen=True)
class _Stack:
    """Layers of one input, by their names in the block, that are solved as one: for `targets`, with `stats`."""

    layers: Mapping[str, Layer]
    spec: LayerSpec
    weights: Sequence[Float[Tensor, "_ K"]]
    targets: Sequence[Float[Tensor, "_ K"]]
    stats: LayerStats | None
    notes: tuple[str, ...]
    keep: Bool[Tensor, "_ K"] | None = None  # where the source is not zero, for layers that were pruned before


def _solve_block(
    layers: Mapping[str, Layer],
    block: nn.Module,
    wiring: Wiring,
    passes: Passes | None,
    plan: Plan,
    settings: Settings,
    moments: Mapping[str, Tensor],
) -> Iterator[SolvedLayer]:
    """Solve layers in the order they are called; layers that read one input share its Hessian.

    Layers that calibration never called are left out: nothing is known of their inputs, and a module that is not called may have
    its weight read by others.
    """
    left = dict(layers)
    for known in passes.stats(wiring.order) if passes else ():
        stacks = (
            stack
            for subset, stats in known
            for stack in _stacks(
                {name: left.pop(name) for name in subset},
                block,
                *_usable(stats, block, subset[0], wiring),
                plan,
                settings.options,
            )
        )
        yield from _solve(stacks, block, settings, moments)
    if passes is None:
        yield from _solve(_stacks(left, block, None, (), plan, settings.options), block, settings, moments)


def _usable(stats: LayerStats, block: nn.Module, name: str, wiring: Wiring) -> tuple[LayerStats | None, tuple[str, ...]]:
    """`usable`, and a note for layers that are corrected for less than others because of how the block is wired."""
    found, notes = usable(stats, block, name)
    return found, (*notes, INPUTS_ALONE) if found is not None and found.drift and name in wiring.unfound else notes


def usable(stats: LayerStats, block: nn.Module, name: str) -> tuple[LayerStats | None, tuple[str, ...]]:
    """What to solve an expert's layer with, which few or no tokens may have reached, and the note that says so."""
    if not experts.is_expert(block, name) or stats.tokens >= FEW_TOKENS * len(stats.H):
        return stats, stats.notes
    if not stats.tokens:
        return None, ("solved without calibration: no calibration token was routed to it",)
    note = f"{stats.tokens} calibration tokens were routed to it: their correlations count for less"
    return stats.shrunk(), (note,)


def _stacks(
    layers: Mapping[str, Layer],
    block: nn.Module,
    stats: LayerStats | None,
    notes: tuple[str, ...],
    plan: Plan,
    options: Options,
) -> Iterator[_Stack]:
    """Layers with one Hessian, those together that may be solved as one."""
    local = {layer.name: name for name, layer in layers.items()}
    for spec, stacked in stackable(layers.values(), lambda layer: [plan.layers[layer.name]]):
        named = {local[layer.name]: layer for layer in stacked}
        weights = [finite_weight(block.get_submodule(name), layer) for name, layer in named.items()]
        targets = corrected(weights, stats, options) if stats and stats.drift else weights
        yield _Stack(named, spec, weights, targets, stats, notes, kept(weights, spec, options))


def kept(weights: Sequence[Float[Tensor, "_ K"]], spec: LayerSpec, options: Options) -> Bool[Tensor, "N K"] | None:
    """Find the weights of stacked layers that may become other than zero; None where no layer was pruned before."""
    if spec.sparsity is not None or not options.keep_zeros:
        return None
    masks = [weights_to_keep(W) for W in weights]
    if all(mask is None for mask in masks):
        return None
    return torch.cat([torch.ones_like(W, dtype=torch.bool) if m is None else m for W, m in zip(weights, masks, strict=True)])


def _solve(
    stacks: Iterable[_Stack], block: nn.Module, settings: Settings, moments: Mapping[str, Tensor]
) -> Iterator[SolvedLayer]:
    """Solve layers and put the results into the block; those of one shape and spec at once."""
    alike: dict[tuple[LayerSpec, int, int, str], list[_Stack]] = {}
    for stack in stacks:
        first, *_ = every = stack.layers.values()
        weighed = first.name if _outputs(stack, moments) else ""  # alone: these moments may be larger than Hessians
        alike.setdefault((stack.spec, sum(layer.N for layer in every), first.K, weighed), []).append(stack)
    for (spec, *_), equals in alike.items():
        stats = [_weighed(stack, moments, settings.device) for stack in equals]
        targets = [torch.cat([*stack.targets]) for stack in equals]
        how = (spec, settings.stored, settings.options, settings.quantizer, settings.pruner)
        found = solve_alike(targets, stats, *how, [stack.keep for stack in equals])
        for stack, solved in zip(equals, found, strict=True):
            yield from _placed(stack, solved, block)


def _outputs(stack: _Stack, moments: Mapping[str, Tensor]) -> list[Tensor]:
    """The moments of the gradients of the layers' outputs, where they are known of all and there are statistics to weigh."""
    every = [layer.name for layer in stack.layers.values()]
    return [moments[name] for name in every] if stack.stats is not None and all(name in moments for name in every) else []


def _weighed(stack: _Stack, moments: Mapping[str, Tensor], device: torch.device) -> LayerStats | None:
    outputs = [one.to(device) for one in _outputs(stack, moments)]
    return replace(stack.stats, outputs=torch.block_diag(*outputs)) if stack.stats is not None and outputs else stack.stats


def _placed(stack: _Stack, together: Solved, block: nn.Module) -> Iterator[SolvedLayer]:
    """Put what layers have become into the block, one after the other."""
    start = 0
    for (name, layer), W, target in zip(stack.layers.items(), stack.weights, stack.targets, strict=True):
        solved = together.rows(start, start + layer.N)
        kept_here = () if stack.keep is None or stack.keep[start : start + layer.N].all() else (KEPT,)
        start += layer.N
        Q = dense(solved)
        if stack.stats is not None and target is not W:
            solved = replace(solved, error=output_error(W - Q, stack.stats.H))
        result = _relative(layer, solved, stack.spec, W, Q, stack.stats, stack.notes + kept_here)
        _put(block.get_submodule(name), layer, Q)  # in float32 this overwrites W, a view of it
        yield result


def _put(module: nn.Module, layer: Layer, Q: Float[Tensor, "N K"]) -> None:
    weight = weight_of(module)
    with torch.no_grad():
        weight.copy_(from_matrix(Q, layer.kind, weight.shape))


def stackable(
    layers: Iterable[Layer], specs_of: Callable[[Layer], Iterable[LayerSpec]]
) -> Iterator[tuple[LayerSpec, list[Layer]]]:
    """Layers of one input by spec and width, to be solved as one; each alone where zeros are counted over all of its weights."""
    groups: dict[tuple[LayerSpec, int, str], list[Layer]] = {}
    for layer in layers:
        for spec in specs_of(layer):
            counted = spec.sparsity is not None and spec.sparsity.nm is None
            groups.setdefault((spec, layer.K, layer.name if counted else ""), []).append(layer)
    for (spec, _, _), stacked in groups.items():
        yield spec, stacked


def _relative(
    layer: Layer, solved: Solved, spec: LayerSpec, W: Tensor, Q: Tensor, stats: LayerStats | None, notes: tuple[str, ...]
) -> SolvedLayer:
    tiny = torch.finfo(torch.float32).tiny
    output = None
    if solved.error is not None and stats is not None:
        output = (solved.error.sum() / output_error(W, stats.H).sum().clamp(min=tiny)).item()
    weight = ((W - Q).square().sum() / W.square().sum().clamp(min=tiny)).item()
    outlives = replace(solved.to(torch.device("cpu")), error=None, notes=solved.notes + notes)  # no errors of single rows
    return SolvedLayer(layer, outlives, spec, output, weight)


def finite_weight(module: nn.Module, layer: Layer) -> Float[Tensor, "N K"]:
    W = matrix(module).detach().float()
    if not torch.isfinite(W).all():
        raise CompressError(f"The weight of {layer.name} has NaN or infinite values. Check the checkpoint.")
    return W


def _local(layer: Layer, block: str) -> str:
    return layer.name.removeprefix(block + ".") if block else layer.name
