"""What a run did, for people and for files: per layer, in total, with the command, seed and versions that made it."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress import qtensor
from compress.checkpoint import FileInfo, TensorInfo
from compress.sequential import SolvedLayer
from compress.solvers.masks import KEPT
from compress.spec import PER_ROW, Plan
from compress.structured.rows import ShrunkLayer

VERSIONS_OF = ("torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class LayerReport:
    """One layer: what it became, the relative squared error of its output on calibration data and of its weight, and fallbacks.

    `zeros` counts its weights that are zero, and `sparsity` is their fraction, where this run or an earlier one pruned it.
    """

    name: str
    shape: tuple[int, int]
    spec: str
    zeros: int | None
    sparsity: float | None
    output_error: float | None
    weight_error: float
    notes: tuple[str, ...]

    @staticmethod
    def of(one: SolvedLayer, group_size: int | None = None) -> LayerReport:
        """`group_size` is the one asked for; a layer that could not have it says so."""
        layer, scheme, notes = one.layer, one.spec.scheme, one.solved.notes
        if scheme and group_size is not None and scheme.group_size != group_size:
            got = "one scale per row" if scheme.group_size == PER_ROW else scheme.group_size
            notes += (f"group size {group_size} does not divide {layer.K} inputs: {got}",)
        counted = one.spec.sparsity is not None or KEPT in notes
        zeros = qtensor.zeros(one.solved) if counted else None
        sparsity = None if zeros is None else zeros / (layer.N * layer.K)
        shape = (layer.N, layer.K)
        errors = (one.output_error, one.weight_error)
        return LayerReport(layer.name, shape, str(one.spec), zeros, sparsity, *errors, fallbacks_of(notes))

    @staticmethod
    def shrunk(one: ShrunkLayer) -> LayerReport:
        """A layer that lost rows or inputs."""
        shape, (N, K) = (one.layer.N, one.layer.K), one.shape
        return LayerReport(one.layer.name, shape, f"{N}x{K}", None, None, one.output_error, one.weight_error, one.notes)


@dataclass(frozen=True)
class Report:
    """Everything about one run. Sizes are bytes of tensors; `bits_per_weight` counts scales and everything left dense."""

    command: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    source: str
    out: str
    format: str
    calibration: str | None
    layers: tuple[LayerReport, ...]
    dense: dict[str, str]
    warnings: tuple[str, ...]
    readers: tuple[str, ...]  # programs that load the result, by the rules of `compress check`
    size_before: int
    size_after: int
    bits_per_weight: float
    seconds: float
    peak_memory: int
    perplexity_before: float | None
    perplexity_after: float | None
    files: dict[str, FileInfo]
    resumed_blocks: int  # solved by an earlier run that was interrupted; `seconds` and `peak_memory` are this run's

    @property
    def zeros(self) -> tuple[int, int]:
        """Zeros, and all weights, of the layers that were pruned."""
        pruned = [layer for layer in self.layers if layer.zeros is not None]
        return sum(layer.zeros or 0 for layer in pruned), sum(math.prod(layer.shape) for layer in pruned)

    @property
    def fallbacks(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.notes]

    @property
    def output_errors(self) -> tuple[float, float] | None:
        """Worst and median relative output error; None where nothing was calibrated."""
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        return (max(errors), statistics.median(errors)) if errors else None

    @property
    def weight_errors(self) -> tuple[float, float]:
        errors = [layer.weight_error for layer in self.layers]
        return max(errors), statistics.median(errors)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def fallbacks_of(notes: tuple[str, ...]) -> tuple[str, ...]:
    """The notes of a layer that say what could not be done as asked."""
    return tuple(note for note in notes if note != KEPT)


def kept_zeros(layers: Sequence[LayerReport], plan: Plan) -> tuple[str, ...]:
    """Say how many layers keep the zeros that the source has; nothing where none does."""
    pruned = [layer for layer in layers if layer.zeros is not None and not plan.layers[layer.name].sparsity]
    if not pruned:
        return ()
    share = sum(layer.zeros or 0 for layer in pruned) / sum(math.prod(layer.shape) for layer in pruned)
    return (f"{len(pruned)} layers are pruned in the source: their zeros, {share:.1%} of their weights, are kept.",)


def sizes(source: Mapping[str, TensorInfo], after: int) -> tuple[int, float]:
    """Bytes before, and bits per weight after: all bytes of the new checkpoint over all weights of the old one."""
    weights = sum(info.numel for info in source.values())
    return sum(info.nbytes for info in source.values()), 8 * after / weights


def versions() -> dict[str, str]:
    found = {name: version(name) for name in VERSIONS_OF}
    return {"python": platform.python_version(), **found}


def command() -> str:
    """The command line that is running, as it can be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a verb as JSON can hold them."""
    return {name: _plain_value(value) for name, value in arguments.items() if name != "track"}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Plan):
        return "(given)"
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
