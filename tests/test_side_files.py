"""What lies beside a model's weights comes along, and what does not is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compress
from compress import models, side_files
from compress.errors import CompressError
from tests import tiny

KEPT = {
    "tokenizer.json": "{}",
    "notes/readme.bin": "not weights of the model",
    "1_Pooling/config.json": '{"word_embedding_dimension": 64}',
    "2_Dense/model.safetensors": "weights of another module",
    "additional_chat_templates/tool.jinja": "{{ x }}",
}
LEFT = {
    "model.safetensors": "",
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "{}",
    "onnx/model.onnx": "",
    "onnx/model.onnx_data": "",
    "original/consolidated.00.pth": "",
    ".cache/x": "",
    "code/__pycache__/a.pyc": "",
}


def made(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_everything_but_the_models_weights_is_copied(tmp_path):
    source, target = made(tmp_path / "source", KEPT | LEFT), tmp_path / "target"
    side_files.copy(source, target)
    copied = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert copied == KEPT
    (others,) = side_files.left_behind(source)
    assert "onnx, original" in others
    assert side_files.left_behind(made(tmp_path / "plain", KEPT)) == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_loads_what_comes_out(tmp_path):
    """Its dense layer has weights of its own, in a folder of its own."""
    from sentence_transformers import SentenceTransformer

    source = tiny.save("bert_model", tmp_path / "source")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    dense = {"in_features": 64, "out_features": 8, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    made(source, {"modules.json": json.dumps(listed)})
    made(source, {"1_Pooling/config.json": json.dumps(pooling), "2_Dense/config.json": json.dumps(dense)})
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, source / "2_Dense" / "model.safetensors")
    out = tmp_path / "out"
    compress.quantize(source, out=out, bits=8, group_size=32, method="rtn", format="dense")
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (source, out))
    assert torch.equal(after[2].linear.weight, weight)
    texts = ["w5 w6 w7", "w9 w10"]
    assert after.encode(texts).shape == (2, 8)
    torch.testing.assert_close(
        after.encode(texts, convert_to_tensor=True), before.encode(texts, convert_to_tensor=True), rtol=0.1, atol=0.1
    )


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    """With PEFT installed, transformers would load the adapter around the layers, or fail where only its config is left."""
    source = tiny.save("llama", tmp_path / "source")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
    with pytest.raises(CompressError, match=r"adapter_config\.json beside the model.*merge_and_unload.*or move"):
        compress.quantize(source, out=tmp_path / "out", bits=4, method="rtn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [(None, "reference_llama"), ("org/Model-1B", "Model-1B"), ("folder", "folder"), ("folder/.", "folder")],
)
def test_results_are_named_after_folders_and_repositories(model, name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.short_name(model) == name


def test_a_download_is_not_named_after_its_commit(tmp_path):
    folder = tmp_path / "models--org--Model-1B" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert models.short_name(folder) == "Model-1B"
