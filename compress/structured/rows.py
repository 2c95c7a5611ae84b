"""The loop over blocks that removes neurons and heads, and the smaller model that it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import models
from compress.calib.stats import HessianSum
from compress.checkpoint import Writer
from compress.errors import CompressError
from compress.models import Anatomy, Layer, from_matrix, matrix
from compress.passes import Passes
from compress.progress import Track, silent
from compress.sequential import Settings, finite_weight, walk
from compress.solvers.rtn import output_error
from compress.structured import obs
from compress.structured.families import Part, Shrinkage, shrinkage

Method = Literal["obs", "magnitude"]


@dataclass(frozen=True)
class ShrunkLayer:
    """A layer that lost rows or inputs, with the shape that is left.

    `output_error` is relative to the squared output of the dense layer; None for one that lost rows, which changes no other
    row, and without calibration. `weight_error` counts what is gone as zeros.
    """

    layer: Layer
    shape: tuple[int, int]
    output_error: float | None
    weight_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShrunkBlock:
    """A block with its new tensors, named as the source stores them."""

    name: str
    layers: tuple[ShrunkLayer, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Shrunk:
    """What became of a model: `replaced` and `config` are for `Writer.finish`, the rest is for people."""

    replaced: dict[str, list[str]]
    config: dict[str, Any]
    layers: tuple[ShrunkLayer, ...]
    shrinkage: Shrinkage


def prune_rows(
    writer: Writer,
    model: PreTrainedModel,
    anatomy: Anatomy,
    stored: Iterable[str],
    config: Mapping[str, Any],
    inputs: Mapping[str, Tensor] | None,
    fraction: float,
    settings: Settings,
    method: Method = "obs",
    track: Track = silent,
) -> Shrunk:
    """Remove `fraction` of the feed-forward neurons of every block, and of its attention heads where that is possible.

    `fraction` counts neurons and heads, not weights: round(fraction x U) of the U neurons of every block go, and of the groups
    of heads that share keys and values the nearest number that stock transformers loads; `Shrunk.shrinkage` has the numbers,
    and notes on what had to differ. Blocks are written as they come. `stored` are the names of the source's tensors and
    `config` is its config.json.
    """
    plan = shrinkage(model, fraction)
    names = stored_names(model, anatomy, plan, stored)
    replaced: dict[str, list[str]] = {}
    layers: list[ShrunkLayer] = []
    blocks = shrink(model, anatomy, plan, names, inputs, settings, method)
    for number, block in enumerate(track(blocks, len(anatomy.blocks), "solving blocks")):
        writer.block(number, block.tensors)
        replaced |= {name: [name] for name in block.tensors}
        layers += block.layers
    return Shrunk(replaced, {**config, **plan.config}, tuple(layers), plan)


def shrink(
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Shrinkage,
    names: Mapping[str, str],
    inputs: Mapping[str, Tensor] | None,
    settings: Settings,
    method: Method = "obs",
) -> Iterator[ShrunkBlock]:
    """Yield the blocks without the units that cost least, in order; every block sees the outputs of the smaller ones before it.

    Inside a block the neurons are chosen on inputs that saw the heads go. "obs" needs `inputs`, and the reader of the units
    makes up for them, with its bias too where it has one; "magnitude" removes the units that their reader weighs least, and
    nothing else. `names` is from `stored_names`. The model is not changed.
    """
    if method == "obs" and inputs is None:
        raise ValueError("removing rows by OBS needs calibration inputs")
    layers = {layer.name: layer for layer in anatomy.layers}
    with closing(walk(model, anatomy, inputs if method == "obs" else None, settings)) as blocks:
        for name, block, passes in blocks:
            shrunk: list[ShrunkLayer] = []
            tensors: dict[str, Tensor] = {}
            for part in plan.parts:
                reader = layers[f"{name}.{part.reader}"]
                source = model.get_submodule(reader.name)
                removal = _solve(block.get_submodule(part.reader), source, reader, part, passes, settings)
                for maker in part.makers:
                    layer = layers[f"{name}.{maker}"]
                    module = model.get_submodule(layer.name)
                    rows = part.rows(maker, removal.kept)
                    W, bias = matrix(module).detach(), _bias(module)
                    tensors |= _stored(layer, names, W[rows], None if bias is None else bias[rows])
                    squares = finite_weight(module, layer).square().sum(1)
                    lost = _ratio(squares.sum() - squares[rows].sum(), squares.sum())
                    shrunk.append(ShrunkLayer(layer, (len(rows), layer.K), None, lost))
                inputs_left = part.inputs(removal.kept)
                tensors |= _stored(reader, names, removal.W[:, inputs_left], removal.bias)
                shrunk.append(replace(removal.report, shape=(reader.N, len(inputs_left))))
            yield ShrunkBlock(name, tuple(shrunk), tensors)


@dataclass(frozen=True)
class _Removal:
    """The units of a part that are left, and what their reader becomes, as it is stored: zero for those that are gone."""

    kept: Bool[Tensor, "U"]
    W: Float[Tensor, "N K"]
    bias: Float[Tensor, "N"] | None
    report: ShrunkLayer


class _Moments(HessianSum):
    """X X^T of the inputs with a 1 added to each: the last column is their sum."""

    def __init__(self, K: int, device: torch.device) -> None:
        super().__init__(K + 1, device)

    def add(self, x: Float[Tensor, "M K"]) -> None:
        super().add(nn.functional.pad(x, (0, 1), value=1))


def _solve(module: nn.Module, source: nn.Module, layer: Layer, part: Part, passes: Passes | None, settings: Settings) -> _Removal:
    """Choose the units that go, and put their reader as it is without them into the block; `source` is the stored layer.

    With m the mean input, a bias of b + (W - W') m leaves the error (W - W') C (W - W')^T of the covariance C = H - m m^T: so OBS
    works on C where there is a bias, on H where there is none.
    """
    stored = models.weight_of(source).dtype
    W, bias = finite_weight(module, layer), _bias(source)
    output: float | None = None
    notes: tuple[str, ...] = ()
    if passes is None:
        kept = _largest(W, part)
        left = W * kept.repeat_interleave(part.width)
    else:
        moments = passes.feed(module, _Moments(layer.K, settings.device), layer.name).stats().H
        H, mean = moments[:-1, :-1], moments[:-1, -1] * (bias is not None)
        C = H - torch.outer(mean, mean)
        found = obs.remove(W, C, part.width, part.remove, settings.options.damping)
        kept, left, notes = found.kept, found.W.to(stored).float(), found.notes
        bias = None if bias is None else (bias.to(mean) + (W - left) @ mean).to(bias.dtype)
        output = _ratio(output_error(W - left, C).sum(), output_error(W, H).sum())
    report = ShrunkLayer(layer, (layer.N, layer.K), output, _ratio((W - left).square().sum(), W.square().sum()), notes)
    weight = models.weight_of(module)
    with torch.no_grad():
        weight.copy_(from_matrix(left, layer.kind, weight.shape))  # in float32 this overwrites W, a view of it
        if bias is not None:
            module.get_parameter("bias").copy_(bias)
    return _Removal(kept.cpu(), left.to("cpu", stored), None if bias is None else bias.cpu(), report)


def _largest(W: Float[Tensor, "N K"], part: Part) -> Bool[Tensor, "U"]:
    """The units that are left when those of the smallest columns in W go."""
    sizes = W.square().sum(0).view(-1, part.width).sum(1)
    kept = torch.ones(part.units, dtype=torch.bool, device=W.device)
    kept[sizes.argsort(stable=True)[: part.remove]] = False
    return kept


def _stored(
    layer: Layer, names: Mapping[str, str], W: Float[Tensor, "n k"], bias: Float[Tensor, "n"] | None
) -> dict[str, Tensor]:
    """A layer's tensors under the names and in the shapes in which the source stores them."""
    shape = W.t().shape if layer.kind == "conv1d" else W.shape
    tensors = {names[f"{layer.name}.weight"]: from_matrix(W, layer.kind, shape).contiguous()}
    return tensors if bias is None else {**tensors, names[f"{layer.name}.bias"]: bias}


def _bias(module: nn.Module) -> Float[Tensor, "N"] | None:
    found = dict(module.named_parameters()).get("bias")
    return None if found is None else found.detach()


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole.clamp(min=torch.finfo(torch.float32).tiny)).item()


def stored_names(model: PreTrainedModel, anatomy: Anatomy, plan: Shrinkage, stored: Iterable[str]) -> dict[str, str]:
    """The stored name of every parameter that shrinks; raises where a block is not as its config says, before any work."""
    shapes, stored = anatomy.shapes, list(stored)
    layers: dict[str, tuple[int | None, int | None]] = {}  # expected N and K
    for block in anatomy.blocks:
        for part in plan.parts:
            layers |= {f"{block}.{maker}": (part.units * sum(widths), None) for maker, widths in part.makers.items()}
            layers[f"{block}.{part.reader}"] = (None, part.units * part.width)
    for name, expected in layers.items():
        if name not in shapes:
            reason = anatomy.dense.get(name, "there is no such layer")
            raise CompressError(
                f"Rows cannot go from {name} ({reason}); all blocks must lose the same number, since the config has one size for "
                "all. Leave out --skip, or use another pattern."
            )
        if any(want is not None and want != have for want, have in zip(expected, shapes[name], strict=True)):
            raise CompressError(
                f"{name} is {shapes[name][0]} x {shapes[name][1]}, which is not what {type(model).__name__}'s config says. "
                "Use another pattern."
            )
    weights = models.weight_names(model, layers, stored)
    found = {f"{name}.weight": key for name, key in weights.items()}
    for name, key in weights.items():
        if _bias(model.get_submodule(name)) is not None:
            found[f"{name}.bias"] = key.removesuffix("weight") + "bias"
    if missing := [key for key in found.values() if key not in stored]:
        raise CompressError(f"The checkpoint does not store {missing[0]}, which {type(model).__name__} has.")
    return found
