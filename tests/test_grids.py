"""Grids other than evenly spaced ones, from the arguments to the model that is loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compress
from compress import hf, models
from compress.cli import main
from compress.errors import CompressError
from compress.formats import compressed_tensors
from compress.kernels import packing
from compress.nn import QuantLinear
from compress.qtensor import dequantize
from compress.spec import FIXED, LayerSpec, Plan, Scheme, Sparsity
from tests import tiny

IDS = tiny.inputs("llama", 2, 16)["input_ids"]
FLOATS = [grid for grid, fixed in FIXED.items() if fixed.form != "int"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("grids") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.calibration("llama", tmp_path_factory.mktemp("grids") / "calib")


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model on every grid, rounded to nearest."""
    root = tmp_path_factory.mktemp("quantized")
    for grid in FIXED:
        compress.quantize(source, out=root / grid, grid=grid, method="rtn", device="cpu")
    return {grid: root / grid for grid in FIXED}


def weights(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The dequantized weight of every layer, read by the format alone."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, shape in models.anatomy(tiny.build("llama")).shapes.items():
        parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        scheme = compressed_tensors.scheme_of(config, name, "Linear")
        assert scheme is not None
        found[name] = dequantize(compressed_tensors.decode(parts, scheme, shape), dtype)
    return found


@pytest.mark.parametrize("grid", FIXED)
def test_the_loaded_model_stays_packed_and_equals_the_dequantized_one(grid, quantized, tmp_path):
    model = hf.load(quantized[grid], device="cpu", dtype="float32")
    dense = tiny.build("llama", torch.bfloat16).float()
    for name, weight in weights(quantized[grid], torch.float32).items():
        module = model.get_submodule(name)
        assert type(module) is QuantLinear
        held = sum(tensor.nbytes for tensor in module.packed.tensors.values())
        assert held < 1.1 * max(4, FIXED[grid].bits) / 8 * weight.numel() + 3 * weight.numel() / 16
        dense.get_submodule(name).weight = nn.Parameter(weight)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (quantized[grid], tmp_path / "again"))
    assert before.keys() == after.keys()
    packed = [name for name in before if "_proj." in name]
    assert len(packed) == 14 * len(compressed_tensors.layout(Scheme.of(grid), (64, 64), torch.bfloat16))
    assert all(before[name].dtype == after[name].dtype for name in packed)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in packed)


@pytest.mark.parametrize("grid", FIXED)
def test_the_dense_format_holds_the_same_weights(grid, source, quantized, tmp_path):
    compress.quantize(source, out=tmp_path / "dense", grid=grid, method="rtn", format="dense", device="cpu")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    for name, weight in weights(quantized[grid]).items():
        assert torch.equal(tensors[f"{name}.weight"], weight)


@pytest.mark.parametrize("grid", FIXED)
def test_second_order_solutions_lose_less(grid, source, calib, quantized, tmp_path):
    report = compress.quantize(
        source, out=tmp_path / "out", grid=grid, calib=calib, samples=16, seq_len=24, device="cpu", effort="default"
    )
    assert {layer.spec for layer in report.layers} == {str(Scheme.of(grid).fit(64)), str(Scheme.of(grid).fit(96))}
    assert report.output_errors is not None
    inputs = tiny.inputs("llama")["input_ids"]
    truth = tiny.build("llama", torch.bfloat16).float()(inputs).logits
    solved, nearest = (
        (hf.load(folder, device="cpu", dtype="float32")(inputs).logits - truth).square().mean()
        for folder in (tmp_path / "out", quantized[grid])
    )
    assert solved < 0.9 * nearest


def test_layers_that_runtimes_fuse_share_nvfp4s_global_scale(quantized):
    tensors = load_file(quantized["nvfp4"] / "model.safetensors")
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        shared = {tensors[f"model.layers.0.{part}.weight_global_scale"].item() for part in parts}
        assert len(shared) == 1
        assert torch.frexp(torch.tensor(shared.pop())).mantissa == 0.5  # a power of two


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
def test_inputs_that_groups_do_not_divide_leave_a_layer_dense_and_the_report_says_so(grid, tmp_path):
    model = tiny.build("llama")
    config = model.config
    config.intermediate_size = 72
    type(model)(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = compress.quantize(tmp_path / "model", out=tmp_path / "out", grid=grid, method="rtn", device="cpu")
    size = FIXED[grid].group_size
    assert report.dense["model.layers.0.mlp.down_proj"] == f"its 72 inputs are no multiple of {size}, the group size of {grid}"
    assert len(report.layers) == 12
    assert isinstance(hf.load(tmp_path / "out", device="cpu").get_submodule("model.layers.0.mlp.down_proj"), nn.Linear)


@pytest.mark.parametrize("grid", FLOATS)
def test_who_loads_them_is_said_before_and_after(grid, quantized, monkeypatch, capsys):
    report = json.loads((quantized[grid] / "compress_report.json").read_text())
    assert any("dequantized in every call" in warning for warning in report["warnings"])
    assert any("Marlin" in warning for warning in report["warnings"])
    assert run(monkeypatch, "inspect", quantized[grid]) == 0
    printed = capsys.readouterr().out
    assert grid in printed
    assert "dequantized in every call" in " ".join(printed.split())
    assert run(monkeypatch, "check", quantized[grid]) == 0
    assert f"are {grid}" in " ".join(capsys.readouterr().out.split())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["compress", *map(str, arguments)])
    return main.run()


def test_the_command_takes_a_grid_and_names_the_folder_after_it(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "quantize", source, "--grid", "mxfp4", "--method", "rtn") == 0
    assert "14 x mxfp4; 1 left dense" in capsys.readouterr().out
    assert (tmp_path / "model-mxfp4" / "config.json").is_file()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"grid": "fp8", "bits": 4}, "bits is 4, but grid fp8 has 8"),
        ({"grid": "mxfp4", "bits": 8}, "bits is 8, but grid mxfp4 has 4"),
        ({"grid": "mxfp4", "group_size": 128}, "group size is 128, but grid mxfp4 has groups of 32"),
        ({"grid": "nvfp4", "group_size": 32}, "group size is 32, but grid nvfp4 has groups of 16"),
        ({"grid": "ternary", "bits": 3}, "bits is 3, but grid ternary has 2"),
        ({"grid": "fp8", "group_size": 128}, "group size is 128, but grid fp8 has one scale per row"),
        ({"grid": "nvfp4", "symmetric": False}, "Grid nvfp4 has no zero points"),
        ({"grid": "mxfp4", "format": "gptq"}, "The gptq format cannot hold grid mxfp4"),
        ({"grid": "nvfp4", "avg_bits": 4.5}, "A search chooses among bits of grid int"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work_starts(asked, said, source, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("work had started"))
    with pytest.raises(CompressError, match=said):
        compress.quantize(source, out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", FIXED)
def test_plans_carry_grids(grid):
    plan = Plan({"a": LayerSpec(Scheme.of(grid)), "b": LayerSpec(Scheme(4, 32)), "c": LayerSpec()})
    assert Plan.from_json(plan.to_json()) == plan
    written = json.loads(plan.to_json())["layers"]
    assert written["a"]["scheme"]["grid"] == grid
    assert "grid" not in written["b"]["scheme"]
    short = Plan.from_json(f'{{"version": 1, "layers": {{"a": {{"scheme": {{"grid": "{grid}"}}}}}}}}')
    assert short.layers["a"] == plan.layers["a"]


def test_fused_layers_that_are_pruned_one_by_one_cannot_share_a_scale():
    with pytest.raises(CompressError, match=r"pattern unstructured solves one by one; use an N:M pattern"):
        LayerSpec(Scheme.of("nvfp4"), Sparsity(0.5))
    LayerSpec(Scheme.of("nvfp4"), Sparsity.of("2:4", None))


def test_a_plan_with_an_unknown_grid_is_refused():
    with pytest.raises(CompressError, match=r"p\.json: layer a: There is no grid fp6; choose one of int, ternary, fp8"):
        Plan.from_json('{"version": 1, "layers": {"a": {"scheme": {"grid": "fp6"}}}}', "p.json")


def test_a_plan_for_inputs_that_groups_do_not_divide_is_refused():
    plan = Plan({"a": LayerSpec(Scheme.of("mxfp4"))})
    with pytest.raises(CompressError, match=r"group size 32, which does not divide its 80 inputs; grid mxfp4 has no other"):
        plan.check({"a": (8, 80)})


def test_ternary_layers_are_two_bits_that_leave_one_code_unused(quantized, source, tmp_path):
    tensors = load_file(quantized["ternary"] / "model.safetensors")
    assert packing.unpack(tensors["model.layers.0.mlp.up_proj.weight_packed"], 2, 64).unique().tolist() == [1, 2, 3]
    report = compress.quantize(
        source, out=tmp_path / "out", grid="ternary", group_size=32, format="gptq", method="rtn", device="cpu"
    )
    assert {layer.spec for layer in report.layers} == {"ternary g32"}
    hf.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize(("grid", "bits"), [("fp8", 8 + 16 / 96), ("mxfp4", 4.25), ("nvfp4", 4.5 + 32 / (64 * 96))])
def test_bits_per_weight_count_scales_and_what_a_layer_shares(grid, bits):
    scheme = Scheme.of(grid)
    assert scheme.stored_bits(64, 96, 16) == pytest.approx(bits * 64 * 96)
    stored = compressed_tensors.layout(scheme, (64, 96), torch.bfloat16)
    counted = sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in stored.values())
    assert scheme.stored_bits(64, 96, 16) == counted
