"""Windows begin with the token that begins texts (BOS), where the tokenizer adds that by itself, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import compress
from compress import evaluate
from compress.calib import data
from compress.errors import CompressError
from tests import tiny

BOS = 1
WORDS = [f"w{4 + i % 100}" for i in range(1000)]
IDS = [4 + i % 100 for i in range(1000)]


def beginning() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, as those of Llama and Gemma do."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


@pytest.fixture(name="text")
def _text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    return tmp_path / "text.txt"


@pytest.mark.parametrize("held_out", [False, True])
def test_every_window_begins_with_it_and_holds_that_much_less_text(text, held_out):
    given = {"samples": 10, "seq_len": 20}
    made = data.held_out_text(text, beginning(), **given) if held_out else data.text(text, beginning(), **given)
    windows = made.inputs["input_ids"]
    assert windows.shape == (10, 20)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == IDS[:190]
    plain = data.held_out_text(text, tiny.tokenizer(), **given) if held_out else data.text(text, tiny.tokenizer(), **given)
    assert plain.inputs["input_ids"].flatten().tolist() == IDS[:200]


def test_a_text_that_begins_with_it_has_it_once(tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(["<s>", *WORDS[:19], "<s>", *WORDS[19:60]]))
    windows = data.text(tmp_path / "text.txt", beginning(), samples=3, seq_len=20).inputs["input_ids"]
    assert windows[:, 1:].flatten().tolist() == IDS[:57]
    assert (windows == BOS).sum(1).tolist() == [1, 1, 1]


def test_too_short_a_text_says_how_much_fits(text):
    with pytest.raises(CompressError, match=r"1,000 tokens, but 60 x 20 need.*--samples 52 or --seq-len 17"):
        data.text(text, beginning(), samples=60, seq_len=20)
    assert data.text(text, beginning(), samples=52, seq_len=20).samples == 52
    assert data.held_out_text(text, beginning(), seq_len=20).samples == 52
    with pytest.raises(CompressError, match="1,000 tokens"):
        data.held_out_text(text, beginning(), seq_len=2000)


def test_a_tokenizer_whose_text_starts_with_it_anyway_adds_none():
    made = beginning()
    assert data._beginning(made) == [BOS]
    assert data._beginning(tiny.tokenizer()) == []
    made.bos_token = None
    assert data._beginning(made) == []


def test_its_loss_is_not_counted(text):
    """Every other token is predicted, and nothing predicts the first."""
    model = tiny.build("llama")
    windows = data.held_out_text(text, beginning(), samples=3, seq_len=20).inputs["input_ids"]
    with torch.no_grad():
        predicted = model(windows).logits[:, :-1].log_softmax(-1)
    wanted = torch.tensor(IDS[:57]).view(3, 19)
    expected = -predicted.gather(-1, wanted[..., None]).mean()
    assert sum(evaluate.losses(model, windows)) / 3 == pytest.approx(float(expected), rel=1e-5)


def test_runs_and_evaluations_begin_with_it(text, tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    beginning().save_pretrained(source)
    seen: list[torch.Tensor] = []
    wanted = evaluate.losses

    def losses(model, ids, *rest):
        seen.append(ids)
        return wanted(model, ids, *rest)

    monkeypatch.setattr(evaluate, "losses", losses)
    report = compress.quantize(source, out=tmp_path / "out", bits=4, group_size=32, calib=text, samples=8, seq_len=20, eval=True)
    assert report.perplexity_after
    assert len(seen) == 2
    assert all((ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all() for ids in seen)
    assert json.loads((tmp_path / "out" / "compress_report.json").read_text())["calibration"].endswith("8 x 20 tokens, seed 0")
