"""`compress quantize`: flags, a progress bar, and the table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from compress.report import Report
    from compress.sequential import SolvedBlock

SHOWN = 8  # fallbacks on the screen; the report has them all
REPORT_NAME = "compress_report.json"


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), help="Folder to write.  [default: the model's name and bits, in this folder]")
@click.option("--bits", type=int, default=4, help="Bits per weight: 2, 3, 4 or 8.")
@click.option("--group-size", type=int, default=128, help="Weights that share a scale: 128, 64, 32, ...; -1 is a whole row.")
@click.option("--symmetric/--asymmetric", default=True, help="Without or with zero points.")
@click.option("--method", type=click.Choice(["gptq", "rtn"]), default="gptq", help="rtn rounds to nearest, uncalibrated.")
@click.option("--act-order/--no-act-order", default=True, help="Visit inputs by falling activity; nothing is stored for it.")
@click.option(
    "--gar/--static-groups", default=True, help="Act-order group by group, fitting scales on the way; or fit them first."
)
@click.option("--damping", type=float, default=0.01, help="Added to the Hessian, as a fraction of its mean diagonal.")
@click.option("--calib", metavar="SOURCE", help="Calibration data: .txt, .jsonl, .parquet, a hub data set, .npz or images.")
@click.option("--samples", type=int, default=128, help="Calibration samples.")
@click.option("--seq-len", type=int, help="Tokens per sample.  [default: 2048, or what the model takes]")
@click.option("--seed", type=int, default=0, help="Draws the calibration samples.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To run blocks in.  [default: the model's]")
@click.option(
    "--format", type=click.Choice(["compressed-tensors", "gptq", "dense"]), default="compressed-tensors", help="How to write."
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching layers dense; may be repeated.")
@click.option("--plan", type=click.Path(), help="A plan file: a scheme for every layer, instead of one for all.")
@click.option("--eval", is_flag=True, help="Measure perplexity before and after on held-out text.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool, act_order: bool, gar: bool, **arguments: Any) -> None:
    """Quantize MODEL, a folder or hub id, into a smaller checkpoint; without MODEL, the small Llama that comes along."""
    from compress.api import quantize
    from compress.cli import progress

    order: Literal["act", "group", "natural"] = "natural" if not act_order else "group" if gar else "act"
    progress.quiet_libraries()
    report = quantize(order=order, track=_bar, **arguments)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report)


def _bar(blocks: Iterable[SolvedBlock], total: int) -> Iterable[SolvedBlock]:
    from compress.cli import progress

    return progress.track(blocks, total, "solving blocks")


def _print(report: Report) -> None:
    from compress.cli import progress

    screen = progress.console()
    screen.print(progress.facts(_rows(report)))
    for warning in report.warnings:
        screen.print(f"Note: {warning}")
    for layer in report.fallbacks[:SHOWN]:
        screen.print(f"Fallback: {layer.name}: {'; '.join(layer.notes)}")
    if len(report.fallbacks) > SHOWN:
        screen.print(f"Fallback: {len(report.fallbacks) - SHOWN} more layers, listed in {report.out}/{REPORT_NAME}")


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    from compress.cli.progress import duration, size

    schemes = Counter(layer.scheme for layer in report.layers)
    yield "layers", ", ".join(f"{count} x {scheme}" for scheme, count in schemes.items()) + f"; {len(report.dense)} left dense"
    yield "bits per weight", f"{report.bits_per_weight:.2f} over all weights, with scales and everything left dense"
    ratio = report.size_before / report.size_after
    yield "size", f"{size(report.size_before)} -> {size(report.size_after)}, {ratio:.2f}x smaller"
    if report.output_errors:
        worst, median = report.output_errors
        yield "output error", f"{worst:.2%} worst, {median:.2%} median of all layers (relative, squared, on the calibration data)"
    else:
        worst, median = report.weight_errors
        yield "weight error", f"{worst:.2%} worst, {median:.2%} median of all layers (relative, squared)"
    yield "fallbacks", f"{len(report.fallbacks)} layers, see below" if report.fallbacks else "none"
    if report.perplexity_before is not None and report.perplexity_after is not None:
        yield "perplexity", f"{report.perplexity_before:.3f} -> {report.perplexity_after:.3f} on held-out text"
    yield "time", f"{duration(report.seconds)}, at most {size(report.peak_memory)} of memory (mapped files included)"
    yield "written", report.out
