"""What a run did, for people and for files: per layer, in total, with the command, seed and versions that made it."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.checkpoint import FileInfo, TensorInfo
from compress.models import Anatomy
from compress.sequential import SolvedLayer

VERSIONS_OF = ("torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class LayerReport:
    """One layer: its scheme, the relative squared error of its output on calibration data and of its weight, and fallbacks."""

    name: str
    shape: tuple[int, int]
    scheme: str
    output_error: float | None
    weight_error: float
    notes: tuple[str, ...]

    @staticmethod
    def of(solved: SolvedLayer, notes: tuple[str, ...]) -> LayerReport:
        layer, q = solved.layer, solved.q
        shape = (layer.N, layer.K)
        return LayerReport(layer.name, shape, str(q.scheme), solved.output_error, solved.weight_error, q.notes + notes)


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
    size_before: int
    size_after: int
    bits_per_weight: float
    seconds: float
    peak_memory: int
    perplexity_before: float | None
    perplexity_after: float | None
    files: dict[str, FileInfo]

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


def fitted_notes(anatomy: Anatomy, asked: int, group_sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """A note for every layer whose group size had to differ from the one asked for."""
    K = anatomy.in_features
    return {
        name: (f"group size {asked} does not divide {K[name]} inputs: {'one scale per row' if g == -1 else g}",)
        for name, g in group_sizes.items()
        if g != asked
    }
