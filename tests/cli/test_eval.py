from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from compress import evaluate
from compress.calib import data
from compress.cli import main
from compress.cli.eval import finite, words

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def llama(seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """Two float16 models `a` and `b` with their tokenizer, and a text."""
    for seed, name in enumerate("ab"):
        llama(seed, torch.float16).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "eval", *map(str, arguments)])
    return main.run()


def expected(folder: Path, seq_len: int) -> tuple[LlamaForCausalLM, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(folder / "a", dtype=torch.float32).eval()
    windows = data.held_out_text(folder / "text.txt", byte_tokenizer(), seq_len=seq_len).inputs["input_ids"]
    return model, windows


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    capsys.readouterr()  # what saving the models printed
    assert run(monkeypatch, folder / "a", "--text", folder / "text.txt", "--device", "cpu", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    model, windows = expected(folder, 64)
    assert result.pop("seconds") >= 0
    assert result.pop("perplexity") == pytest.approx(evaluate.perplexity(model, windows), rel=1e-5)
    assert result == {
        "model": str(folder / "a"),
        "text": f"{folder / 'text.txt'}, 19 x 64 tokens",
        "windows": 19,
        "seq_len": 64,  # what the model takes
        "dtype": "float32",  # float16 on a CPU would take minutes
        "device": "cpu",
    }
    assert captured.err == ""


def test_against(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    where = ("--text", folder / "text.txt", "--seq-len", 32, "--samples", 4, "--json", "--device", "cpu")
    assert run(monkeypatch, folder / "a", "--against", folder / "b", *where) == 0
    result = json.loads(capsys.readouterr().out)
    model, windows = expected(folder, 32)
    base = LlamaForCausalLM.from_pretrained(folder / "b", dtype=torch.float32).eval()
    found = evaluate.compare(model, base, windows[:4])
    assert result["windows"] == 4
    for name, value in {
        "perplexity": found.perplexity,
        "against_perplexity": found.base_perplexity,
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
    }.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(monkeypatch, folder / "a", "--against", folder / "a", "--text", folder / "text.txt") == 0
    printed = capsys.readouterr().out
    assert "100.00%" in printed
    assert "KL(other || model), nats per token" in printed
    assert str(folder / "text.txt") in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "nowhere/model"),
        (["empty"], "config.json"),
        (["bert"], "BertForMaskedLM does not predict the next token"),
        (["a", "--text", "missing.txt"], "There is no file missing.txt"),
        (["a", "--text", "text.txt", "--seq-len", "65"], "--seq-len is 65, but the model was built for at most 64 positions"),
        (["a", "--text", "text.txt", "--seq-len", "1"], "--seq-len"),
        (["a", "--device", "gpu9"], "gpu9"),
        (["a", "--tasks", "piqa", "--text", "text.txt"], "--tasks brings its own text"),
        (["a", "--tasks", "piqa"], "pip install 'compress-toolkit[eval]'"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], message: str
) -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    logging.disable_progress_bar()
    BertForMaskedLM(BertConfig(vocab_size=256, **small)).save_pretrained(folder / "bert")
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_lm_eval_results_become_rows() -> None:
    result = {"model": "m", "tasks": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_norm,none": 0.25, "sample_len": 10}}}
    assert words(result) == [("model", "m"), ("piqa acc", "0.5000"), ("piqa acc_norm", "0.2500")]


def test_json_has_no_infinities() -> None:
    assert finite({"a": math.inf, "b": {"c": math.nan, "d": 1.5}, "e": "x"}) == {"a": None, "b": {"c": None, "d": 1.5}, "e": "x"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_computed_in(folder, monkeypatch, capsys, dtype):
    flags = ["--text", folder / "text.txt", "--seq-len", 32, "--samples", 2, "--against", folder / "b", "--dtype", dtype]
    assert run(monkeypatch, folder / "a", *flags, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ids = data.held_out_text(str(folder / "text.txt"), byte_tokenizer(), seq_len=32, samples=2).inputs["input_ids"]
    a, b = (LlamaForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, dtype)).eval() for name in "ab")
    wanted = evaluate.compare(a, b, ids)
    assert (found["dtype"], found["perplexity"], found["kl"]) == (dtype, wanted.perplexity, wanted.kl)
