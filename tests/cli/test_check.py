from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from compress.cli.check import command
from compress.errors import CompressError
from compress.formats import PACKED
from compress.models import Layer
from compress.qtensor import QTensor
from compress.spec import LayerSpec, Plan, Scheme

NAME = "model.layers.0.up_proj"


def write(folder: Path, scheme: Scheme | None, form: str = "compressed-tensors") -> Path:
    """One layer [64, 128], quantized or dense, and an embedding."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"]}
    tensors = {"model.embed_tokens.weight": torch.zeros(32, 64)}
    if scheme is None:
        tensors[f"{NAME}.weight"] = torch.zeros(64, 128)
    else:
        codes, G = torch.zeros(64, 128, dtype=torch.uint8), scheme.groups(128)
        zeros = torch.full((64, G), scheme.levels // 2, dtype=torch.uint8)
        encoded = PACKED[form].encode(QTensor(codes, torch.ones(64, G, dtype=torch.float16), zeros, scheme))
        tensors |= {f"{NAME}.{key}": tensor for key, tensor in encoded.items()}
        layers = [Layer(NAME, "linear", 64, 128)]
        config["quantization_config"] = PACKED[form].config(Plan({NAME: LayerSpec(scheme)}), layers, [])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(folder: Path | str, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(folder), *flags])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_table_has_every_reader_and_why(tmp_path: Path) -> None:
    code, shown = check(write(tmp_path / "m", Scheme(4, 32, symmetric=False)))
    assert code == 0
    for reader in ("transformers + compressed-tensors", "dequantize=True", "vLLM", "GPTQModel", "optimum", "compress"):
        assert reader in shown
    assert "weight_zero_point" in shown


def test_json_says_the_same(tmp_path: Path) -> None:
    code, shown = check(write(tmp_path / "m", Scheme(4, 32)), "--json")
    document = json.loads(shown)
    assert (code, document["quant_method"]) == (0, "compressed-tensors")
    verdicts = {entry["reader"]: entry for entry in document["readers"]}
    assert verdicts["vLLM"]["loads"]
    assert verdicts["compress"] == {"reader": "compress", "loads": True, "reasons": [], "warnings": []}
    assert verdicts["GPTQModel"]["reasons"]


@pytest.mark.parametrize(("scheme", "form"), [(None, "dense"), (Scheme(4, 32), "gptq"), (Scheme(2, -1), "compressed-tensors")])
def test_exit_code_is_zero_where_others_load_it(scheme: Scheme | None, form: str, tmp_path: Path) -> None:
    assert check(write(tmp_path / "m", scheme, form))[0] == 0


def test_exit_code_is_one_where_nobody_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", Scheme(4, 32))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    code, shown = check(folder)
    assert code == 1
    assert "random weights" in shown


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 4), "truncated"),
        (pickled, "pickled"),
    ],
)
def test_bad_folders_are_named(damage, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", Scheme(4, 32))
    damage(folder)
    with pytest.raises(CompressError, match=said) as error:
        check(folder)
    assert str(folder) in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="nowhere"):
        check(tmp_path / "nowhere")
