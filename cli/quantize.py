"""`compress quantize`: flags, a progress bar, and the table at the end."""

from __future__ import annotations

from typing import Any, Literal

import click

from compress import arguments as check
from compress.cli import options
from compress.errors import refuse


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), help="Folder to write.  [default: the model's name and bits, in this folder]")
@click.option("--bits", help="Bits per weight: 2, 3, 4 or 8; for a budget those to choose from, as 2,3,4,8.  [default: 4]")
@click.option(
    "--group-size",
    type=int,
    help="Weights that share a scale: 128, 64, 32, ...; -1 is a whole row.  [default: 128, or the grid's]",
)
@click.option("--symmetric/--asymmetric", default=True, help="Without or with zero points.")
@click.option(
    "--grid",
    type=click.Choice(["int", "ternary", "fp8", "mxfp4", "nvfp4"]),
    default="int",
    help="What codes stand for: evenly spaced values, -1, 0 and 1, or floating-point numbers of 8 or 4 bits.",
)
@click.option("--avg-bits", type=float, help="Budget: search the best bits for every layer first; see `compress search`.")
@click.option("--size", help="Budget: all weight files, as 2.1GB.")
@click.option("--max-kl", type=float, help="Budget: nats of KL to the dense model.")
@click.option("--max-ppl-increase", help="Budget: rise of the perplexity, as 1%.")
@click.option("--pin", "pins", multiple=True, metavar="REGEX=BITS", help="With a budget: fix matching layers; may be repeated.")
@click.option("--library", type=click.Path(), help="With a budget: folder of solved layers.  [default: in the user's cache]")
@click.option("--method", type=click.Choice(["gptq", "rtn"]), default="gptq", help="rtn rounds to nearest, uncalibrated.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "best"]),
    default="default",
    help="fast is GPTQ alone; default also repairs what earlier layers broke, and refines codes and scales; best also weighs "
    "every layer's errors by the model's loss, with the model in memory.",
)
@click.option("--act-order/--no-act-order", default=True, help="Visit inputs by falling activity; nothing is stored for it.")
@click.option(
    "--gar/--static-groups", default=True, help="Act-order group by group, fitting scales on the way; or fit them first."
)
@click.option("--damping", type=float, default=0.01, help="Added to the Hessian, as a fraction of its mean diagonal.")
@click.option(
    "--keep-zeros/--no-keep-zeros",
    default=True,
    help="Leave zeros where they are in layers that are pruned already, by a pattern or in over a fifth of their weights.",
)
@click.option("--rotate", is_flag=True, help="Fold rotations into the weights, if these are then easier to round.")
@click.option("--samples", type=int, default=128, help="Calibration samples.")
@click.option(
    "--format", type=click.Choice(["compressed-tensors", "gptq", "dense"]), default="compressed-tensors", help="How to write."
)
@click.option("--plan", type=click.Path(), help="A plan file: a scheme for every layer, instead of one for all.")
@options.shared
def command(as_json: bool, act_order: bool, gar: bool, **arguments: Any) -> None:
    """Quantize MODEL, a folder or hub id, into a smaller checkpoint; without MODEL, the small Llama that comes along."""
    if not act_order:
        refuse({"--static-groups": not gar}, "Without act-order scales are fitted on the way")
    check.quantized(**arguments)
    from compress.api import quantize
    from compress.cli import outcome, progress

    order: Literal["act", "group", "natural"] = "natural" if not act_order else "group" if gar else "act"
    progress.quiet_libraries()
    outcome.show(quantize(order=order, track=progress.Bars().track, **arguments), as_json)
