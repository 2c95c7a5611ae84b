"""What is compressed is what transformers loads; a folder that lacks a part of its model is refused, with the names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress import integrity, models
from compress.cli import main
from compress.errors import CompressError
from tests import tiny

RTN = {"bits": 8, "group_size": 32, "method": "rtn", "format": "dense"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "source")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def rewrite(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    save_file(changed, folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shards(folder: Path, held: dict[str, torch.Tensor], metadata: bool = True) -> None:
    """The same names in two shards, with an index."""
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
    listed = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(({"metadata": {"total_size": 1}} if metadata else {}) | listed))


def test_a_config_that_says_null_of_quantization_is_dense(source, tmp_path):
    edit_config(source, quantization_config=None)
    assert compress.quantize(source, out=tmp_path / "out", **RTN).layers


@pytest.mark.parametrize("lost", [False, True], ids=["old shards", "index alone"])
def test_a_whole_file_counts_before_an_index(source, tmp_path, lost):
    """As transformers has it, whichever is newer."""
    held = tensors(source)
    shards(source, {name: torch.zeros_like(tensor) for name, tensor in held.items()})
    if lost:
        (source / "model-00001-of-00002.safetensors").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(source).state_dict()
    compress.quantize(source, out=tmp_path / "out", **RTN)
    for name, tensor in tensors(tmp_path / "out").items():
        assert (tensor - loaded[name]).abs().max() <= 0.02 * loaded[name].abs().max(), name
        if "proj" not in name:
            assert torch.equal(tensor, held[name])
    assert not (tmp_path / "out" / INDEX).exists()


def test_shards_are_read_where_there_is_no_whole_file(source, tmp_path):
    compress.quantize(source, out=tmp_path / "whole", **RTN)
    shards(source, tensors(source))
    (source / SINGLE).unlink()
    compress.quantize(source, out=tmp_path / "out", **RTN)
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("listing", ["no metadata", "{", "[]"])
def test_an_index_that_transformers_cannot_read(source, tmp_path, listing):
    shards(source, tensors(source), metadata=False)
    (source / SINGLE).unlink()
    if listing != "no metadata":
        (source / INDEX).write_text(listing)
    with pytest.raises(CompressError, match=r"index\.json (needs|is damaged)"):
        compress.quantize(source, out=tmp_path / "out", **RTN)


@pytest.mark.parametrize("missing", ["model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_model_that_lacks_a_weight_is_refused(source, tmp_path, missing):
    held = tensors(source)
    del held[missing]
    rewrite(source, held)
    with pytest.raises(CompressError, match=f"lacks {missing}, which LlamaForCausalLM needs"):
        compress.quantize(source, out=tmp_path / "out", **RTN)
    assert not (tmp_path / "out").exists()


def test_many_missing_weights_are_counted(source, tmp_path):
    rewrite(source, {name: tensor for name, tensor in tensors(source).items() if "layernorm" not in name})
    with pytest.raises(CompressError, match=r"input_layernorm\.weight.* and 1 more"):
        compress.quantize(source, out=tmp_path / "out", **RTN)


def test_an_encoder_without_its_pooler_is_whole(tmp_path):
    source = tiny.save("bert_model", tmp_path / "source")
    rewrite(source, {name: tensor for name, tensor in tensors(source).items() if "pooler" not in name})
    assert compress.quantize(source, out=tmp_path / "out", **RTN).layers


@pytest.mark.parametrize(
    ("prefix", "who"), [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT")]
)
def test_a_wrapped_model_is_told_how_to_be_saved(source, tmp_path, prefix, who):
    rewrite(source, {prefix + name: tensor for name, tensor in tensors(source).items()})
    with pytest.raises(CompressError, match=rf"named {prefix}\.\.\., as {who} names them.*save model\."):
        compress.quantize(source, out=tmp_path / "out", **RTN)


def test_a_head_that_the_config_ties_and_the_file_does_not(source, tmp_path):
    edit_config(source, tie_word_embeddings=True)
    report = compress.quantize(source, out=tmp_path / "out", **RTN)
    assert [warning for warning in report.warnings if "config.json says that the head is tied" in warning]
    ids = tiny.inputs("llama")["input_ids"]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, tmp_path / "out"))
    assert (before - after).norm() < 0.05 * before.norm()


def test_a_tied_head_that_is_not_stored_is_whole(source, tmp_path):
    edit_config(source, tie_word_embeddings=True)
    rewrite(source, {name: tensor for name, tensor in tensors(source).items() if name != "lm_head.weight"})
    assert not any("tied" in warning for warning in compress.quantize(source, out=tmp_path / "out", **RTN).warnings)


def test_a_tokenizer_with_more_tokens_than_the_embedding(tmp_path, monkeypatch, capsys):
    model = tiny.build("llama")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "source")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 124}" for i in range(4000)))
    said = r"gives token 127 \(it has 128 tokens\), but the model's embedding has 100 rows"
    with pytest.raises(CompressError, match=said):
        compress.quantize(tmp_path / "source", out=tmp_path / "out", bits=4, calib=text, samples=8, seq_len=32)
    monkeypatch.setattr("sys.argv", ["compress", "eval", str(tmp_path / "source"), "--text", str(text), "--seq-len", "32"])
    assert main.run() == 2
    assert "gives token 127" in capsys.readouterr().err


@pytest.mark.parametrize(("said", "longest"), [(-1, None), (0, None), (10**30, None), (64, 64), (131072, 131072)])
def test_absurd_numbers_of_positions_are_none(source, said, longest):
    edit_config(source, max_position_embeddings=said)
    assert models.max_positions(source) == longest


def test_a_config_that_transformers_refuses(source, tmp_path):
    edit_config(source, max_position_embeddings="many")
    with pytest.raises(CompressError, match="max_position_embeddings"):
        compress.quantize(source, out=tmp_path / "out", **RTN)


def test_names_that_only_begin_like_a_wrapper_are_fine():
    integrity.check_names(Path("folder"), ["module.weight", "head.weight"])
    integrity.check_names(Path("folder"), [])
