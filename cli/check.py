"""`compress check`: which programs can load a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from compress.formats.compatibility import Verdict

REFUSED = 1


@click.command()
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, folder: str, as_json: bool) -> int:
    """Say which programs load FOLDER correctly, and why others do not, without starting any of them.

    Only config.json and the headers of the weight files are read. The exit code is 0 when compress and at least one other
    program load it, 1 when not, and 2 when FOLDER is not a whole checkpoint.
    """
    from compress.cli import folder as folders
    from compress.cli import progress
    from compress.formats import compatibility

    facts, _ = folders.read(folder)
    verdicts = compatibility.readers(facts)
    code = 0 if compatibility.loads_somewhere(verdicts) else REFUSED
    if as_json:
        progress.print_json({"folder": folder, "quant_method": facts.method, "readers": [asdict(v) for v in verdicts]})
    else:
        columns = ("reader", "loads", "why")
        screen, made = progress.console(), progress.table(columns, map(_row, verdicts), title=f"{folder}: {facts.method}")
        for column in made.columns:
            column.justify = "left"
        screen.print(made)
    context.exit(code)


def _row(verdict: Verdict) -> tuple[str, str, str]:
    said = [*verdict.reasons, *(f"note: {warning}" for warning in verdict.warnings)]
    return verdict.reader, "yes" if verdict.loads else "no", "\n".join(said)
