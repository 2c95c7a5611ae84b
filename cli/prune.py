"""`compress prune`: flags, a progress bar, and the table at the end."""

from __future__ import annotations

from typing import Any

import click

from compress import arguments as check
from compress.cli import options


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), help="Folder to write.  [default: the model's name and sparsity, in this folder]")
@click.option("--sparsity", type=float, help="Fraction of the weights to zero.  [default: 0.5, or what an N:M pattern says]")
@click.option("--pattern", default="unstructured", help="unstructured, N:M such as 2:4, block:RxC such as block:1x4, or row.")
@click.option(
    "--method",
    type=click.Choice(["alps", "sparsegpt", "wanda", "magnitude", "obs", "obert", "mfac"]),
    help="How zeros are chosen; obert and mfac look at the whole model's loss.  [default: alps, for rows obs]",
)
@click.option(
    "--allocate",
    type=click.Choice(["uniform", "global", "owl", "ecoflap"]),
    help="How layers share the zeros.  [default: uniform, for obert and mfac global]",
)
@click.option(
    "--loss",
    type=click.Choice(["causal-lm", "masked-lm", "classification", "kl"]),
    help="For obert and mfac.  [default: the one that fits the model and the data]",
)
@click.option("--recompute", type=int, help="For obert and mfac: steps, each with its own curvature.  [default: 4]")
@click.option("--finetune", type=int, default=0, metavar="STEPS", help="Learn from the dense model while the zeros grow.")
@click.option("--refit/--no-refit", default=True, help="Move the weights that stay to their least-squares optimum.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "default"]),
    default="default",
    help="default solves layers for what the dense model does, which runs along; fast for what they did alone.",
)
@click.option("--bits", type=int, help="Put the weights that stay on a grid of 2, 3, 4 or 8 bits as well.")
@click.option("--group-size", type=int, default=128, help="With --bits: weights that share a scale.")
@click.option("--symmetric/--asymmetric", default=True, help="With --bits: without or with zero points.")
@click.option("--damping", type=float, default=0.01, help="Added to the curvature, as a fraction of its mean diagonal.")
@click.option("--samples", type=int, default=128, help="Calibration samples; for obert and mfac each gives a gradient.")
@click.option(
    "--format",
    type=click.Choice(["dense", "sparse", "compressed-tensors", "gptq"]),
    help="How to write; sparse, without the zeros, is for compress.load alone.  [default: dense, with --bits compressed-tensors]",
)
@options.shared
def command(as_json: bool, **arguments: Any) -> None:
    """Prune MODEL, a folder or hub id, to a checkpoint with zeros; without MODEL, the small Llama that comes along."""
    check.pruned(**arguments)
    from compress.cli import outcome, progress
    from compress.pruning import prune

    progress.quiet_libraries()
    outcome.show(prune(track=progress.track, **arguments), as_json)
