"""`compress eval`: perplexity, distance from a base model, lm-eval's tasks."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress import folders
from compress.errors import CompressError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT_SEQ_LEN = 2048
LABELS = {  # key of the JSON output: (in the table, format)
    "model": ("model", ""),
    "against": ("against", ""),
    "text": ("text", ""),
    "dtype": ("computed in", ""),
    "device": ("device", ""),
    "perplexity": ("perplexity", ".3f"),
    "against_perplexity": ("perplexity of the other", ".3f"),
    "kl": ("KL(other || model), nats per token", ".5f"),
    "top1_agreement": ("top token agrees", ".2%"),
    "seconds": ("time, s", ".1f"),
}


@click.command()
@click.argument("model", required=False)
@click.option("--against", metavar="MODEL", help="Also compare with this model: KL divergence, agreement of the top token.")
@click.option(
    "--text", metavar="FILE", help="Text to use: .txt, .jsonl, .parquet, or a hub dataset.  [default: built-in held-out text]"
)
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens in a window.  [default: 2048, or what the model takes]")
@click.option("--samples", type=click.IntRange(min=1), help="Windows to use at most.  [default: all]")
@click.option("--tasks", metavar="A,B", help="Run these lm-eval tasks instead.")
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each lm-eval task.  [default: all]")
@click.option("--device", help="Where to run, such as cpu or cuda.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To run in.  [default: the model's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None,
    against: str | None,
    text: str | None,
    seq_len: int | None,
    samples: int | None,
    tasks: str | None,
    limit: int | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Evaluate MODEL: a folder, compressed or not, a hub id, or nothing for the small model that comes along.

    Perplexity is measured over non-overlapping windows, as the GPTQ papers do.
    """
    if tasks is not None and (against or text or seq_len or samples):
        raise click.UsageError("--tasks brings its own text: leave out --against, --text, --seq-len and --samples.")
    folders.check(model, None, overwrite=False)
    folders.check(against, None, overwrite=False)
    from compress import models
    from compress.cli import progress

    start = time.perf_counter()
    progress.quiet_libraries()
    folder, run_on = models.resolve(model), models.device(device)
    if tasks is not None:
        result = run_tasks(folder, run_on, dtype, [name.strip() for name in tasks.split(",")], limit)
    else:
        base = models.resolve(against) if against is not None else None
        result = run_text(folder, base, run_on, dtype, text, seq_len, samples)
    result = {"model": str(folder), **result, "device": str(run_on), "seconds": round(time.perf_counter() - start, 1)}
    if as_json:
        progress.print_json(finite(result))
    else:
        progress.console().print(progress.facts(words(result)))


def run_text(
    folder: Path,
    base: Path | None,
    device: torch.device,
    dtype: str | None,
    source: str | None,
    seq_len: int | None,
    samples: int | None,
) -> dict[str, Any]:
    """Perplexity, and with `base` the comparison; the keys of the JSON output."""
    from compress import evaluate, integrity, models
    from compress.calib import data
    from compress.cli import progress

    model = load(folder, device, dtype)
    evaluate.check_causal(model)
    longest = models.max_positions(folder)
    if seq_len and longest and seq_len > longest:
        raise CompressError(f"--seq-len is {seq_len}, but the model was built for at most {longest} positions.")
    length = seq_len or min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    tokenizer = models.tokenizer(folder)
    text = data.held_out_text(source, tokenizer, seq_len=length, samples=samples)
    ids = text.inputs["input_ids"]
    integrity.check_ids(model, ids, len(tokenizer))
    result: dict[str, Any] = {"text": text.source, "windows": len(ids), "seq_len": length, "dtype": str(model.dtype)[6:]}
    if base is None:
        each = progress.track(evaluate.losses(model, ids), len(ids), "windows")
        return {**result, "perplexity": evaluate.perplexity_of(each)}
    pairs = progress.track(evaluate.comparisons(model, load(base, device, dtype), ids), len(ids), "windows")
    found = evaluate.mean_of(pairs)
    return {
        **result,
        "perplexity": found.perplexity,
        "against": str(base),
        "against_perplexity": found.base_perplexity,
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
    }


def run_tasks(folder: Path, device: torch.device, dtype: str | None, names: list[str], limit: int | None) -> dict[str, Any]:
    """lm-eval's scores, its own talk sent to stderr."""
    from compress import evaluate, models

    with contextlib.redirect_stdout(sys.stderr):
        return {"tasks": evaluate.tasks(load(folder, device, dtype), models.tokenizer(folder), names, limit)}


def load(folder: Path, device: torch.device, dtype: str | None = None) -> PreTrainedModel:
    """Load a model to evaluate, packed or dense, in `dtype`; by default the stored one, where the device is fast in that."""
    import torch
    from transformers import AutoConfig

    from compress import hf, models

    try:
        stored = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().dtype
    except (OSError, ValueError) as error:
        raise CompressError(f"{folder} is not a saved transformers model: {error}") from error
    return hf.load(folder, device=device, dtype=models.dtype(dtype, stored or torch.float32, device))


def words(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as rows of a table."""
    rows = [(label, format(result[key], how)) for key, (label, how) in LABELS.items() if key in result]
    for task, scores in result.get("tasks", {}).items():
        numbers = {name.partition(",")[0]: value for name, value in scores.items() if isinstance(value, float)}
        rows += [(f"{task} {name}", f"{value:.4f}") for name, value in numbers.items()]
    return rows


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON can say."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
