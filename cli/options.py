"""The flags of every verb that writes a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

CALIBRATION = (
    "Calibration data: text or chats in .txt, .md, .jsonl, .json or .parquet, also .gz or .zst, folders or globs of such, a hub "
    "data set; .npz or pictures for image models. May be repeated."
)


def calib(text: str = CALIBRATION) -> Callable[[F], F]:
    """The flag that names calibration data, once or several times."""
    return click.option(
        "--calib",
        metavar="SOURCE",
        multiple=True,
        callback=lambda _context, _option, given: given[0] if len(given) == 1 else list(given) or None,
        help=text,
    )


OPTIONS = (
    calib(),
    click.option("--seq-len", type=int, help="Tokens per sample.  [default: 2048, or what the model takes]"),
    click.option("--seed", type=int, default=0, help="Draws the calibration samples."),
    click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]"),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="To run blocks in.  [default: the model's; with products in bfloat16 where a CPU is faster so]",
    ),
    click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching layers dense; may be repeated."),
    click.option("--eval", is_flag=True, help="Measure perplexity before and after on held-out text."),
    click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


def shared(command: F) -> F:
    """Add them, in this order, below the verb's own."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(OPTIONS), command)
