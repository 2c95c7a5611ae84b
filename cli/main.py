"""The `compress` command: a table of lazily imported subcommands, and how errors end a run."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

import click

from compress import __version__
from compress.errors import CompressError

COMMANDS = {  # name: (where it is, one line of help); help is answered without importing any of them
    "quantize": ("compress.cli.quantize:command", "Make a model smaller: 2, 3, 4 or 8 bits per weight."),
    "search": ("compress.cli.search:command", "Find the best bits for every layer within a budget."),
    "prune": ("compress.cli.prune:command", "Set weights to zero: single ones, 2:4 or blocks."),
    "evolve": ("compress.cli.evolve:command", "Discover a formula that predicts which bits lose least."),
    "eval": ("compress.cli.eval:command", "Perplexity of a model, and its distance from another one."),
    "check": ("compress.cli.check:command", "Say which programs can load a checkpoint, and why others cannot."),
    "inspect": ("compress.cli.inspect:command", "Show the layers of a checkpoint: bits, groups, sizes."),
    "bench": ("compress.cli.bench:command", "Time layers on this machine, for plans that keep to a latency."),
}
# How long torch's threads spin before they sleep. By libgomp's own count, 300,000, they starve every other process: quantizing
# the reference Llama takes 14 s alone and 36 s each for two side by side, with this count 16 and 25 s (two cores of an AMD EPYC,
# 2026-12-01); asleep at once they take 2.1 instead of 1.3 s for a layer of 4096 x 4096 (2026-11-22). The second is for builds
# with LLVM's or Intel's library, in milliseconds.
WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
READER_GONE, BAD_INPUT, INTERRUPTED = 1, 2, 130  # click, too, ends with 1 when nobody reads its output


class Commands(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"The commands are {', '.join(COMMANDS)}."
            ctx.fail(f"There is no command {args[0]}. {remedy}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="compress")
def cli() -> None:
    """Make a trained model smaller, and load the result anywhere.

    `compress quantize --bits 4 -o small` runs as it is, on a small model that comes along.
    """


def main() -> None:
    """Run the command line; bad input exits with 2, Ctrl-C with 130."""
    told = {*WAITING, "OMP_WAIT_POLICY"} & os.environ.keys()
    if not told and sys.argv[1:2] != ["bench"]:  # bench times what a server does, and there threads spin
        os.environ.update(WAITING)  # read once, as torch is imported
    sys.exit(run())


def run() -> int:
    """The exit code of one run of the command line."""
    try:
        code = cli.main(prog_name="compress", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CompressError as error:
        click.echo(f"Error: {error}", err=True)
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt) as error:
        said = error.__cause__ if isinstance(error, click.Abort) else error  # what is kept, if anything is
        click.echo(f"Interrupted. {said or ''}".rstrip(), err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own last flush complains
        return READER_GONE
