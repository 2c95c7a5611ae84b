"""Rotation from the folder to the report: what is written, when it is chosen, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint, models
from compress.errors import CompressError
from compress.rotate import checkpoint as rotated
from compress.rotate.choose import judge
from compress.rotate.folding import folds
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import Plan, Scheme
from tests import tiny

ARGUMENTS = dict(samples=16, seq_len=24, group_size=32, bits=3, rotate=True)
CPU = torch.device("cpu")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs("llama", samples=4)).logits


def save(folder: Path, outliers: bool, family: str = "llama") -> Path:
    """A random model; some inputs of every block are large by their norms, and have small weights, without an effect."""
    model = tiny.build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else parameter)
        for block in model.model.layers if outliers else []:
            readers = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
            for norm, names in readers.items():
                block.get_submodule(norm).weight[::16] *= 30
                for name, module in block.named_modules():
                    if name.rpartition(".")[2] in names:
                        module.weight[:, ::16] /= 30
    model.save_pretrained(folder, max_shard_size="50kB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def kl(model: torch.nn.Module, base: torch.nn.Module) -> float:
    log_q, log_p = logits(model).log_softmax(-1), logits(base).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rotated_folder_is_the_same_model_for_stock_transformers(family, tmp_path):
    source = save(tmp_path / "model", outliers=False, family=family)
    model = models.load(source)
    changes = folds(model, models.anatomy(model).blocks, 0)
    rotated.write(source, tmp_path / "rotated", model, changes)
    stored, before = checkpoint.index(tmp_path / "rotated"), checkpoint.index(source)
    assert {name: (info.shape, info.dtype) for name, info in stored.items()} == {
        name: (info.shape, info.dtype) for name, info in before.items()
    }
    assert len({info.file for info in stored.values()}) > 1
    assert (tmp_path / "rotated" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated").eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=3e-5)
    head = stock.get_parameter("lm_head.weight")
    assert not torch.allclose(head, model.get_parameter("lm_head.weight"), atol=0.01)


def test_outliers_are_rotated_away(tmp_path):
    source, calib = save(tmp_path / "model", outliers=True), tiny.calibration("llama", tmp_path / "calib")
    report = compress.quantize(source, out=tmp_path / "out", calib=calib, **ARGUMENTS)
    plain = compress.quantize(source, out=tmp_path / "plain", calib=calib, **(ARGUMENTS | {"rotate": False}))
    (note,) = [warning for warning in report.warnings if "otated" in warning]
    assert note.startswith("Rotated: of 384 calibration tokens")
    assert not [warning for warning in plain.warnings if "otated" in warning]
    base = models.load(source)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, unrotated = kl(stock, base), kl(compress.load(tmp_path / "plain"), base)
    assert ours < 0.7 * unrotated
    torch.testing.assert_close(logits(compress.load(tmp_path / "out")), logits(stock), rtol=1e-3, atol=1e-3)
    again = compress.quantize(source, out=tmp_path / "again", calib=calib, **ARGUMENTS)
    assert again.files == report.files


def test_where_it_does_not_help_nothing_changes(tmp_path, monkeypatch):
    source, calib = save(tmp_path / "model", outliers=False), tiny.calibration("llama", tmp_path / "calib")
    monkeypatch.setattr("compress.rotate.choose.Judgement.helps", False)
    report = compress.quantize(source, out=tmp_path / "out", calib=calib, **ARGUMENTS)
    plain = compress.quantize(source, out=tmp_path / "plain", calib=calib, **(ARGUMENTS | {"rotate": False}))
    assert [warning for warning in report.warnings if warning.startswith("Not rotated: of 384")]
    assert report.files == plain.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.jsonl", "model", "out", "plain"]


def test_a_model_that_is_not_the_same_after_all_is_refused(tmp_path):
    source = save(tmp_path / "model", outliers=False)
    model, other = models.load(source), models.load(source)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.copy_(other.model.layers[1].mlp.down_proj.weight.flip(0))
    anatomy = models.anatomy(model)
    settings = Settings("rtn", "alps", Options(), CPU, torch.float32, torch.float32)
    plan = Plan.uniform(anatomy.in_features, Scheme(4, 32))
    with pytest.raises(CompressError, match="predicts something else once it is rotated"):
        judge(model, other, anatomy, plan, tiny.inputs("llama"), settings)


def test_padding_does_not_count(tmp_path):
    source = save(tmp_path / "model", outliers=True)
    model = models.load(source)
    anatomy = models.anatomy(model)
    settings = Settings("rtn", "alps", Options(), CPU, torch.float32, torch.float32)
    plan = Plan.uniform(anatomy.in_features, Scheme(3, 32))
    inputs = tiny.inputs("llama", samples=4)
    mask = torch.ones_like(inputs["input_ids"])
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((4, 8), 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros(4, 8, dtype=mask.dtype)], 1),
    }
    judged = [judge(model, model, anatomy, plan, given, settings) for given in (inputs, padded)]
    assert judged[0].tokens == judged[1].tokens == 96
    assert judged[0].plain == pytest.approx(judged[1].plain, rel=1e-3)
    assert judged[0].plain == judged[0].rotated > 100 * judged[0].alone


def test_it_is_no_part_of_a_search_and_says_which_models_it_cannot_turn(tmp_path):
    with pytest.raises(CompressError, match="leave it out of a search"):
        compress.quantize(rotate=True, avg_bits=3.5, out=tmp_path / "out")
    with pytest.raises(CompressError, match="its output layer is its embedding"):
        compress.quantize(rotate=True, out=tmp_path / "out", samples=2)
    assert not list(tmp_path.iterdir())
