"""What each layer should become: Scheme, Pattern, Sparsity, LayerSpec and Plan.

Notation, used everywhere: `N` out features, `K` in features, `M` tokens, `G` groups along K, `W [N, K]` weight,
`H [K, K] = X X^T`, `Q` dequantized weight, codes `u` unsigned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from compress.errors import CompressError

BITS = (2, 3, 4, 8)
PER_ROW = -1  # the group size that means one scale for a whole output row
GROUP_SIZES = (128, 64, 32, 16)  # that every runtime has kernels for; below, a 16-bit scale costs more than a bit per weight
Grid = Literal["int", "ternary", "fp8", "mxfp4", "nvfp4"]
Form = Literal["int", "e2m1", "e4m3"]  # what codes stand for; those but int are in `compress.kernels.minifloat`
PLAN_VERSION = 1
SCHEME_TYPES = {"bits": int, "group_size": int, "symmetric": bool, "grid": str}
SPARSITY_TYPES = {"fraction": (int, float), "pattern": str}
PATTERN = re.compile(r"unstructured|row|(?P<n>\d+):(?P<m>\d+)|block:(?P<rows>\d+)x(?P<cols>\d+)")
PATTERNS = "unstructured, N:M such as 2:4, block:RxC such as block:1x4, or row"


@dataclass(frozen=True)
class Fixed:
    """What a grid other than int leaves no choice in: bits, inputs per scale (None: any), and the form of its codes.

    Also the bits of a scale, None for one in the model's dtype, and those of what all scales of a layer share.
    """

    bits: int
    group_size: int | None
    form: Form = "int"
    scale_bits: int | None = None
    shared_bits: int = 0


FIXED: Mapping[Grid, Fixed] = MappingProxyType(
    {
        "ternary": Fixed(2, None),
        "fp8": Fixed(8, PER_ROW, "e4m3"),
        "mxfp4": Fixed(4, 32, "e2m1", scale_bits=8),
        "nvfp4": Fixed(4, 16, "e2m1", scale_bits=8, shared_bits=32),
    }
)


@dataclass(frozen=True)
class Scheme:
    """The grid of a layer: which numbers its codes of `bits` bits stand for, times one scale per `group_size` inputs of a row.

    "int" is uniform: `w = scale * (u - zero)` with `0 <= u < 2^bits`. Symmetric grids have `zero = 2^(bits-1)`. A scale may be
    negative: the grid has one more level below zero than above, and the sign decides which side of the group gets it.
    "ternary" is -1, 0 and 1: int of 2 bits that leaves its lowest code unused, as which it is written.
    "fp8" is e4m3: floating-point numbers up to 448, and a scale per row. The other two are e2m1, `0, 0.5, 1, 1.5, 2, 3, 4, 6`
    and their negatives: "mxfp4" (OCP Microscaling Formats 1.0) with a power of two for every 32 inputs, "nvfp4" with an e4m3
    number for every 16, divided by one that the whole layer shares.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    grid: Grid = "int"

    def __post_init__(self) -> None:
        if self.grid != "int":
            self._check_fixed()
        if self.bits not in BITS:
            raise CompressError(f"bits is {self.bits}; choose one of {', '.join(map(str, BITS))}.")
        if self.group_size != PER_ROW and self.group_size < 1:
            raise CompressError(f"group size is {self.group_size}; use a positive size such as 128, or -1 for one scale per row.")

    def _check_fixed(self) -> None:
        fixed = FIXED[self.grid]
        if self.bits != fixed.bits:
            raise CompressError(f"bits is {self.bits}, but grid {self.grid} has {fixed.bits}; leave out the bits.")
        if fixed.group_size not in (None, self.group_size):
            needs = "one scale per row" if fixed.group_size == PER_ROW else f"groups of {fixed.group_size}"
            raise CompressError(f"group size is {self.group_size}, but grid {self.grid} has {needs}; leave out the group size.")
        if not self.symmetric:
            raise CompressError(f"Grid {self.grid} has no zero points; it is always symmetric.")

    @staticmethod
    def of(grid: str = "int", bits: int | None = None, group_size: int | None = None, symmetric: bool = True) -> Scheme:
        """A scheme with what the grid itself has where nothing else is asked for."""
        if grid not in ("int", *FIXED):
            raise CompressError(f"There is no grid {grid}; choose one of int, {', '.join(FIXED)}.")
        fixed = FIXED.get(grid, Fixed(Scheme.bits, Scheme.group_size))
        size = Scheme.group_size if fixed.group_size is None else fixed.group_size
        return Scheme(fixed.bits if bits is None else bits, size if group_size is None else group_size, symmetric, grid)

    @property
    def form(self) -> Form:
        """What a code stands for."""
        return FIXED[self.grid].form if self.grid in FIXED else "int"

    @property
    def label(self) -> str:
        """For names of files."""
        return f"{self.bits}bit" if self.grid == "int" else self.grid

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def lowest(self) -> int:
        """The first code that is used."""
        return 1 if self.grid == "ternary" else 0

    @property
    def zero(self) -> int:
        """The code that stands for zero where there are no zero points."""
        return self.levels // 2 if self.form == "int" else 0

    def group(self, K: int) -> int:
        """Inputs that share a scale in a row of `K` inputs."""
        return K if self.group_size == PER_ROW else self.group_size

    def groups(self, K: int) -> int:
        """G, the number of scales in a row of `K` inputs."""
        return K // self.group(K)

    def fit(self, K: int) -> Scheme | None:
        """This scheme if its group size divides `K`, else with the largest of GROUP_SIZES below that does, else a scale per row.

        None where the grid has a group size of its own, and that does not divide `K`.
        """
        if self.group_size == PER_ROW or K % self.group_size == 0:
            return self
        if self.grid in FIXED and FIXED[self.grid].group_size is not None:
            return None
        return replace(self, group_size=next((g for g in GROUP_SIZES if g < self.group_size and K % g == 0), PER_ROW))

    def check_taken(self, in_features: Iterable[int]) -> None:
        """Raise for a group size that is none of the usual ones and divides the inputs of no layer, given by their numbers."""
        widths = sorted(set(in_features))
        if self.group_size in (PER_ROW, *GROUP_SIZES) or any(K % self.group_size == 0 for K in widths):
            return
        fitting = [g for g in GROUP_SIZES if any(K % g == 0 for K in widths)]
        raise CompressError(
            f"The group size is {self.group_size}, which divides the inputs of no layer ({_some(map(str, widths))}). Use "
            f"{', '.join(map(str, fitting))}{' or ' if fitting else ''}-1 for one scale per row."
        )

    def stored_bits(self, N: int, K: int, scale_bits: int) -> int:
        """Bits of the codes, scales and zero points of N x K weights, where scales of the model's own dtype have `scale_bits`."""
        fixed = FIXED.get(self.grid, Fixed(self.bits, self.group_size))
        group = (fixed.scale_bits or scale_bits) + (0 if self.symmetric else self.bits)
        return N * (K * self.bits + self.groups(K) * group) + fixed.shared_bits

    def __str__(self) -> str:
        if self.form != "int":
            return self.grid
        group = "row" if self.group_size == PER_ROW else f"g{self.group_size}"
        name = f"int{self.bits}" if self.grid == "int" else self.grid
        return f"{name} {group}{'' if self.symmetric else ' asym'}"


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
        kept, of = self.nm or (0, 1)
        if kept >= of:
            raise CompressError(f"Pattern {self.pattern} keeps {kept} of every {of} weights, so that nothing would be pruned.")
        if not 0 <= self.fraction < 1:
            meant = f" Did you mean {self.fraction / 100:g}?" if 1 < self.fraction < 100 else ""
            raise CompressError(f"sparsity is {self.fraction:g}; it is a fraction of the weights, from 0 to below 1.{meant}")
        if self.nm and self.fraction != 1 - kept / of:
            meant = f"a sparsity of {1 - kept / of:g}, not {self.fraction:g}"
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

    def __post_init__(self) -> None:
        if self.scheme and self.scheme.grid == "nvfp4" and self.sparsity and self.sparsity.nm is None:
            raise CompressError(
                f"Grid nvfp4 has one number for layers that runtimes fuse, which pattern {self.sparsity.pattern} solves one by "
                "one; use an N:M pattern, or another grid."
            )

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
        """The same for every layer, with the group size fitted to each layer's K; dense where it has none that fits.

        Raises CompressError for a group size that no layer can take.
        """
        if scheme:
            scheme.check_taken(in_features.values())
        return Plan({name: LayerSpec(scheme.fit(K) if scheme else None, sparsity) for name, K in in_features.items()})

    def on_grid(self, in_features: Mapping[str, int], scheme: Scheme | None) -> Plan:
        """This plan with a grid for every layer, its group size fitted to the layer's K."""
        if scheme is None:
            return self
        scheme.check_taken(in_features.values())
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
                fits = spec.scheme.fit(K)
                raise CompressError(
                    f"The plan gives {name} group size {spec.scheme.group_size}, which does not divide its {K} inputs; "
                    + (f"{fits.group_size} would." if fits else f"grid {spec.scheme.grid} has no other: leave it dense.")
                )
            if spec.sparsity and (why := spec.sparsity.misfit(N, K)):
                raise CompressError(
                    f"Pattern {spec.sparsity.pattern} does not fit {name}: {why}. Choose another pattern, or leave the layer "
                    f"dense with --skip '{name}'."
                )

    def to_json(self) -> str:
        layers = {name: _spec_to_json(spec) for name, spec in self.layers.items()}
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
            raise CompressError(f"Cannot read the plan {path}: {error}. Plans are files of `compress search`.") from error


def _spec_to_json(spec: LayerSpec) -> dict[str, Any]:
    entry = {key: value for key, value in asdict(spec).items() if value or key == "scheme"}
    if spec.scheme and spec.scheme.grid == "int":
        del entry["scheme"]["grid"]
    return entry


def _spec_from_json(name: str, entry: object, source: str) -> LayerSpec:
    if not isinstance(entry, dict) or entry.keys() - {"scheme", "sparsity"}:
        raise CompressError(
            f'{source}: layer {name} should be {{"scheme": ...}}, perhaps with "sparsity", got {json.dumps(entry)}.'
        )
    scheme, sparsity = entry.get("scheme"), entry.get("sparsity")
    if scheme is not None and not _typed(scheme, SCHEME_TYPES):
        raise CompressError(
            f"{source}: layer {name} has scheme {json.dumps(scheme)}; its keys are bits and group_size, integers, "
            "symmetric, true or false, and grid, a string."
        )
    if sparsity is not None and not (_typed(sparsity, SPARSITY_TYPES) and "fraction" in sparsity):
        raise CompressError(
            f"{source}: layer {name} has sparsity {json.dumps(sparsity)}; its keys are fraction, a number, and pattern, a string."
        )
    try:
        return LayerSpec(Scheme.of(**scheme) if scheme else None, Sparsity(**sparsity) if sparsity else None)
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
