"""What the user may spend, and what every option of every unit costs in that currency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from compress import checkpoint
from compress.checkpoint import TensorInfo
from compress.errors import CompressError
from compress.formats import FORMATS, sparse
from compress.latency import LatencyTable
from compress.mixed.limits import Budget, flag
from compress.mixed.tables import Costs, cost_of
from compress.mixed.units import Space, Unit, fitted
from compress.models import Layer
from compress.spec import LayerSpec

SPARSE = "sparse"  # dense weights, stored without their zeros
NANOSECONDS = 1e9
DTYPE_NAMES = {dtype: name for name, dtype in checkpoint.DTYPES.items()}


@dataclass(frozen=True)
class Cost:
    """One currency: `table[unit][option]` in whole numbers, `fixed` for all that cannot be chosen, and how to say an amount."""

    name: str
    table: Costs
    fixed: int
    limit: int
    shown: Callable[[int], str]

    def of(self, choice: Sequence[int]) -> int:
        return self.fixed + cost_of(self.table, choice)

    def check(self, pins: Sequence[str], unpinned: Cost | None) -> None:
        """Raise where no plan or every plan keeps the limit; `unpinned` is the same cost without the user's pins."""
        smallest, largest = (self.fixed + sum(best(row) for row in self.table) for best in (min, max))
        bounds = f"plans range from {self.shown(smallest)} to {self.shown(largest)}"
        if self.limit < smallest:
            if unpinned and self.limit >= unpinned.fixed + sum(min(row) for row in unpinned.table):
                named = ", ".join(f"--pin {pin!r}" for pin in pins)
                raise CompressError(f"{flag(self.name)} {self.shown(self.limit)} cannot be kept with {named}: {bounds} then.")
            raise CompressError(f"{flag(self.name)} {self.shown(self.limit)} is out of reach: {bounds} with these options.")
        if self.limit > largest:
            raise CompressError(f"{flag(self.name)} {self.shown(self.limit)} limits nothing: {bounds} with these options.")


@dataclass(frozen=True)
class Target:
    """The checkpoint that a plan becomes: the source's tensors, which of them is each layer's, the format, the scales' dtype."""

    stored: Mapping[str, TensorInfo]
    names: Mapping[str, str]
    format: str
    scale_dtype: torch.dtype

    def layer_bytes(self, layer: Layer, spec: LayerSpec) -> int:
        """Bytes of the tensors that stand for a layer."""
        stored = self.stored[self.names[layer.name]]
        if spec.sparsity is not None and spec.scheme is None and self.format == SPARSE:
            kept = stored.numel - spec.sparsity.zeros(layer.N, layer.K)
            return sparse.nbytes(stored.numel, kept, self.scale_dtype.itemsize, len(stored.shape))
        return sum(info.nbytes for info in self._tensors(layer, spec).values())

    def tensor_bytes(self, layers: Iterable[Layer], specs: Mapping[str, LayerSpec]) -> int:
        """Bytes of all tensors, those that no plan touches with them."""
        total = sum(info.nbytes for info in self.stored.values())
        return total + sum(
            self.layer_bytes(layer, specs[layer.name]) - self.stored[self.names[layer.name]].nbytes
            for layer in layers
            if not specs[layer.name].dense
        )

    def header_bytes(self, layers: Iterable[Layer], specs: Mapping[str, LayerSpec]) -> int:
        """What names, shapes and places of all tensors take in the file; a place later in it may take more digits."""
        replaced = {
            self.names[layer.name]: self._tensors(layer, specs[layer.name]) for layer in layers if not specs[layer.name].dense
        }
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.stored.items():
            tensors |= replaced.get(name, {name: info})
        return len(checkpoint.header(tensors))

    def _tensors(self, layer: Layer, spec: LayerSpec) -> dict[str, TensorInfo]:
        name = self.names[layer.name]
        if spec.scheme is None:
            return {name: self.stored[name]}
        encoder = FORMATS["dense" if self.format == SPARSE else self.format]
        layout = encoder.layout(spec.scheme, (layer.N, layer.K), self.scale_dtype)
        return {
            name.removesuffix("weight") + suffix: TensorInfo(
                DTYPE_NAMES[dtype], shape, self.stored[name].file, 0, checkpoint.layout_bytes({suffix: (dtype, shape)})
            )
            for suffix, (dtype, shape) in layout.items()
        }


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates of every layer for one sample, and the bits of its inputs, None for those of the dense model."""

    macs: Mapping[str, int]
    activation_bits: int | None

    def bops(self, layer: Layer, spec: LayerSpec, target: Target) -> int:
        """Bit operations: zeros count like any other weight."""
        dense = _stored_bits(layer, target)
        return self.macs[layer.name] * (spec.scheme.bits if spec.scheme else dense) * (self.activation_bits or dense)

    def dense_bops(self, layer: Layer, target: Target) -> int:
        return self.macs[layer.name] * _stored_bits(layer, target) ** 2


def _stored_bits(layer: Layer, target: Target) -> int:
    stored = target.stored[target.names[layer.name]]
    return 8 * stored.nbytes // stored.numel


def costs(
    space: Space, budget: Budget, target: Target, times: LatencyTable | None = None, operations: Operations | None = None
) -> tuple[Cost, ...]:
    """Every currency of which the budget limits some, and always "size" and "avg_bits", which the first two are."""
    weights = sum(unit.weights for unit in space.units)

    def table(of: Callable[[Layer, LayerSpec], float]) -> list[list[int]]:
        return [
            [round(sum(of(layer, fitted(layer, option)) for layer in unit.layers)) for option in options]
            for unit, options in zip(space.units, space.options, strict=True)
        ]

    layers = [layer for unit in space.units for layer in unit.layers]
    rest = sum(info.nbytes for info in target.stored.values())
    rest -= sum(target.stored[target.names[layer.name]].nbytes for layer in layers)
    size = Cost("size", table(target.layer_bytes), rest + _largest_header(space, target), budget.size or 0, megabytes)
    bits = table(lambda layer, spec: _bits(layer, spec, target))
    average = Cost("avg_bits", bits, 0, int((budget.avg_bits or 0) * weights), lambda amount: f"{amount / weights:.4g}")
    found = [size, average]
    if budget.avg_sparsity is not None:
        kept = table(lambda layer, spec: layer.N * layer.K - (spec.sparsity.zeros(layer.N, layer.K) if spec.sparsity else 0))
        limit = int((1 - budget.avg_sparsity) * weights)
        found.append(Cost("avg_sparsity", kept, 0, limit, lambda amount: f"{1 - amount / weights:.4g}"))
    if budget.latency is not None:
        if times is None:
            raise CompressError("--latency needs times of this machine: make them with `compress bench --latency-table`.")
        seconds = table(lambda layer, spec: NANOSECONDS * times.of(layer.N, layer.K, spec.scheme))
        whole = sum(round(NANOSECONDS * times.of(layer.N, layer.K, None)) for layer in layers)
        found.append(Cost("latency", seconds, 0, int(budget.latency * whole), lambda amount: f"{amount / whole:.4g}x"))
    if budget.bops is not None:
        assert operations is not None
        table_of_bops = table(lambda layer, spec: operations.bops(layer, spec, target))
        whole = sum(operations.dense_bops(layer, target) for layer in layers)
        found.append(Cost("bops", table_of_bops, 0, int(budget.bops * whole), lambda amount: f"{amount / whole:.4g}x"))
    return tuple(found)


def megabytes(amount: int) -> str:
    """Bytes in words, in decimal units; four digits, as plans may differ by little."""
    return f"{amount / 1e9:.4g} GB" if amount >= 10**9 else f"{amount / 1e6:.4g} MB"


def _bits(layer: Layer, spec: LayerSpec, target: Target) -> int:
    if spec.scheme is None:
        return 8 * target.stored[target.names[layer.name]].nbytes
    return spec.scheme.stored_bits(layer.N, layer.K, 8 * target.scale_dtype.itemsize)


def _largest_header(space: Space, target: Target) -> int:
    """Of the largest plan. No other has a longer one: its numbers have no more digits, as the most bits and the smallest groups
    that a unit may take it may take together.
    """
    layers = [layer for unit in space.units for layer in unit.layers]

    def most(unit: Unit, options: Sequence[LayerSpec]) -> int:
        return max(
            range(len(options)),
            key=lambda index: sum(target.layer_bytes(layer, fitted(layer, options[index])) for layer in unit.layers),
        )

    return target.header_bytes(layers, space.specs([most(*each) for each in zip(space.units, space.options, strict=True)]))
