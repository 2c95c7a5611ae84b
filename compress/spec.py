"""What each layer should become: Scheme, Pattern, Sparsity, LayerSpec and Plan.

Notation, used everywhere: `N` out features, `K` in features, `M` tokens, `G` groups along K, `W [N, K]` weight,
`H [K, K] = X X^T`, `Q` dequantized weight, codes `u` unsigned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.errors import CompressError

BITS = (2, 3, 4, 8)
PER_ROW = -1  # the group size that means one scale for a whole output row
SMALLEST_GROUP = 16  # below this a 16-bit scale costs more than a bit per weight
PLAN_VERSION = 1
SCHEME_TYPES = {"bits": int, "group_size": int, "symmetric": bool}
SPARSITY_TYPES = {"fraction": (int, float), "pattern": str}
PATTERN = re.compile(r"unstructured|row|(?P<n>\d+):(?P<m>\d+)|block:(?P<rows>\d+)x(?P<cols>\d+)")
PATTERNS = "unstructured, N:M such as 2:4, block:RxC such as block:1x4, or row"


@dataclass(frozen=True)
class Scheme:
    """A uniform integer grid: `w = scale * (u - zero)` with `0 <= u < 2^bits`, one scale per `group_size` inputs of a row.

    Symmetric grids have `zero = 2^(bits-1)`. A scale may be negative: the grid has one more level below zero than
    above, and the sign decides which side of the group gets it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise CompressError(f"bits is {self.bits}; choose one of {', '.join(map(str, BITS))}.")
        if self.group_size != PER_ROW and self.group_size < 1:
            raise CompressError(f"group size is {self.group_size}; use a positive size such as 128, or -1 for one scale per row.")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def group(self, K: int) -> int:
        """Inputs that share a scale in a row of `K` inputs."""
        return K if self.group_size == PER_ROW else self.group_size

    def groups(self, K: int) -> int:
        """G, the number of scales in a row of `K` inputs."""
        return K // self.group(K)

    def fit(self, K: int) -> Scheme:
        """This scheme with the largest group size that divides `K`; one scale per row when that would be tiny."""
        if self.group_size == PER_ROW or K % self.group_size == 0:
            return self
        divisor = max(g for g in range(1, min(self.group_size, K) + 1) if K % g == 0)
        return Scheme(self.bits, divisor if divisor >= SMALLEST_GROUP else PER_ROW, self.symmetric)

    def __str__(self) -> str:
        group = "row" if self.group_size == PER_ROW else f"g{self.group_size}"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asym'}"


@dataclass(frozen=True)
class Sparsity:
    """The fraction of a layer's weights that become zero, and the pattern that they form.

    Patterns: "unstructured"; "N:M" keeps N of every M consecutive inputs of a row; "block:RxC" zeroes blocks of R rows by C
    inputs; "row" removes whole neurons and heads, so that the layer itself gets smaller.
    """

    fraction: float
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        found = PATTERN.fullmatch(self.pattern)
        if found is None or not all(int(number) for number in found.groups() if number):
            raise CompressError(f"The pattern is {self.pattern!r}; use {PATTERNS}.")
        if not 0 <= self.fraction < 1:
            raise CompressError(f"sparsity is {self.fraction:g}; it is a fraction of the weights, from 0 to below 1.")
        if self.nm and (self.nm[0] >= self.nm[1] or self.fraction != 1 - self.nm[0] / self.nm[1]):
            kept, of = self.nm
            meant = f"a sparsity of {1 - kept / of:g}, not {self.fraction:g}" if kept < of else "so that nothing would be pruned"
            raise CompressError(f"Pattern {self.pattern} keeps {kept} of every {of} weights, {meant}.")

    @cached_property
    def nm(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern."""
        found = PATTERN.fullmatch(self.pattern)
        return (int(found["n"]), int(found["m"])) if found and found["n"] else None

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and inputs of the smallest unit that is zeroed; (1, 1) where that is a weight."""
        found = PATTERN.fullmatch(self.pattern)
        return (int(found["rows"]), int(found["cols"])) if found and found["rows"] else (1, 1)

    @staticmethod
    def of(pattern: str, fraction: float | None) -> Sparsity:
        """A pattern at a fraction, which an N:M pattern brings along."""
        found = PATTERN.fullmatch(pattern)
        if fraction is None and found and found["n"] and int(found["m"]):
            fraction = 1 - int(found["n"]) / int(found["m"])
        return Sparsity(0.5 if fraction is None else fraction, pattern)

    def units(self, N: int, K: int) -> int:
        """How many units of the pattern a layer of N x K weights has."""
        rows, cols = self.block
        return (N // rows) * (K // cols)

    def pruned(self, N: int, K: int) -> int:
        """How many of the units become zero."""
        return round(self.fraction * self.units(N, K))

    def zeros(self, N: int, K: int) -> int:
        """How many of the weights become zero."""
        if self.nm:
            return N * K // self.nm[1] * (self.nm[1] - self.nm[0])
        rows, cols = self.block
        return self.pruned(N, K) * rows * cols

    def misfit(self, N: int, K: int) -> str | None:
        """Why the pattern cannot cover N x K weights, or None."""
        rows, cols = self.block
        if self.nm and K % self.nm[1]:
            return f"its {K} inputs are not a multiple of {self.nm[1]}"
        if K % cols:
            return f"its {K} inputs are not a multiple of {cols}"
        return f"its {N} rows are not a multiple of {rows}" if N % rows else None

    def __str__(self) -> str:
        return f"{self.fraction:.3g} {self.pattern}"


@dataclass(frozen=True)
class LayerSpec:
    """What one layer should become: its grid, None for none; and its zeros, None for none. With neither it stays dense."""

    scheme: Scheme | None = None
    sparsity: Sparsity | None = None

    @property
    def dense(self) -> bool:
        return self.scheme is None and self.sparsity is None

    def __str__(self) -> str:
        return ", ".join(str(part) for part in (self.scheme, self.sparsity) if part) or "dense"


@dataclass(frozen=True)
class Plan:
    """`{layer name: LayerSpec}` for every compressible layer of a model: the contract between choosing and solving.

    As a file it is JSON that people read, diff and edit:
    `{"version": 1, "layers": {"model.layers.0.mlp.up_proj": {"scheme": {"bits": 4, "group_size": 128, "symmetric": true}}}}`.
    """

    layers: Mapping[str, LayerSpec]

    @staticmethod
    def uniform(in_features: Mapping[str, int], scheme: Scheme | None, sparsity: Sparsity | None = None) -> Plan:
        """The same for every layer, with the group size fitted to each layer's K."""
        return Plan({name: LayerSpec(scheme.fit(K) if scheme else None, sparsity) for name, K in in_features.items()})

    def on_grid(self, in_features: Mapping[str, int], scheme: Scheme | None) -> Plan:
        """This plan with a grid for every layer, its group size fitted to the layer's K."""
        if scheme is None:
            return self
        return Plan({name: LayerSpec(scheme.fit(in_features[name]), spec.sparsity) for name, spec in self.layers.items()})

    @property
    def changed(self) -> list[str]:
        """The layers that do not stay dense."""
        return [name for name, spec in self.layers.items() if not spec.dense]

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise unless this plan names exactly the layers in `shapes`, (N, K) each, and its groups and patterns divide them."""
        unknown, missing = sorted(self.layers.keys() - shapes.keys()), sorted(shapes.keys() - self.layers.keys())
        if unknown:
            raise CompressError(f"The plan names {_some(unknown)}, which the model does not have. Remove or rename them.")
        if missing:
            raise CompressError(
                f"The plan misses {_some(missing)}. Give each a scheme, a sparsity, or null to leave it dense; a layer to leave "
                "out altogether can be named with --skip."
            )
        for name, spec in self.layers.items():
            N, K = shapes[name]
            if spec.scheme and K % spec.scheme.group(K):
                raise CompressError(
                    f"The plan gives {name} group size {spec.scheme.group_size}, which does not divide its {K} inputs; "
                    f"{spec.scheme.fit(K).group_size} would."
                )
            if spec.sparsity and (why := spec.sparsity.misfit(N, K)):
                raise CompressError(
                    f"Pattern {spec.sparsity.pattern} does not fit {name}: {why}. Choose another pattern, or leave the layer "
                    f"dense with --skip '{name}'."
                )

    def to_json(self) -> str:
        layers = {name: {k: v for k, v in asdict(spec).items() if v or k == "scheme"} for name, spec in self.layers.items()}
        return json.dumps({"version": PLAN_VERSION, "layers": layers}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "the plan") -> Plan:
        """Parse `to_json`'s output; `source` names the file in errors."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise CompressError(f"{source} is not JSON: {error}.") from error
        if (
            not isinstance(document, dict)
            or document.get("version") != PLAN_VERSION
            or not isinstance(document.get("layers"), dict)
        ):
            raise CompressError(f'{source} is not a plan: expected {{"version": {PLAN_VERSION}, "layers": {{...}}}}.')
        return Plan({name: _spec_from_json(name, entry, source) for name, entry in document["layers"].items()})

    @staticmethod
    def load(path: str | Path) -> Plan:
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CompressError(f"Cannot read the plan {path}: {error}.") from error


def _spec_from_json(name: str, entry: object, source: str) -> LayerSpec:
    if not isinstance(entry, dict) or entry.keys() - {"scheme", "sparsity"}:
        raise CompressError(
            f'{source}: layer {name} should be {{"scheme": ...}}, perhaps with "sparsity", got {json.dumps(entry)}.'
        )
    scheme, sparsity = entry.get("scheme"), entry.get("sparsity")
    if scheme is not None and not _typed(scheme, SCHEME_TYPES):
        raise CompressError(
            f"{source}: layer {name} has scheme {json.dumps(scheme)}; its keys are bits and group_size, integers, "
            "and symmetric, true or false."
        )
    if sparsity is not None and not (_typed(sparsity, SPARSITY_TYPES) and "fraction" in sparsity):
        raise CompressError(
            f"{source}: layer {name} has sparsity {json.dumps(sparsity)}; its keys are fraction, a number, and pattern, a string."
        )
    try:
        return LayerSpec(Scheme(**scheme) if scheme else None, Sparsity(**sparsity) if sparsity else None)
    except CompressError as error:
        raise CompressError(f"{source}: layer {name}: {error}") from error


def _typed(entry: object, types: Mapping[str, Any]) -> bool:
    """Whether `entry` is an object with none but these keys and types; a JSON true is not an integer."""
    return isinstance(entry, dict) and all(
        key in types and isinstance(value, types[key]) and (isinstance(value, bool) == (types[key] is bool))
        for key, value in entry.items()
    )


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
