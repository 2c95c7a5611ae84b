"""How a verb that writes a checkpoint shows its report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from compress.cli import progress
from compress.cli.progress import duration, size

if TYPE_CHECKING:
    from compress.report import LayerReport, Report

SHOWN = 8  # kinds of layers on the screen; the report has them all
NUMBER = re.compile(r"\d+(\.\d+)?")
REPORT_NAME = "compress_report.json"


def show(report: Report, as_json: bool) -> None:
    """Print a report: as JSON, or as a table with warnings and fallbacks below."""
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    screen = progress.console()
    screen.print(progress.facts(_rows(report)))
    for warning in report.warnings:
        screen.print(f"Note: {warning}", soft_wrap=True)
    for count, name, note in kinds(report.fallbacks):
        layers = name if count == 1 else f"{count} layers, such as {name}"
        screen.print(f"Fallback: {layers}: {note}", soft_wrap=True)
    if report.fallbacks:
        screen.print(f"Every layer's are in {report.out}/{REPORT_NAME}.", soft_wrap=True)


def kinds(layers: Iterable[LayerReport]) -> Iterator[tuple[int, str, str]]:
    """Fallbacks by kind, notes that differ in numbers alone being of one: how many layers, and the first with its note."""
    found: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        for note in layer.notes:
            found.setdefault(NUMBER.sub("#", note), []).append((layer.name, note))
    for members in found.values():
        yield len(members), *members[0]


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    specs = Counter(layer.spec for layer in report.layers)
    shown = [f"{count} x {spec}" for spec, count in specs.most_common(SHOWN)]
    more = [f"{len(specs) - SHOWN} more kinds"] if len(specs) > SHOWN else []
    left = "as they were" if report.arguments.get("pattern") == "row" else "dense"
    yield "layers", ", ".join(shown + more) + f"; {len(report.dense)} left {left}"
    zeros, weights = report.zeros
    if weights:
        yield "zeros", f"{zeros:,} of {weights:,} weights in pruned layers: {zeros / weights:.2%}"
    yield "bits per weight", f"{report.bits_per_weight:.2f} over all weights, with scales and everything left dense"
    yield "size", f"{size(report.size_before)} -> {size(report.size_after)}, {_change(report)}"
    if report.output_errors:
        worst, median = report.output_errors
        yield "output error", f"{worst:.2%} worst, {median:.2%} median of all layers (relative, squared, on the calibration data)"
    else:
        worst, median = report.weight_errors
        yield "weight error", f"{worst:.2%} worst, {median:.2%} median of all layers (relative, squared)"
    yield "fallbacks", f"{len(report.fallbacks)} layers, see below" if report.fallbacks else "none"
    if report.perplexity_before is not None and report.perplexity_after is not None:
        yield "perplexity", f"{report.perplexity_before:.3f} -> {report.perplexity_after:.3f} on held-out text"
    if report.resumed_blocks:
        yield "resumed", f"{report.resumed_blocks} blocks are from an earlier run; time and memory are those of this one"
    yield "loads in", ", ".join(report.readers) or "no program that is known; see the notes"
    yield "time", f"{duration(report.seconds)}, at most {size(report.peak_memory)} of memory (mapped files included)"
    yield "written", report.out


def _change(report: Report) -> str:
    if report.size_after == report.size_before:
        return f"the same, as format {report.format} stores every weight in full"
    return f"{report.size_before / report.size_after:.2f}x smaller"
