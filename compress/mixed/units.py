"""What can be chosen: units of layers that take one option together, and the options of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.errors import CompressError
from compress.formats.names import fused_sets
from compress.models import Anatomy, Layer
from compress.spec import BITS, LayerSpec, Plan, Scheme

EXPERTS = ".experts."
DENSE = "dense"  # the pin that leaves a layer as it is
PIN = re.compile(rf"(?P<regex>.+)=(?P<bits>\d+|{DENSE})")


@dataclass(frozen=True)
class Unit:
    """Layers that runtimes fuse, or experts of one layer, and so must be alike; any other layer is a unit of its own."""

    name: str
    layers: tuple[Layer, ...]
    block: int

    @property
    def weights(self) -> int:
        return sum(layer.N * layer.K for layer in self.layers)


@dataclass(frozen=True)
class Space:
    """Every unit in model order with its options, each as it was asked for: group sizes are fitted layer by layer."""

    units: tuple[Unit, ...]
    options: tuple[tuple[LayerSpec, ...], ...]

    @property
    def wanted(self) -> dict[str, tuple[LayerSpec, ...]]:
        """The distinct fitted options of every layer."""
        return {
            layer.name: tuple(dict.fromkeys(fitted(layer, option) for option in options))
            for unit, options in zip(self.units, self.options, strict=True)
            for layer in unit.layers
        }

    def specs(self, choice: Sequence[int]) -> dict[str, LayerSpec]:
        """What a choice, one option's index per unit, makes of every layer."""
        return {
            layer.name: fitted(layer, options[index])
            for unit, options, index in zip(self.units, self.options, choice, strict=True)
            for layer in unit.layers
        }

    def with_options(self, options: Mapping[int, LayerSpec]) -> dict[str, LayerSpec]:
        """What some units' options, by the units' numbers, make of their layers."""
        return {layer.name: fitted(layer, option) for u, option in options.items() for layer in self.units[u].layers}

    def plan(self, choice: Sequence[int]) -> Plan:
        return Plan(self.specs(choice))


def fitted(layer: Layer, option: LayerSpec) -> LayerSpec:
    return LayerSpec(option.scheme.fit(layer.K) if option.scheme else None, option.sparsity)


def space(anatomy: Anatomy, options: Sequence[LayerSpec], pins: Sequence[str] = ()) -> Space:
    """The units of a model with their options: `options`, or for layers that a pin "REGEX=BITS" names only those bits.

    A pin may ask for bits that are no option otherwise, or for "dense". Raises for pins that are malformed, match nothing,
    or contradict each other.
    """
    for option in options:
        if option.scheme:
            option.scheme.check_taken(anatomy.in_features.values())
    units = tuple(_units(anatomy))
    pinned = _pinned(units, pins)
    return Space(units, tuple(_allowed(options, pinned[unit.name]) for unit in units))


def _units(anatomy: Anatomy) -> Iterator[Unit]:
    together: dict[str, str] = {}
    for layer in anatomy.layers:
        if EXPERTS in layer.name:
            together[layer.name] = layer.name.partition(EXPERTS)[0] + EXPERTS.rstrip(".")
    for fused, parts in fused_sets(name for name in anatomy.in_features if name not in together).items():
        together |= dict.fromkeys(parts, fused)
    members: dict[str, list[Layer]] = {}
    for layer in anatomy.layers:
        members.setdefault(together.get(layer.name, layer.name), []).append(layer)
    blocks = {layer.name: i for i, block in enumerate(anatomy.blocks) for layer in anatomy.of_block(block)}
    for name, layers in members.items():
        yield Unit(name, tuple(layers), blocks[layers[0].name])


def _pinned(units: Iterable[Unit], pins: Sequence[str]) -> Mapping[str, str | None]:
    found: dict[str, tuple[str, str]] = {}
    names = {unit.name: [layer.name for layer in unit.layers] for unit in units}
    for pin in pins:
        parsed = PIN.fullmatch(pin)
        if parsed is None or (parsed["bits"] != DENSE and int(parsed["bits"]) not in BITS):
            raise CompressError(f"--pin {pin!r} is not REGEX=BITS with BITS one of {', '.join(map(str, BITS))} or {DENSE}.")
        try:
            matching = [unit for unit, layers in names.items() if any(re.search(parsed["regex"], name) for name in layers)]
        except re.error as error:
            raise CompressError(f"--pin {parsed['regex']!r} is not a regular expression: {error}.") from error
        if not matching:
            raise CompressError(f"--pin {pin!r} matches no layer that can be compressed; `compress inspect` lists them.")
        for unit in matching:
            if unit in found and found[unit][1] != parsed["bits"]:
                raise CompressError(f"--pin {found[unit][0]!r} and --pin {pin!r} both name {unit}, and ask for different things.")
            found[unit] = (pin, parsed["bits"])
    return {name: found[name][1] if name in found else None for name in names}


def _allowed(options: Sequence[LayerSpec], pin: str | None) -> tuple[LayerSpec, ...]:
    if pin is None:
        return tuple(options)
    if pin == DENSE:
        return (LayerSpec(),)
    bits = int(pin)
    same = tuple(option for option in options if option.scheme and option.scheme.bits == bits)
    if same:
        return same
    groups = [option.scheme.group_size for option in options if option.scheme]
    symmetric = all(option.scheme.symmetric for option in options if option.scheme)
    return (LayerSpec(Scheme(bits, max(groups, default=128), symmetric)),)
