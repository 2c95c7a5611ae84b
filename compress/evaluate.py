"""How good a model is: perplexity, its distance from another model, and lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import CompressError

LARGEST_LOSS = 700  # nats; exp overflows beyond
ROWS_AT_A_TIME = 256  # tokens whose float32 log-probabilities are held at once: 256 x 128k entries are 131 MB


@dataclass(frozen=True)
class Comparison:
    """A model against the one it was made from, over the same tokens; `kl` is KL(base || model) per token in nats."""

    perplexity: float
    base_perplexity: float
    kl: float
    top1_agreement: float


def perplexity(model: PreTrainedModel, ids: Int64[Tensor, "n T"], batch: int = 1) -> float:
    """exp of the mean next-token loss over non-overlapping windows, each on its own: the protocol of the GPTQ papers.

    The papers' `exp(sum(mean window loss * T) / (n * T))` is the same number. Losses are in float32, their sum in float64.
    """
    return perplexity_of(losses(model, ids, batch))


def perplexity_of(window_losses: Iterable[float]) -> float:
    """exp of the mean loss; infinite rather than an error where that overflows."""
    collected = list(window_losses)
    mean = math.fsum(collected) / len(collected)
    return math.inf if mean > LARGEST_LOSS else math.exp(mean)


def losses(model: PreTrainedModel, ids: Int64[Tensor, "n T"], batch: int = 1) -> Iterator[float]:
    """The mean next-token loss of every window, as they are run, `batch` at a time."""
    check_causal(model)
    with _evaluating(model):
        for windows in ids.split(batch):
            for window, logits in zip(windows, _logits(model, windows), strict=True):
                yield _window_loss(logits, window)


def compare(model: PreTrainedModel, base: PreTrainedModel, ids: Int64[Tensor, "n T"]) -> Comparison:
    """Both models on the same windows: both perplexities, the mean KL(base || model), and how often their top tokens agree."""
    return mean_of(comparisons(model, base, ids))


def mean_of(windows: Iterable[Comparison]) -> Comparison:
    """One comparison for windows of equal length: means, geometric for the perplexities."""
    collected = list(windows)
    n = len(collected)
    return Comparison(
        perplexity_of(math.log(window.perplexity) for window in collected),
        perplexity_of(math.log(window.base_perplexity) for window in collected),
        math.fsum(window.kl for window in collected) / n,
        math.fsum(window.top1_agreement for window in collected) / n,
    )


def comparisons(model: PreTrainedModel, base: PreTrainedModel, ids: Int64[Tensor, "n T"]) -> Iterator[Comparison]:
    """`compare` window by window, as they are run."""
    check_causal(model)
    check_causal(base)
    with _evaluating(model), _evaluating(base):
        for window in ids:
            logits, base_logits = _logits(model, window[None])[0], _logits(base, window[None])[0]
            if logits.shape != base_logits.shape:
                raise CompressError(
                    f"The models have vocabularies of {logits.shape[-1]:,} and {base_logits.shape[-1]:,} tokens; "
                    "only a model and its own base can be compared."
                )
            kl, agreement = distance(logits, base_logits.to(logits.device))
            own, other = _window_loss(logits, window), _window_loss(base_logits, window)
            yield Comparison(perplexity_of([own]), perplexity_of([other]), kl, agreement)


def tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """lm-eval's results for each task, with at most `limit` examples of each."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CompressError(f"--tasks needs lm-eval: pip install 'compress-toolkit[eval]' ({error}).") from error
    check_causal(model)
    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise CompressError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them.")
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0
    )
    scores: dict[str, dict[str, Any]] = results["results"]
    return scores


def check_causal(model: PreTrainedModel) -> None:
    """Raise for a model that does not predict the next token."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CompressError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity: `compress eval` is for causal "
            "language models (...ForCausalLM). For others, load both models in Python and compare their outputs on your data."
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and back to how it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _logits(model: PreTrainedModel, ids: Int64[Tensor, "b T"]) -> Float[Tensor, "b T V"]:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


def _window_loss(logits: Float[Tensor, "T V"], window: Int64[Tensor, "T"]) -> float:
    predicted, target = logits[:-1].split(ROWS_AT_A_TIME), window[1:].to(logits.device).split(ROWS_AT_A_TIME)
    total = sum(
        torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="sum").item()
        for rows, wanted in zip(predicted, target, strict=True)
    )
    return total / (len(window) - 1)


def distance(logits: Float[Tensor, "T V"], base: Float[Tensor, "T V"]) -> tuple[float, float]:
    """(mean KL(base || model), fraction of equal top tokens) over the rows."""
    kl, agree = 0.0, 0
    for rows, base_rows in zip(logits.split(ROWS_AT_A_TIME), base.split(ROWS_AT_A_TIME), strict=True):
        log_q, log_p = rows.float().log_softmax(-1), base_rows.float().log_softmax(-1)
        kl += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        agree += int((rows.argmax(-1) == base_rows.argmax(-1)).sum())
    return kl / len(logits), agree / len(logits)
