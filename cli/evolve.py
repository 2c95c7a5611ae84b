"""`compress evolve`: measure configurations of a model, and evolve a formula that ranks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from compress.cli import options

if TYPE_CHECKING:
    from compress.proxies.bench import Bench
    from compress.proxies.evolution import State
    from compress.proxies.proxy import Proxy

EVOLVING = "evolving"


class Verbs(click.Group):
    """A group that takes anything but the name of a command for the arguments of its first one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Discover a formula that predicts which bits lose least, from measured configurations of models.

    \b
    compress evolve bench MODEL -o benches/       measure
    compress evolve benches/*.parquet -o p.json   discover
    compress search --method emq --proxy p.json   use
    """


@command.command("search", context_settings={"show_default": True})
@click.argument("sources", nargs=-1, metavar="[BENCH OR MODEL]...")
@click.option("-o", "--out", type=click.Path(), default="proxy.json", help="File to write.")
@click.option("--generations", type=int, default=100, help="Of the evolution.")
@click.option("--population", type=int, default=100, help="Formulas that compete.")
@click.option("--seed", type=int, default=0, help="Draws formulas; for a MODEL also its configurations.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
@click.option("--benches", type=click.Path(), help="Folder of the benches of MODELs.  [default: in the user's cache]")
@options.calib("Calibration data of MODELs, as for `compress quantize`.")
@click.option("--samples", type=int, default=128, help="Calibration samples of MODELs.")
@click.option("--json", "as_json", is_flag=True, help="Print the file.")
def evolve(as_json: bool, **arguments: Any) -> None:
    """Evolve a formula on benches, or on models, which are measured first (the default command)."""
    from pathlib import Path

    from compress import evolving
    from compress.cli import progress

    progress.quiet_libraries()
    found = evolving.evolve(track=_track, **arguments)
    if as_json:
        click.echo(Path(arguments["out"]).read_text(encoding="utf-8"), nl=False)
        return
    _show(found, arguments["out"])


@command.command("bench", context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), required=True, help="Folder for the bench, a file of the model's name.")
@click.option("--configurations", type=int, default=200, help="To measure; a multiple of 10, as many of each size.")
@click.option("--bits", default="2,3,4,8", help="Bits that layers may take.")
@click.option("--group-size", type=int, default=128)
@click.option("--library", type=click.Path(), help="Folder of solved layers.  [default: in the user's cache]")
@options.calib("Calibration data, as for `compress quantize`.")
@click.option("--samples", type=int, default=128, help="Calibration samples.")
@click.option("--seq-len", type=int, help="Tokens per sample.  [default: 2048, or what the model takes]")
@click.option("--seed", type=int, default=0, help="Draws the configurations and the calibration samples.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To run in.  [default: the model's]")
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching layers dense; may be repeated.")
def measure(**arguments: Any) -> None:
    """Measure what configurations of MODEL lose, for formulas to be evolved on."""
    from pathlib import Path

    from compress import evolving
    from compress.cli import progress

    progress.quiet_libraries()
    found = evolving.make_bench(track=progress.track, **arguments)
    progress.console().print(progress.facts(_bench_facts(found, Path(arguments["out"]))))


def _track(steps: Iterable[Any], total: int, name: str) -> Iterator[Any]:
    """The usual bar, but one that shows the fitness of generations."""
    from compress.cli import progress

    if name != EVOLVING:
        yield from progress.track(steps, total, name)
        return
    with progress.bar(total, name) as advance:
        for state in steps:
            yield state
            advance(_fitness(state))


def _fitness(state: State) -> str:
    best, median = state.history[-1]
    return f"{EVOLVING}: best {best:.3f}, median {median:.3f}"


def _show(found: Proxy, out: str) -> None:
    from compress.cli import progress
    from compress.proxies.operations import INPUTS

    screen = progress.console()
    screen.print(f"{found.formula}\n", markup=False)
    facts = [(name, INPUTS[name].meaning) for name in sorted(found.formula.inputs)]
    facts += [("complexity", str(found.formula.complexity)), ("fitness", f"{found.search['fitness']:.4f}")]
    facts += [("search", f"{found.search['evaluated']} formulas of {found.search['drawn']} drawn"), ("written", out)]
    columns = [name for name in found.search["benches"][0] if name not in ("name", "key")]
    rows = [(one["name"], *(f"{one[column]:.3f}" for column in columns)) for one in found.search["benches"]]
    screen.print(progress.table(("bench", *columns), rows))
    screen.print(progress.facts(facts))


def _bench_facts(found: Bench, out: Any) -> Iterator[tuple[str, str]]:
    from compress.proxies.bench import SUFFIX

    yield "configurations", f"{len(found.losses)} of {', '.join(found.options)}"
    yield "average bits", f"{found.average_bits.min():.2f} to {found.average_bits.max():.2f}"
    yield "loss", f"{found.losses.min():.4g} to {found.losses.max():.4g}, {found.about['loss']}"
    yield "written", str(out / f"{found.name}{SUFFIX}")
