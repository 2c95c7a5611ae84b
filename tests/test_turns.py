"""Models load in several threads at once, and nothing of transformers is changed afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import compress
from compress import models
from compress.errors import CompressError
from tests import tiny

THREADS = 8


@pytest.fixture(name="folders", scope="module")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model with a tied head in both formats."""
    folder = tmp_path_factory.mktemp("turns")
    model = tiny.build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "source")
    tiny.tokenizer().save_pretrained(folder / "source")
    for name in ("compressed-tensors", "gptq"):
        compress.quantize(folder / "source", out=folder / name, bits=4, group_size=32, method="rtn", format=name)
    return [folder / "compressed-tensors", folder / "gptq"]


def state() -> list[object]:
    return [
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        dict(auto.AUTO_QUANTIZER_MAPPING),
        vars(PreTrainedModel)["from_pretrained"],
        PreTrainedModel.tie_weights,
        torch.get_default_dtype(),
        torch.nn.init.normal_,
    ]


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.inputs("llama")["input_ids"]).logits


@pytest.mark.parametrize("stock", [False, True], ids=["load", "from_pretrained"])
def test_eight_threads_load_two_formats(folders, stock):
    expected, before = [said(compress.load(folder)) for folder in folders], state()
    undo = compress.enable_transformers() if stock else lambda: None
    load = AutoModelForCausalLM.from_pretrained if stock else compress.load
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = list(pool.map(load, [folders[i % 2] for i in range(2 * THREADS)]))
    undo()
    for i, model in enumerate(loaded):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(said(model), expected[i % 2])
    assert state() == before


def test_dense_and_packed_loads_take_turns(folders):
    source, before = folders[0].parent / "source", state()
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = list(pool.map(lambda i: compress.load(folders[0]) if i % 2 else models.load(source), range(2 * THREADS)))
    assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in loaded)
    assert state() == before


def test_a_process_that_cannot_load_any_more_says_what_happened(folders, tmp_path, monkeypatch):
    def empty_func(*_args, **_kwargs):
        pass

    monkeypatch.setattr(PreTrainedModel, "tie_weights", empty_func)  # what two overlapping loads leave
    with pytest.raises(CompressError, match=r"cannot load models in this process any more.*Start the process again"):
        compress.load(folders[0])
    with pytest.raises(CompressError, match="cannot load models in this process any more"):
        compress.enable_transformers()
    with pytest.raises(CompressError, match="cannot load models in this process any more"):
        compress.quantize(folders[0].parent / "source", out=tmp_path / "out", bits=4, group_size=32, method="rtn")
    monkeypatch.undo()
    assert compress.load(folders[0])
