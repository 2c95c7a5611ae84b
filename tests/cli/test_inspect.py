from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from compress.cli.inspect import command
from compress.formats import PACKED, sparse
from compress.models import Layer
from compress.qtensor import QTensor
from compress.spec import LayerSpec, Plan, Scheme

NAME = "model.layers.0.up_proj"


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    return folder


def quantized(folder: Path, scheme: Scheme, K: int, form: str) -> Path:
    """A layer [64, K] with a bias, an embedding [10, 8] and a norm [8], all else float16."""
    G = scheme.groups(K)
    zeros = torch.full((64, G), scheme.levels // 2, dtype=torch.uint8)
    q = QTensor(torch.zeros(64, K, dtype=torch.uint8), torch.ones(64, G, dtype=torch.float16), zeros, scheme)
    half = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), f"{NAME}.bias": (64,)}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in half.items()}
    tensors |= {f"{NAME}.{key}": tensor for key, tensor in PACKED[form].encode(q).items()}
    config = PACKED[form].config(Plan({NAME: LayerSpec(scheme)}), [Layer(NAME, "linear", 64, K)], [])
    return write(folder, tensors, config)


def inspect(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(command, [str(folder), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["layers"]}


def test_totals_by_hand(tmp_path: Path) -> None:
    document = inspect(quantized(tmp_path, Scheme(4, 32), 128, "compressed-tensors"))
    layer_bytes = 64 * 128 // 2 + 64 * 4 * 2 + 16  # codes, scales, weight_shape
    dense_bytes = 2 * (80 + 8 + 64)
    assert rows(document)[NAME] == {
        "name": NAME,
        "scheme": "int4 g32",
        "quantized": True,
        "shape": [64, 128],
        "weights": 64 * 128,
        "bytes": layer_bytes,
        "bits_per_weight": layer_bytes * 8 / (64 * 128),
        "zeros": None,
        "patterns": [],
    }
    assert rows(document)["model.embed_tokens"]["shape"] == [10, 8]
    assert rows(document)["everything else"]["bytes"] == 2 * (8 + 64)
    assert document["totals"] == {
        "weights": 64 * 128 + 80 + 8 + 64,
        "bytes": layer_bytes + dense_bytes,
        "bits_per_weight": pytest.approx((layer_bytes + dense_bytes) * 8 / (64 * 128 + 152)),
        "quantized_layers": 1,
        "dense_bytes": dense_bytes,
        "dense_share": pytest.approx(dense_bytes / (layer_bytes + dense_bytes)),
    }


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_shape_is_exact_where_words_are_not_full(bits: int, form: str, tmp_path: Path) -> None:
    document = inspect(quantized(tmp_path, Scheme(bits, -1), 37, form))
    assert rows(document)[NAME]["shape"] == [64, 37]
    assert rows(document)[NAME]["scheme"] == f"int{bits} row"


def test_a_dense_checkpoint_is_listed_too(tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.zeros(4, 3, 2, 2), "fc.weight": torch.zeros(5, 4).bfloat16(), "fc.bias": torch.zeros(5)}
    document = inspect(write(tmp_path, tensors, None))
    assert document["quant_method"] == "dense"
    assert (rows(document)["conv"]["scheme"], rows(document)["conv"]["shape"]) == ("F32", [4, 3, 2, 2])
    assert rows(document)["fc"]["bits_per_weight"] == 16
    assert document["totals"]["dense_share"] == 1


def compressed(scheme: dict[str, Any], K: int = 96) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What compressed-tensors itself stores for one linear [64, K]."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = nn.Sequential(nn.Linear(K, 64, bias=False)).half()
    config = QuantizationConfig(config_groups={"group_0": {"targets": ["Linear"], **scheme}}, quantization_status="frozen")
    apply_quantization_config(model, config)
    model[0].weight_scale.data.fill_(0.1)
    if (zero_point := dict(model[0].named_parameters()).get("weight_zero_point")) is not None:
        zero_point.data.zero_()
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return state, json.loads(json.dumps(compressor.quantization_config.to_dict(), default=str))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "int4 g32 asym"),
        ({"num_bits": 8, "strategy": "channel"}, "int8 row"),
        ({"num_bits": 6, "strategy": "group", "group_size": 32}, "int6 group"),
    ],
)
def test_compressed_tensors_own_checkpoints_are_read(weights: dict[str, Any], expected: str, tmp_path: Path) -> None:
    state, config = compressed({"weights": weights})
    document = inspect(write(tmp_path, state, config))
    row = rows(document)["0"]
    assert (row["scheme"], row["shape"], row["quantized"]) == (expected, [64, 96], True)
    assert row["bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert document["totals"]["quantized_layers"] == 1


def test_the_table_shows_layers_and_totals(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(quantized(tmp_path, Scheme(4, 32), 128, "gptq"))], catch_exceptions=False)
    for said in (NAME, "int4 g32", "64 x 128", "bits per weight", "left dense", "gptq"):
        assert said in result.stdout


def pruned(folder: Path, form: str) -> Path:
    """A layer [8, 64] of which every second pair is zero, dense, sparse or packed."""
    W = torch.randn(8, 64).to(torch.float16)
    W.view(8, -1, 4)[..., :2] = 0
    if form == "dense":
        return write(folder, {f"{NAME}.weight": W}, None)
    if form == "sparse":
        write(folder, {f"{NAME}.{key}": tensor for key, tensor in sparse.pack(W).items()}, None)
        (folder / "model.safetensors").rename(folder / "sparse.safetensors")
        return folder
    scheme = Scheme(4, 32)
    codes = torch.where(W == 0, 8, 3).byte()
    q = QTensor(codes, torch.ones(8, 2, dtype=torch.float16), torch.full((8, 2), 8, dtype=torch.uint8), scheme)
    config = PACKED[form].config(Plan({NAME: LayerSpec(scheme)}), [Layer(NAME, "linear", 8, 64)], [])
    return write(folder, {f"{NAME}.{key}": tensor for key, tensor in PACKED[form].encode(q).items()}, config)


@pytest.mark.parametrize("form", ["dense", "sparse", "compressed-tensors", "gptq"])
def test_zeros_are_counted_in_the_stored_bytes(tmp_path: Path, form: str) -> None:
    folder = pruned(tmp_path / "pruned", form)
    result = CliRunner().invoke(command, [str(folder), "--zeros", "--json"], catch_exceptions=False)
    row = rows(json.loads(result.stdout))[NAME]
    assert (row["zeros"], row["patterns"][:2], row["shape"]) == (256, ["2:4", "4:8"], [8, 64])
    table = CliRunner().invoke(command, [str(folder), "--zeros"], catch_exceptions=False).stdout
    assert "50.00%" in table
    assert "2:4, 4:8" in table


def test_a_pattern_that_one_group_breaks_does_not_hold(tmp_path: Path) -> None:
    W = torch.ones(8, 64)
    W.view(8, -1, 4)[..., :2] = 0
    W[3, 8] = 1
    folder = write(tmp_path / "broken", {f"{NAME}.weight": W}, None)
    result = CliRunner().invoke(command, [str(folder), "--zeros", "--json"], catch_exceptions=False)
    assert rows(json.loads(result.stdout))[NAME]["patterns"] == []
