from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from compress import evaluate
from compress.errors import CompressError

V = 97


def llama(seed: int, vocabulary: int = V, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,  # or every prediction is nearly uniform
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def windows(n: int, T: int) -> Tensor:
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double().log_softmax(-1)


@pytest.mark.parametrize("T", [2, 17, 257, 300])  # across the rows that are handled at once
def test_perplexity_is_the_papers_formula(T: int) -> None:
    model, ids = llama(0), windows(3, T)
    mean = [-log_probabilities(model, row[None])[0, :-1].gather(1, row[1:, None]).mean().item() for row in ids]
    papers = math.exp(sum(loss * T for loss in mean) / (len(ids) * T))
    assert evaluate.perplexity(model, ids) == pytest.approx(papers, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    model = llama(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evaluate.perplexity(model, windows(2, 20)) == pytest.approx(V, rel=1e-6)


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_batching_changes_nothing(batch: int) -> None:
    model, ids = llama(0), windows(5, 33)
    assert evaluate.perplexity(model, ids, batch=batch) == pytest.approx(evaluate.perplexity(model, ids), rel=1e-6)
    assert len(list(evaluate.losses(model, ids, batch=batch))) == 5


def test_windows_do_not_see_each_other() -> None:
    model, ids = llama(0), windows(4, 33)
    each = list(evaluate.losses(model, ids))
    assert list(evaluate.losses(model, ids.flip(0))) == pytest.approx(each[::-1], rel=1e-6)


def test_a_bfloat16_model_is_summed_in_float32() -> None:
    model, ids = llama(0).bfloat16(), windows(2, 300)
    logits = torch.stack([model(input_ids=row[None]).logits[0].detach() for row in ids]).double().log_softmax(-1)
    loss = -logits[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
    assert evaluate.perplexity(model, ids) == pytest.approx(math.exp(loss), rel=1e-5)


def test_dropout_is_off_while_evaluating_and_the_mode_is_restored() -> None:
    model, ids = llama(0, attention_dropout=0.5), windows(2, 33)
    quiet = evaluate.perplexity(model, ids)
    model.train()
    assert evaluate.perplexity(model, ids) == quiet
    assert model.training


def test_a_loss_that_overflows_is_infinite() -> None:
    assert evaluate.perplexity_of([1e4, 1.0]) == math.inf
    assert math.isnan(evaluate.perplexity_of([math.nan, 1.0]))


@pytest.mark.parametrize("T", [2, 300])
def test_comparison_against_the_definitions(T: int) -> None:
    model, base, ids = llama(1), llama(2), windows(3, T)
    q, p = log_probabilities(model, ids), log_probabilities(base, ids)
    found = evaluate.compare(model, base, ids)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.perplexity == pytest.approx(evaluate.perplexity(model, ids), rel=1e-6)
    assert found.base_perplexity == pytest.approx(evaluate.perplexity(base, ids), rel=1e-6)
    assert found.kl != pytest.approx(evaluate.compare(base, model, ids).kl, rel=1e-3)  # KL has a direction


def test_a_model_is_at_no_distance_from_itself() -> None:
    model, ids = llama(1), windows(2, 40)
    found = evaluate.compare(model, model, ids)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.perplexity == found.base_perplexity


def test_distance_grows_with_damage() -> None:
    base, ids, kl = llama(1), windows(2, 40), []
    for noise in (0.01, 0.05, 0.2):
        model = llama(1)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += noise * parameter.std() * torch.randn_like(parameter)
        kl.append(evaluate.compare(model, base, ids).kl)
    assert 0 < kl[0] < kl[1] < kl[2]


def test_comparing_different_vocabularies() -> None:
    with pytest.raises(CompressError, match="vocabularies of 97 and 101 tokens"):
        evaluate.compare(llama(0), llama(0, vocabulary=101), windows(1, 8))


def encoders() -> list[PreTrainedModel]:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": V}
    return [
        BertForMaskedLM(BertConfig(**small)),
        T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    ]


def test_models_that_do_not_predict_the_next_token() -> None:
    for model in encoders():
        name = type(model).__name__
        with pytest.raises(CompressError, match=f"{name} does not predict the next token"):
            evaluate.perplexity(model, windows(1, 8))
        with pytest.raises(CompressError, match=f"{name} does not predict the next token"):
            evaluate.compare(llama(0), model, windows(1, 8))


def test_tasks_without_lm_eval_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CompressError, match=r"pip install 'compress-toolkit\[eval\]'"):
        evaluate.tasks(llama(0), ByT5Tokenizer(), ["piqa"])
