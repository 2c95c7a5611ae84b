"""`compress bench`: times of layers on this machine, for plans that keep to a latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from compress.spec import BITS

if TYPE_CHECKING:
    import torch

    from compress.latency import LatencyTable, Shape
    from compress.spec import Scheme

SHOWN = 12  # shapes on the screen; the file has them all
ONE_ROW = (1,)


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--latency-table", is_flag=True, help="Time the layers of MODEL, dense and at every number of bits.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="With --latency-table: the file to write.")
@click.option("--tune", is_flag=True, help="Find how the kernels are fastest for MODEL here; later runs use what was found.")
@click.option("--bits", type=int, multiple=True, default=BITS, help="To time; may be repeated.")
@click.option("--group-size", type=int, multiple=True, default=[128], help="To time; may be repeated.")
@click.option("--symmetric/--asymmetric", default=True, help="Without or with zero points.")
@click.option(
    "--batch", type=int, multiple=True, default=ONE_ROW, help="With --latency-table: rows of activations; may be repeated."
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Layers that stay dense and are not timed; may be repeated.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", help="Of activations.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(
    model: str | None,
    latency_table: bool,
    out: str | None,
    tune: bool,
    bits: Sequence[int],
    group_size: Sequence[int],
    symmetric: bool,
    batch: Sequence[int],
    skip: Sequence[str],
    device: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Time the layers of MODEL, a folder or hub id, on this machine through the kernels that serve them.

    Without MODEL, the layers of a Llama of 8 billion parameters. Leave the machine alone meanwhile.
    """
    from compress import latency, models
    from compress.cli import progress
    from compress.errors import CompressError
    from compress.spec import Scheme

    if latency_table == tune:
        raise click.UsageError("Say what to measure: --latency-table or --tune.")
    if latency_table == (out is None):
        raise click.UsageError("--latency-table writes a file, and only that does: give both it and -o FILE.")
    if tune and tuple(batch) != ONE_ROW:
        raise click.UsageError("--batch is for --latency-table: --tune finds the launches of every number of rows.")
    if wrong := [rows for rows in batch if rows < 1]:
        raise CompressError(f"--batch is {wrong[0]}; a product has at least one row.")
    progress.quiet_libraries()
    where, kind = models.device(device), models.DTYPES[dtype]
    schemes = [Scheme(width, size, symmetric) for width in bits for size in group_size]
    shapes = latency.STANDARD
    if model is not None:
        shapes = latency.shapes_of(models.anatomy(models.load(models.resolve(model)), skip))
    if out is None:
        _tune(shapes, schemes, where, kind, as_json)
        return
    table = latency.measure(shapes, schemes, sorted(set(batch)), where, kind, progress.track)
    table.save(out)
    _show(table, out, as_json)


def _tune(
    shapes: Mapping[Shape, int], schemes: Sequence[Scheme], device: torch.device, dtype: torch.dtype, as_json: bool
) -> None:
    from compress import tune
    from compress.cli import progress
    from compress.kernels import launch

    table = tune.measure(shapes, schemes, device, dtype, progress.track)
    rows = {"planar": table.fused_rows} if device.type == "cuda" else dict(table.few_rows)
    name, file = launch.describe(device).name, launch.user_file()
    if as_json:
        progress.print_json({"device": name, "rows": rows, "launches": len(table.launches), "file": str(file)})
        return
    facts = [("device", name)]
    facts += [(f"layout {layout}", f"the kernel up to {most} rows, dequantized weights above") for layout, most in rows.items()]
    facts += [("launches", f"{len(table.launches)} measured")] if table.launches else []
    progress.console().print(progress.facts([*facts, ("written", str(file))]))


def _show(table: LatencyTable, out: str, as_json: bool) -> None:
    from compress.cli import progress

    if as_json:
        click.echo(table.to_json(), nl=False)
        return
    screen = progress.console()
    heads = ("weights, rows", *dict.fromkeys(str(one.scheme or "dense") for one in table.timings))
    screen.print(progress.table(heads, _lines(table, heads[1:]), title=f"us on {table.machine}, {table.dtype}"))
    worst = max(table.timings, key=lambda one: one.spread / one.seconds)
    screen.print(
        f"Largest spread of the timings of one cell: {worst.spread / worst.seconds:.0%} of their median, "
        f"{worst.N} x {worst.K} {worst.scheme or 'dense'}."
    )
    screen.print(f"Written to {out}")


def _lines(table: LatencyTable, columns: Sequence[str]) -> Iterator[Sequence[str]]:
    """A line for every shape and number of rows, with microseconds for every scheme."""
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for one in table.timings:
        found.setdefault((one.N, one.K, one.M), {})[str(one.scheme or "dense")] = 1e6 * one.seconds
    for (N, K, M), times in list(found.items())[:SHOWN]:
        yield (f"{N} x {K}, {M}", *(f"{times[column]:.4g}" if column in times else "-" for column in columns))
    if len(found) > SHOWN:
        yield (f"{len(found) - SHOWN} more, in the file", *("" for _ in columns))
