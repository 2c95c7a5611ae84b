"""`compress search`: flags, progress bars, and the plan as a grid of bits with what it loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from compress import arguments as check
from compress.cli import options

if TYPE_CHECKING:
    from compress.mixed.search import Found
    from compress.mixed.units import Unit
    from compress.spec import LayerSpec

COLOURS = {2: "red", 3: "yellow", 4: "green", 8: "cyan"}
SHOWN = 64  # blocks on the screen; the plan file has them all
METHODS = ["kl", "interlayer", "output", "fisher", "hawq-v2", "hawq-v1", "emq"]


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), help="Plan file to write.  [default: the model's name, in this folder]")
@click.option("--avg-bits", type=float, help="Budget: bits per weight of the layers that can be compressed, with scales.")
@click.option("--size", help="Budget: all weight files, as 2.1GB or 700MB.")
@click.option("--latency", help="Budget: a part of the dense layers' time, as 0.7x; needs --latency-table.")
@click.option("--latency-table", type=click.Path(), help="Times that `compress bench --latency-table` took on this machine.")
@click.option("--bops", help="Budget: a part of the dense model's bit operations, as 0.1x.")
@click.option("--activation-bits", type=int, help="Round the inputs of all layers to so many bits while plans are judged.")
@click.option("--avg-sparsity", type=float, help="Budget: the least part of zeros, with --sparsity.")
@click.option("--max-kl", type=float, help="Target: nats of KL to the dense model, measured; the smallest plan is wanted.")
@click.option("--max-ppl-increase", help="Target: rise of the perplexity, measured, as 1%.")
@click.option("--bits", help="Bits to choose from.  [default: 2,3,4,8]")
@click.option("--group-size", default="128", help="Group sizes to choose from, as 128,32.")
@click.option("--symmetric/--asymmetric", default=True, help="Without or with zero points.")
@click.option("--sparsity", default="", help="Sparsities to choose from, as 0,0.5,2:4; alone without bits.")
@click.option("--method", type=click.Choice(METHODS), default="kl", help="How to predict what an option loses.")
@click.option("--proxy", type=click.Path(), help="emq: a file of `compress evolve`.  [default: the one that comes along]")
@click.option("--all-pairs", is_flag=True, help="interlayer: measure all pairs, not only those of near blocks.")
@click.option("--pin", "pins", multiple=True, metavar="REGEX=BITS", help="Fix matching layers, or REGEX=dense; may be repeated.")
@click.option("--refine", type=int, default=0, help="Generations of an evolution on the measured loss, after the choice.")
@click.option("--verify", is_flag=True, help="Measure the plan, uniform plans and the frontier.")
@click.option("--plot", type=click.Path(), help="Draw size against measured loss into this file; implies --verify.")
@click.option("--library", type=click.Path(), help="Folder of solved layers.  [default: in the user's cache]")
@click.option("--samples", type=int, default=128, help="Calibration samples.")
@click.option("--format", type=click.Choice(["compressed-tensors", "gptq", "dense"]), default="compressed-tensors")
@options.calib("Calibration data, as for `compress quantize`.")
@click.option("--seq-len", type=int, help="Tokens per sample.  [default: 2048, or what the model takes]")
@click.option("--seed", type=int, default=0, help="Draws the calibration samples, probes and mutations.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To run in.  [default: the model's]")
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching layers dense; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan file as JSON.")
def command(as_json: bool, **arguments: Any) -> None:
    """Find the best bits for every layer of MODEL within a budget; `compress quantize --plan` applies them."""
    check.searched(**arguments)
    from compress.api import search
    from compress.cli import progress

    progress.quiet_libraries()
    found = search(track=progress.track, **arguments)
    if as_json:
        click.echo(found.path.read_text(encoding="utf-8"), nl=False)
        return
    _show(found)


def _show(found: Found) -> None:
    from compress.cli import progress
    from compress.mixed.explain import line

    screen = progress.console()
    screen.print(_grid(found))
    points = sorted([found.point, *found.uniform], key=lambda point: point.size)
    screen.print(progress.table(("plan", "weight files", "predicted loss", "measured loss"), map(line, points)))
    screen.print(progress.facts(_facts(found)))


def _grid(found: Found) -> Any:
    """One line per block, one column per kind of unit, bits in colour; a model that is one block has a line per unit."""
    from rich.table import Table

    if len(found.blocks) == 1:
        return _column(found)
    rows: dict[int, dict[str, str]] = {}
    for unit in found.space.units:
        rows.setdefault(unit.block, {})[_kind(unit, found.blocks[unit.block])] = _cell(found.plan.layers[unit.layers[0].name])
    columns = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    table = Table(title="bits by block", title_justify="left")
    table.add_column("block")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for block, row in list(rows.items())[:SHOWN]:
        table.add_row(found.blocks[block] or "model", *(row.get(column, "") for column in columns))
    return table


def _column(found: Found) -> Any:
    from compress.cli import progress

    rows = [(unit.name, _cell(found.plan.layers[unit.layers[0].name])) for unit in found.space.units[:SHOWN]]
    return progress.table(("layer", "bits"), rows, "bits by layer")


def _kind(unit: Unit, block: str) -> str:
    return unit.name.removeprefix(f"{block}.") if block else unit.name


def _cell(spec: LayerSpec) -> str:
    if spec.scheme is None:
        return str(spec)
    colour = COLOURS[spec.scheme.bits]
    group = "" if spec.scheme.group_size == 128 else f" g{spec.scheme.group_size}"
    zeros = f", {spec.sparsity}" if spec.sparsity else ""
    return f"[{colour}]{spec.scheme.bits}[/]{group}{zeros}"


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    from compress.cli.progress import duration, size
    from compress.mixed.explain import against_uniform

    yield "average bits", f"{found.spent['avg_bits']} over the layers that can be compressed, with scales"
    if (pair := against_uniform(found)) and pair[1] > 0:
        own, uniform = pair
        change = f"{abs(1 - own / uniform):.0%} {'below' if own <= uniform else 'above'}"
        yield "loss", f"{own:.4g}, {change} a mix of uniform plans of this size ({uniform:.4g})"
    yield "losses", "nats of KL to the dense model; of a model without logits the relative squared change of its output"
    yield "size", f"{found.spent['size']} of weight files"
    for name in ("latency", "bops", "avg_sparsity"):
        if name in found.spent:
            yield name.replace("avg_", "average "), found.spent[name]
    if len(found.budgets) > 1:
        yield "budgets", "\n".join(map(str, found.budgets))
    yield "search", f"{found.forwards:.1f} passes of all judged samples, {duration(found.seconds)}"
    yield "library", f"{found.library.folder}, {size(found.library.nbytes)}"
    yield "written", str(found.path)
