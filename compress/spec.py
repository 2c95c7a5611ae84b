"""What each layer should become: Scheme, LayerSpec and Plan.

Notation, used everywhere: `N` out features, `K` in features, `M` tokens, `G` groups along K, `W [N, K]` weight,
`H [K, K] = X X^T`, `Q` dequantized weight, codes `u` unsigned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import CompressError

BITS = (2, 3, 4, 8)
PER_ROW = -1  # the group size that means one scale for a whole output row
SMALLEST_GROUP = 16  # below this a 16-bit scale costs more than a bit per weight
PLAN_VERSION = 1
SCHEME_TYPES = {"bits": int, "group_size": int, "symmetric": bool}


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
class LayerSpec:
    """What one layer should become; a scheme of None leaves it dense."""

    scheme: Scheme | None = None


@dataclass(frozen=True)
class Plan:
    """`{layer name: LayerSpec}` for every compressible layer of a model: the contract between choosing and solving.

    As a file it is JSON that people read, diff and edit:
    `{"version": 1, "layers": {"model.layers.0.mlp.up_proj": {"scheme": {"bits": 4, "group_size": 128, "symmetric": true}}}}`.
    """

    layers: Mapping[str, LayerSpec]

    @staticmethod
    def uniform(in_features: Mapping[str, int], scheme: Scheme) -> Plan:
        """The same scheme for every layer, with the group size fitted to each layer's K."""
        return Plan({name: LayerSpec(scheme.fit(K)) for name, K in in_features.items()})

    @property
    def quantized(self) -> list[str]:
        return [name for name, spec in self.layers.items() if spec.scheme]

    @property
    def group_sizes(self) -> dict[str, int]:
        return {name: spec.scheme.group_size for name, spec in self.layers.items() if spec.scheme}

    def check(self, in_features: Mapping[str, int]) -> None:
        """Raise unless this plan names exactly the layers in `in_features` and every group size divides its K."""
        unknown, missing = sorted(self.layers.keys() - in_features.keys()), sorted(in_features.keys() - self.layers.keys())
        if unknown:
            raise CompressError(f"The plan names {_some(unknown)}, which the model does not have. Remove or rename them.")
        if missing:
            raise CompressError(
                f"The plan misses {_some(missing)}. Give each a scheme, or null to leave it dense; a layer to leave out "
                "altogether can be named with --skip."
            )
        for name, spec in self.layers.items():
            if spec.scheme and in_features[name] % spec.scheme.group(in_features[name]):
                K, g = in_features[name], spec.scheme.group_size
                raise CompressError(
                    f"The plan gives {name} group size {g}, which does not divide its {K} inputs; "
                    f"{spec.scheme.fit(K).group_size} would."
                )

    def to_json(self) -> str:
        layers = {name: asdict(spec) for name, spec in self.layers.items()}
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
    if not isinstance(entry, dict) or entry.keys() - {"scheme"}:
        raise CompressError(f'{source}: layer {name} should be {{"scheme": ...}}, got {json.dumps(entry)}.')
    scheme = entry.get("scheme")
    if scheme is None:
        return LayerSpec(None)
    if not isinstance(scheme, dict) or any(type(value) is not SCHEME_TYPES.get(key) for key, value in scheme.items()):
        raise CompressError(
            f"{source}: layer {name} has scheme {json.dumps(scheme)}; its keys are bits and group_size, integers, "
            "and symmetric, true or false."
        )
    try:
        return LayerSpec(Scheme(**scheme))
    except CompressError as error:
        raise CompressError(f"{source}: layer {name}: {error}") from error


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
