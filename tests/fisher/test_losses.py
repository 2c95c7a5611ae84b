"""The losses against their definitions, and which one a model gets."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from compress.errors import CompressError
from compress.fisher import losses
from compress.fisher.losses import Draw
from tests import tiny

MASK = 3


def draw(seed: int = 0, mask_token: int | None = MASK) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), mask_token)


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1:, 7:] = 0
    return {
        "input_ids": torch.randint(4, tiny.VOCAB, (4, 10), generator=torch.Generator().manual_seed(2)),
        "attention_mask": mask,
    }


def test_causal_lm_is_the_mean_over_the_next_tokens_that_are_no_padding():
    model, batch = tiny.build("llama"), padded()
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    taken = -logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0][batch["attention_mask"][:, 1:].bool()]
    assert losses.causal_lm(model, batch, draw()).item() == pytest.approx(taken.mean().item(), rel=1e-5)


def test_masked_lm_asks_for_some_tokens_of_every_row_and_hides_them():
    model, batch, seen = tiny.build("roberta"), padded(), []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    value = losses.masked_lm(model, batch, draw(1))
    (given,) = seen
    hidden = given["labels"] != losses.IGNORED
    assert hidden.sum(1).tolist() == [2, 1, 1, 1]  # 15 % of 10, of 7
    assert not bool((hidden & ~batch["attention_mask"].bool()).any())
    assert torch.equal(given["input_ids"], batch["input_ids"].masked_fill(hidden, MASK))
    assert torch.equal(given["labels"][hidden], batch["input_ids"][hidden])
    assert losses.masked_lm(model, batch, draw(1)) == value != losses.masked_lm(model, batch, draw(2))


def test_masked_lm_without_a_mask_token_is_refused():
    with pytest.raises(CompressError, match="needs the tokenizer's mask token"):
        losses.masked_lm(tiny.build("roberta"), padded(), draw(mask_token=None))


def test_the_gradients_of_the_divergence_have_the_true_fisher_as_their_second_moment():
    """For the logits themselves, where it is known: diag(p) - p p^T, of every prediction, and no mean."""
    rows = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 1.0]]).repeat(20_000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(losses.kl(_Answers(rows), {"input_ids": torch.zeros(40_000, 3)}, draw()), rows)
    for kind in range(2):
        p, G = rows[kind].detach().softmax(-1), len(rows) * gradient[kind::2]
        assert G.mean(0).abs().max() < 0.02
        torch.testing.assert_close(G.t() @ G / len(G), p.diag() - p[:, None] * p, rtol=0, atol=0.01)


class _Answers(PreTrainedModel):
    """A classifier whose logits are given."""

    main_input_name = "input_ids"

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(PreTrainedConfig())
        self.rows = rows

    def forward(self, **_: torch.Tensor) -> ModelOutput:
        return ModelOutput(logits=self.rows)


def test_a_model_without_logits_predicts_its_hidden_state():
    model, batch = tiny.build("mpnet"), padded()
    rows = int(batch["attention_mask"].sum())
    values = torch.stack([losses.kl(model, batch, draw(seed)).detach() for seed in range(20)])
    assert float(values.mean()) == pytest.approx(32, rel=0.05)  # half the squared length of 64 normal numbers
    assert values.std() < 4 * (32 / rows) ** 0.5


def test_padding_does_not_count_for_the_divergence():
    model, batch = tiny.build("llama"), padded()
    (one,) = torch.autograd.grad(losses.kl(model, batch, draw()), model.lm_head.weight)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)
    (other,) = torch.autograd.grad(losses.kl(model, batch, draw()), model.lm_head.weight)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("family", "labels", "mask_token", "expected"),
    [
        ("llama", False, None, "causal-lm"),
        ("gpt2", False, MASK, "causal-lm"),
        ("roberta", False, MASK, "masked-lm"),
        ("roberta", False, None, "kl"),
        ("bert", True, None, "classification"),
        ("bert", False, MASK, "kl"),
        ("resnet", True, None, "classification"),
        ("distilbert", False, MASK, "kl"),
    ],
)
def test_the_loss_is_chosen_by_what_there_is(family, labels, mask_token, expected):
    inputs = tiny.inputs(family) | ({"labels": torch.zeros(16, dtype=torch.long)} if labels else {})
    assert losses.choose(tiny.build(family), inputs, mask_token) == expected


def test_the_loss_that_is_asked_for_is_taken():
    assert losses.choose(tiny.build("llama"), tiny.inputs("llama"), None, "kl") == "kl"
    with pytest.raises(CompressError, match="There is no loss magic; choose one of causal-lm, masked-lm, classification, kl"):
        losses.choose(tiny.build("llama"), tiny.inputs("llama"), None, "magic")


def test_a_model_that_gives_no_loss_says_so(monkeypatch):
    model, batch = tiny.build("bert"), tiny.inputs("bert")
    monkeypatch.setattr(model, "forward", lambda **_: {"logits": torch.zeros(16, 2)})
    with pytest.raises(CompressError, match="BertForSequenceClassification gives no loss for labels"):
        losses.classification(model, {**batch, "labels": torch.zeros(16, dtype=torch.long)}, draw())
