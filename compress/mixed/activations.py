"""What budgets of operations need: multiplications per layer, and inputs rounded as an integer kernel would see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calib.capture import hooks, run_until_stop
from compress.calib.stats import rows_of
from compress.models import Layer


@dataclass(frozen=True)
class Range:
    """The smallest and largest input of a layer on the calibration data; zero is always within."""

    low: float
    high: float

    def rounded(self, x: Tensor, bits: int) -> Tensor:
        """`x` on the asymmetric grid of 2^bits levels over this range, one scale for the whole tensor."""
        levels = 2**bits - 1
        scale = max((self.high - self.low) / levels, torch.finfo(torch.float32).tiny)
        zero = round(-self.low / scale)
        found: Tensor = x.float().div(scale).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(scale)
        return found.to(x.dtype)


def macs(model: nn.Module, layers: Sequence[Layer], sample: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of every layer for one sample: rows it is applied to, times N x K; 0 where it is not called."""
    found = dict.fromkeys((layer.name for layer in layers), 0)

    def count(layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[layer.name] += len(rows_of(args[0], module)) * layer.N * layer.K

        return hook

    with hooks([model.get_submodule(layer.name).register_forward_pre_hook(count(layer)) for layer in layers]):
        run_until_stop(lambda: model(**sample))
    return found


def observe(model: nn.Module, layers: Sequence[Layer], ranges: dict[str, Range]) -> list[Any]:
    """Hooks that widen the range of every layer by the inputs it sees."""

    def widen(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            was = ranges.get(name, Range(0.0, 0.0))
            low, high = args[0].aminmax()
            ranges[name] = Range(min(was.low, low.item()), max(was.high, high.item()))

        return hook

    return [model.get_submodule(layer.name).register_forward_pre_hook(widen(layer.name)) for layer in layers]


def simulate(model: nn.Module, ranges: Mapping[str, Range], bits: int) -> list[Any]:
    """Hooks that round the inputs of every layer with a range, from now on."""

    def rounding(known: Range) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (known.rounded(args[0], bits), *args[1:])

        return hook

    return [model.get_submodule(name).register_forward_pre_hook(rounding(known)) for name, known in ranges.items()]
