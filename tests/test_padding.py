"""Classifiers on decoders whose config names no padding token: they judge the last token of every window."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from compress import models
from compress.api import quantize
from compress.pruning import prune
from tests import tiny

SMALL = dict(samples=6, seq_len=24, group_size=32)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**(tiny.LLAMA | {"pad_token_id": None}), num_labels=3))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_batch_is_judged_as_its_windows_are_one_by_one(classifier):
    ids = torch.randint(0, tiny.VOCAB, (8, 12), generator=torch.Generator().manual_seed(1))
    ids[:4, -1] = 0  # what others take for padding is a token like any other
    ids[4:, -1] = 2
    stock = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    loaded = models.load(classifier)
    with torch.no_grad():
        expected = torch.cat([stock(input_ids=one[None]).logits for one in ids])
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_language_models_and_those_that_name_a_padding_token_stay_as_they_are(tmp_path):
    LlamaForCausalLM(LlamaConfig(**(tiny.LLAMA | {"pad_token_id": None}))).save_pretrained(tmp_path / "causal")
    assert models.load(tmp_path / "causal").config.pad_token_id is None
    LlamaForSequenceClassification(LlamaConfig(**tiny.LLAMA)).save_pretrained(tmp_path / "padded")
    assert models.load(tmp_path / "padded").config.pad_token_id == 0


@pytest.mark.parametrize("asked", [dict(effort="best"), dict(effort="fast", avg_bits=5.0, bits="4,8")])
def test_it_can_be_weighed_and_searched(classifier, tmp_path, asked):
    report = quantize(
        classifier, out=tmp_path / "out", library=tmp_path / "library" if "avg_bits" in asked else None, **SMALL, **asked
    )
    assert len(report.layers) == 14
    written = (tmp_path / "out" / "config.json").read_text()
    assert '"pad_token_id": -1' not in written


def test_labelled_texts_are_padded_with_the_tokenizers_token(classifier, tmp_path):
    rows = [f'{{"text": "{"w5 w6 w7 " * (1 + n % 3)}", "label": {n % 3}}}' for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    given = dict(method="obert", sparsity=0.3, calib=tmp_path / "rows.jsonl", samples=8, seq_len=24, recompute=1)
    assert prune(classifier, out=tmp_path / "out", **given).layers
