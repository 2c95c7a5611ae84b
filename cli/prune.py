"""`compress prune`: flags, a progress bar, and the table at the end."""

from __future__ import annotations

from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(), help="Folder to write.  [default: the model's name and sparsity, in this folder]")
@click.option("--sparsity", type=float, help="Fraction of the weights to zero.  [default: 0.5, or what an N:M pattern says]")
@click.option("--pattern", default="unstructured", help="unstructured, N:M such as 2:4, or block:RxC such as block:1x4.")
@click.option(
    "--method",
    type=click.Choice(["alps", "sparsegpt", "wanda", "magnitude", "obs"]),
    default="alps",
    help="How zeros are chosen; obs is exact and slow.",
)
@click.option("--refit/--no-refit", default=True, help="Move the weights that stay to their least-squares optimum.")
@click.option("--bits", type=int, help="Put the weights that stay on a grid of 2, 3, 4 or 8 bits as well.")
@click.option("--group-size", type=int, default=128, help="With --bits: weights that share a scale.")
@click.option("--symmetric/--asymmetric", default=True, help="With --bits: without or with zero points.")
@click.option("--damping", type=float, default=0.01, help="Added to the Hessian, as a fraction of its mean diagonal.")
@click.option("--calib", metavar="SOURCE", help="Calibration data: .txt, .jsonl, .parquet, a hub data set, .npz or images.")
@click.option("--samples", type=int, default=128, help="Calibration samples.")
@click.option("--seq-len", type=int, help="Tokens per sample.  [default: 2048, or what the model takes]")
@click.option("--seed", type=int, default=0, help="Draws the calibration samples.")
@click.option("--device", help="cpu, cuda, cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To run blocks in.  [default: the model's]")
@click.option(
    "--format",
    type=click.Choice(["dense", "sparse", "compressed-tensors", "gptq"]),
    help="How to write; sparse, without the zeros, is for compress.load alone.  [default: dense, with --bits compressed-tensors]",
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave matching layers dense; may be repeated.")
@click.option("--eval", is_flag=True, help="Measure perplexity before and after on held-out text.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool, **arguments: Any) -> None:
    """Prune MODEL, a folder or hub id, to a checkpoint with zeros; without MODEL, the small Llama that comes along."""
    from compress.api import prune
    from compress.cli import outcome, progress

    progress.quiet_libraries()
    outcome.show(prune(track=outcome.bar, **arguments), as_json)
