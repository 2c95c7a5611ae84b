"""What a model is judged by when it is pruned on its loss, for a mini-batch of inputs, and which loss suits a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from compress import models
from compress.errors import CompressError

IGNORED = -100  # the label of a position that does not count, in torch and transformers
MASKED_FRACTION = 0.15
NO_LABELS = "The classification loss needs labels, and the data has none. Give it labels, or use the kl loss, which needs none."


@dataclass(frozen=True)
class Draw:
    """Where a loss gets its randomness, and the token that stands for a masked one."""

    generator: torch.Generator
    mask_token: int | None = None


Loss = Callable[[PreTrainedModel, Mapping[str, Tensor], Draw], Tensor]


def causal_lm(model: PreTrainedModel, batch: Mapping[str, Tensor], _draw: Draw) -> Tensor:
    """The mean loss of the next tokens of the text itself; padding does not count."""
    labels = batch["input_ids"].masked_fill(~_attended(batch, batch["input_ids"]), IGNORED)
    return _own(model, batch, labels)


def masked_lm(model: PreTrainedModel, batch: Mapping[str, Tensor], draw: Draw) -> Tensor:
    """The mean loss of 15 % of the tokens, drawn anew each time and all replaced by the mask token.

    Training also leaves some of them, or replaces them by others, and spares special tokens; a Fisher needs neither.
    """
    if draw.mask_token is None:
        raise CompressError("The masked-lm loss needs the tokenizer's mask token, and it has none. Use the kl loss.")
    ids = batch["input_ids"]
    attended = _attended(batch, ids)
    scores = torch.rand(ids.shape, generator=draw.generator).to(ids.device).masked_fill(~attended, 2.0)
    hidden = scores.argsort(1).argsort(1) < _masked(attended)
    return _own(model, {**batch, "input_ids": ids.masked_fill(hidden, draw.mask_token)}, ids.masked_fill(~hidden, IGNORED))


def classification(model: PreTrainedModel, batch: Mapping[str, Tensor], _draw: Draw) -> Tensor:
    """The model's own loss for the labels that came with the inputs: cross entropy, or squared error for a regression."""
    if "labels" not in batch:
        raise CompressError(NO_LABELS)
    return _own(model, batch, batch["labels"])


def kl(model: PreTrainedModel, batch: Mapping[str, Tensor], draw: Draw) -> Tensor:
    """Cross entropy with labels that are sampled from the model's own predictions: for the divergence from the dense model.

    KL(dense || pruned) has no gradient at the dense model, so its gradients say nothing there; but its Hessian there is the
    true Fisher, the second moment of the gradients of log p(y) with y drawn from the model itself (Martens, arXiv 1412.1193).
    A model without logits predicts its hidden state with unit variance: the Hessian of half the squared distance.
    """
    outputs = _predict(model, batch)
    rows = _rows(model, batch, outputs)
    if outputs.get("logits") is None:
        noise = torch.randn(rows.shape, generator=draw.generator).to(rows)
        return 0.5 * (rows - (rows.detach() + noise)).square().sum(-1).mean()
    chances = rows.detach().softmax(-1).cpu()
    sampled = torch.multinomial(chances, 1, generator=draw.generator).flatten().to(rows.device)
    return nn.functional.cross_entropy(rows, sampled)


def divergence(model: PreTrainedModel, batch: Mapping[str, Tensor], _draw: Draw) -> Tensor:
    """The divergence from the model itself: zero, and so is its gradient, but its Hessian is that of `kl` without the noise.

    Half the squared distance for a model without logits. For those who differentiate twice.
    """
    outputs = _predict(model, batch)
    rows = _rows(model, batch, outputs)
    if outputs.get("logits") is None:
        return 0.5 * (rows - rows.detach()).square().sum(-1).mean()
    found = rows.log_softmax(-1)
    return (found.detach().exp() * (found.detach() - found)).sum(-1).mean()


LOSSES: dict[str, Loss] = {"causal-lm": causal_lm, "masked-lm": masked_lm, "classification": classification, "kl": kl}


def predictions(loss: str, model: PreTrainedModel, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> int:
    """How many predictions a loss is the mean of, for a batch and what the model made of it."""
    if loss == "kl":
        return len(_rows(model, batch, outputs))
    if loss == "classification":
        return int((batch["labels"] != IGNORED).sum())
    attended = _attended(batch, batch["input_ids"])
    return int(attended[:, 1:].sum() if loss == "causal-lm" else _masked(attended).sum())


def choose(model: PreTrainedModel, inputs: Mapping[str, Tensor], mask_token: int | None, asked: str | None = None) -> str:
    """The name of the loss: the one asked for, else by the labels and by what the model predicts; "kl" fits every model."""
    if asked is not None and asked not in LOSSES:
        raise CompressError(f"There is no loss {asked}; choose one of {', '.join(LOSSES)}.")
    if asked == "classification" and "labels" not in inputs:
        raise CompressError(NO_LABELS)
    if asked is not None:
        return asked
    if "labels" in inputs:
        return "classification"
    if models.is_causal(model):
        return "causal-lm"
    if type(model).__name__.endswith("ForMaskedLM") and mask_token is not None:
        return "masked-lm"
    return "kl"


def _attended(batch: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _masked(attended: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """How many tokens of every row masked-lm hides: at least one."""
    return (attended.sum(1, keepdim=True) * MASKED_FRACTION).round().clamp(min=1)


def _predict(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> ModelOutput:
    outputs: ModelOutput = model(**{name: value for name, value in batch.items() if name != "labels"})
    return outputs


def _rows(model: PreTrainedModel, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Float[Tensor, "P C"]:
    """What the model predicts, one prediction per row, in float32 at least: logits, or hidden states where it has none."""
    logits = outputs.get("logits")
    values: Tensor = next(iter(outputs.values())) if logits is None else logits
    rows = values.flatten(0, -2).to(torch.promote_types(values.dtype, torch.float32))
    main = batch[model.main_input_name]
    if values.ndim == 3 and main.ndim == 2:  # one prediction per token
        rows = rows[_attended(batch, main).flatten()]
    return rows


def _own(model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    loss: Tensor | None = model(**{**batch, "labels": labels}).get("loss")
    if loss is None:
        raise CompressError(f"{type(model).__name__} gives no loss for labels. Use the kl loss, which needs none.")
    return loss
