"""A plan with what led to it, as a file that people read, edit and apply, and as a picture."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.mixed.budget import megabytes
from compress.mixed.search import Found, Point
from compress.spec import Plan

DIGITS = 6
PLOTS = (".png", ".svg", ".pdf")


def document(found: Found, about: dict[str, Any]) -> str:
    """The plan as JSON, with a section "search" that readers of plans pass over: scores, comparisons, and `about`."""
    plan = json.loads(found.plan.to_json())
    scores = {
        unit.name: {str(option): _short(score) for option, score in zip(options, row, strict=True)}
        for unit, options, row in zip(found.space.units, found.space.options, found.scores, strict=True)
    }
    search = {
        **about,
        "spent": dict(found.spent),
        "budgets": [asdict(one) for one in found.budgets],
        "found": _point(found.point),
        "uniform": [_point(point) for point in found.uniform],
        "frontier": [_point(point) for point in found.frontier],
        "forward_passes": round(found.forwards, 2),
        "seconds": round(found.seconds, 1),
        "library": str(found.library.folder.absolute()),
        "scores": scores,
        "standard_errors": {name: _short(value) for name, value in found.errors.items()},
    }
    return json.dumps({**plan, "search": search}, indent=1, allow_nan=False) + "\n"


def check_target(path: Path, plot: Path | None) -> None:
    """Raise where a plan file or a plot cannot be written, before any work starts."""
    for name, file in (("-o", path), ("--plot", plot)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            problem = "it is a folder" if file.is_dir() else "its folder does not exist"
            raise CompressError(f"{name} {file} cannot be written: {problem}.")
    if plot is not None and plot.suffix not in PLOTS:
        raise CompressError(f"--plot {plot} is no picture's name; end it with one of {', '.join(PLOTS)}.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise CompressError("--plot needs matplotlib: pip install 'compress-toolkit[report]'.")


def save(found: Found, about: dict[str, Any]) -> None:
    """Write `document`, whole or not at all."""
    path = found.path
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(document(found, about), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise CompressError(f"Cannot write {path}: {error}. Choose another -o.") from error
    finally:
        with suppress(OSError):  # as a rule it has been renamed
            temporary.unlink()


def library_of(plan: str | Path | Plan | None) -> Path | None:
    """The folder of solved layers that a plan file was made from, where it is still there."""
    if plan is None or isinstance(plan, Plan):
        return None
    try:
        section = json.loads(Path(plan).read_text(encoding="utf-8")).get("search", {})
        folder = Path(section["library"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a plan that was written by hand; whether it is a plan at all is for Plan.load to say
    return folder if folder.is_dir() else None


def plot(found: Found, path: Path) -> None:
    """Size against measured loss: the frontier, uniform plans and the plan that was found. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for points, style, label in (
        (found.frontier, "o-", "best by prediction"),
        (found.uniform, "s", "uniform"),
        ([found.point], "*", "found"),
    ):
        known = [(point.size / 1e6, point.measured) for point in points if point.measured is not None]
        axes.plot([size for size, _ in known], [loss for _, loss in known], style, label=label)
    for point in found.uniform:
        if point.measured is not None:
            axes.annotate(f" {point.name}", (point.size / 1e6, point.measured), fontsize=8)
    axes.set(xlabel="weight files (MB)", ylabel="KL to the dense model (nats)", yscale="log")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CompressError(f"Cannot write {path}: {error}. Choose another --plot.") from error


def against_uniform(found: Found) -> tuple[float, float] | None:
    """What the plan loses and what uniform plans of its size do, both measured or else both predicted; None outside their range.

    The two uniform plans next to it in size are mixed: losses add up, so that a mix loses their weighted mean.
    """
    points = sorted([found.point, *found.uniform], key=lambda point: point.size)
    measured = [point.measured for point in points if point.measured is not None]
    losses = measured if len(measured) == len(points) else [point.predicted for point in points]
    at = points.index(found.point)
    if not 0 < at < len(points) - 1:
        return None
    smaller, larger = points[at - 1].size, points[at + 1].size
    part = (found.point.size - smaller) / (larger - smaller) if larger > smaller else 0.5
    return losses[at], losses[at - 1] * (1 - part) + losses[at + 1] * part


def line(point: Point) -> tuple[str, str, str, str]:
    """A plan as a row of a table: name, size, predicted and measured loss."""
    measured = "" if point.measured is None else f"{point.measured:.4g}"
    return point.name, megabytes(point.size), f"{point.predicted:.4g}", measured


def _point(point: Point) -> dict[str, Any]:
    """JSON has no infinity, which a plan that overflows measures."""
    infinite = point.measured is not None and math.isinf(point.measured)
    return asdict(point) | ({"measured": "inf"} if infinite else {})


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
