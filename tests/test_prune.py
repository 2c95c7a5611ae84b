"""`compress.prune` end to end: counts, files, and who can read them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint, models
from compress.errors import CompressError
from compress.spec import Plan
from tests import tiny

SMALL = dict(samples=16, seq_len=24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny.save("llama", folder / "model", torch.bfloat16), tiny.calibration("llama", folder / "calib")


def prune(llama, out, **arguments):
    source, calib = llama
    return compress.prune(source, out=out, calib=calib, **(SMALL | arguments))


@torch.no_grad()
def logits(folder, ids):
    return compress.load(folder, device="cpu", dtype=torch.float32)(ids).logits.log_softmax(-1)


def layers(folder):
    model = models.load(folder)
    return {layer.name: models.matrix(model.get_submodule(layer.name)) for layer in models.anatomy(model).layers}


@pytest.mark.parametrize("method", ["alps", "sparsegpt", "wanda", "magnitude", "obs"])
def test_every_layer_has_the_zeros_that_were_asked_for(llama, tmp_path, method):
    report = prune(llama, tmp_path / "out", sparsity=0.3, method=method)
    for entry, (name, W) in zip(report.layers, layers(tmp_path / "out").items(), strict=True):
        assert entry.name == name
        assert int((W == 0).sum()) == entry.zeros
        assert abs(entry.zeros - 0.3 * W.numel()) <= 1
        assert entry.sparsity == entry.zeros / W.numel()
        assert entry.spec == "0.3 unstructured"
        assert 0 < entry.output_error < 1
    weights = sum(shape[0] * shape[1] for shape in (entry.shape for entry in report.layers))
    assert report.zeros == (round(0.3 * weights), weights)


@pytest.mark.parametrize("bits", [None, 4])
def test_by_default_layers_make_up_for_what_was_pruned_before_them(llama, tmp_path, bits):
    source, calib = llama
    ids = torch.tensor([json.loads(line)["input_ids"] for line in calib.read_text().splitlines()])[:, :24]
    wanted, off = logits(source, ids), {}
    for effort in ("fast", "default"):
        prune(llama, tmp_path / effort, effort=effort, bits=bits, group_size=32 if bits else 128, samples=len(ids))
        off[effort] = (logits(tmp_path / effort, ids) - wanted).square().mean()
    assert off["default"] < 0.9 * off["fast"]


@pytest.mark.parametrize(("pattern", "of", "zeros"), [("2:4", 4, 2), ("4:8", 8, 4), ("1:4", 4, 3)])
def test_nm_patterns_hold_in_every_group_of_the_stored_weights(llama, tmp_path, pattern, of, zeros):
    report = prune(llama, tmp_path / "out", pattern=pattern)
    assert report.arguments["sparsity"] is None
    for W in layers(tmp_path / "out").values():
        assert ((W.reshape(len(W), -1, of) == 0).sum(-1) == zeros).all()


@pytest.mark.parametrize("pattern", ["block:1x4", "block:4x8"])
def test_blocks_are_zero_as_a_whole(llama, tmp_path, pattern):
    prune(llama, tmp_path / "out", sparsity=0.5, pattern=pattern)
    rows, cols = map(int, pattern.removeprefix("block:").split("x"))
    for W in layers(tmp_path / "out").values():
        blocks = (W == 0).view(W.shape[0] // rows, rows, W.shape[1] // cols, cols).transpose(1, 2).flatten(2)
        assert torch.equal(blocks.all(-1), blocks.any(-1))
        assert abs(int(blocks.all(-1).sum()) - 0.5 * blocks[..., 0].numel()) <= 1


def test_a_dense_checkpoint_loads_anywhere_and_is_as_large(llama, tmp_path):
    report = prune(llama, tmp_path / "out")
    assert report.size_after == report.size_before
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = torch.arange(12)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = compress.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert torch.equal(stock(ids).logits, ours(ids).logits)


def test_a_sparse_checkpoint_is_smaller_and_only_ours(llama, tmp_path):
    prune(llama, tmp_path / "dense", sparsity=0.7)
    report = prune(llama, tmp_path / "sparse", sparsity=0.7, format="sparse")
    assert report.size_after < 0.75 * report.size_before
    assert report.size_after == sum(info.nbytes for info in checkpoint.index(tmp_path / "sparse").values())
    ids = torch.arange(12)[None]
    dense, sparse = (compress.load(tmp_path / name, device="cpu", dtype=torch.float32) for name in ("dense", "sparse"))
    assert torch.equal(dense(ids).logits, sparse(ids).logits)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


@pytest.mark.parametrize(("method", "pattern"), [("sparsegpt", "2:4"), ("alps", "2:4"), ("wanda", "unstructured")])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_pruned_and_quantized_weights_have_their_zeros_in_the_packed_codes(llama, tmp_path, method, pattern, name):
    report = prune(llama, tmp_path / "out", pattern=pattern, method=method, bits=4, group_size=32, format=name)
    assert all(entry.zeros >= entry.shape[0] * entry.shape[1] // 2 for entry in report.layers)
    assert report.size_after < 0.75 * report.size_before
    eye = torch.eye(64)
    q_proj = compress.load(tmp_path / "out", device="cpu", dtype=torch.float32).get_submodule("model.layers.0.self_attn.q_proj")
    W = q_proj(eye).t()
    assert int((W == 0).sum()) >= W.numel() // 2
    if pattern == "2:4":
        assert ((W.view(len(W), -1, 4) == 0).sum(-1) >= 2).all()


def test_the_same_command_gives_the_same_bytes(llama, tmp_path):
    one, two = (prune(llama, tmp_path / out, sparsity=0.6).files for out in ("one", "two"))
    assert one == two


def test_magnitude_without_refit_needs_no_calibration(llama, tmp_path):
    report = compress.prune(llama[0], out=tmp_path / "out", method="magnitude", refit=False)
    assert report.calibration is None
    assert report.output_errors is None
    before, after = layers(llama[0]), layers(tmp_path / "out")
    assert all(torch.equal(after[name][after[name] != 0], before[name][after[name] != 0]) for name in after)


@pytest.mark.parametrize("allocate", ["global", "owl", "ecoflap"])
def test_allocations_share_the_zeros_out_unevenly_and_exactly(llama, tmp_path, allocate):
    report = prune(llama, tmp_path / "out", sparsity=0.5, method="wanda", allocate=allocate)
    zeros, weights = report.zeros
    assert zeros == round(0.5 * weights)
    if allocate != "owl":  # random weights have no outliers
        assert len({round(entry.sparsity, 2) for entry in report.layers}) > 1
    plan = Plan.load(tmp_path / "out" / "compress_plan.json")
    assert {entry.name: entry.zeros for entry in report.layers} == {
        name: plan.layers[name].sparsity.zeros(*W.shape) for name, W in layers(tmp_path / "out").items()
    }


@pytest.mark.parametrize("method", ["obert", "mfac"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruning_on_the_loss(llama, tmp_path, method, pattern):
    report = prune(llama, tmp_path / "out", method=method, pattern=pattern, recompute=2)
    zeros, weights = report.zeros
    assert zeros == weights // 2
    if pattern == "unstructured":  # one threshold for all layers
        assert len({entry.zeros / entry.shape[1] for entry in report.layers}) > 1
    uniform = prune(llama, tmp_path / "uniform", method=method, pattern=pattern, recompute=1, allocate="uniform")
    assert all(entry.sparsity == 0.5 for entry in uniform.layers)


def test_classes_in_the_data_are_the_loss_of_a_classifier(tmp_path):
    source = tiny.save("bert", tmp_path / "model")
    rows = [{"text": f"{i} {i + 1} {7 * i % 50}", "label": i % 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = dict(calib=tmp_path / "rows.jsonl", samples=24, method="obert", recompute=1)
    report = compress.prune(source, out=tmp_path / "out", **asked)
    assert "texts of at most" in report.calibration
    assert report.zeros[0] == report.zeros[1] // 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row["text"] * 9}) + "\n" for row in rows))
    with pytest.raises(CompressError, match="needs labels"):
        compress.prune(source, out=tmp_path / "no", loss="classification", seq_len=8, **asked)


def test_fine_tuning_comes_closer_to_the_dense_model_and_keeps_the_zeros(llama, tmp_path):
    ids, distances = tiny.inputs("llama")["input_ids"], []
    dense = logits(llama[0], ids)
    for steps in (0, 40):
        report = prune(llama, tmp_path / str(steps), sparsity=0.7, method="magnitude", finetune=steps)
        assert report.zeros[0] == round(0.7 * report.zeros[1])
        pruned = logits(tmp_path / str(steps), ids)
        distances.append(float((dense.exp() * (dense - pruned)).sum(-1).mean()))
    assert distances[1] < distances[0]


def test_rows_leave_a_smaller_dense_model(llama, tmp_path):
    report = prune(llama, tmp_path / "out", sparsity=0.25, pattern="row")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 72
    assert report.size_after < report.size_before
    assert "72x64" in {entry.spec for entry in report.layers}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.model.layers[1].mlp.down_proj.weight.shape == (64, 72)


@pytest.mark.parametrize("family", ["gpt2", "bert", "resnet"])
def test_other_families(tmp_path, family):
    source, calib = tiny.save(family, tmp_path / "model"), tiny.calibration(family, tmp_path / "calib")
    report = compress.prune(source, out=tmp_path / "out", calib=calib, sparsity=0.5, **SMALL)
    weights = layers(tmp_path / "out")
    for entry in report.layers:
        W = weights[entry.name]
        assert int((W == 0).sum()) == entry.zeros
        assert abs(entry.zeros - 0.5 * W.numel()) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1; it is a fraction"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"pattern": "2-4"}, "The pattern is '2-4'; use unstructured, N:M"),
        ({"pattern": "0:4"}, "The pattern is '0:4'"),
        ({"pattern": "4:4"}, "nothing would be pruned"),
        ({"pattern": "4:2"}, "keeps 4 of every 2 weights, so that nothing"),
        ({"pattern": "2:4", "sparsity": 0.7}, "a sparsity of 0.5, not 0.7"),
        ({"pattern": "3:7"}, r"Pattern 3:7 does not fit model.layers.0.self_attn.q_proj: its 64 inputs are not a multiple of 7"),
        ({"pattern": "block:5x1"}, r"its 64 rows are not a multiple of 5"),
        ({"format": "gptq"}, "Format gptq packs quantized weights; give --bits too"),
        ({"format": "sparse", "bits": 4}, "leave out --bits"),
        ({"bits": 5}, "bits is 5"),
        ({"method": "obert", "bits": 4}, "prunes without a grid"),
        ({"method": "obert", "allocate": "owl"}, "compares the costs of all layers itself"),
        ({"method": "alps", "recompute": 4}, "--recompute is for obert and mfac"),
        ({"finetune": -1}, "--finetune is -1"),
        ({"finetune": 9, "bits": 4}, "moves weights off the grid"),
        ({"pattern": "row", "bits": 4}, "--bits does not apply"),
        ({"pattern": "row", "format": "sparse"}, "--format sparse does not apply"),
        ({"pattern": "row", "method": "wanda"}, "does not remove rows"),
        ({"pattern": "2:4", "allocate": "global"}, "cannot give every layer pattern 2:4"),
        ({"bits": 0}, "bits is 0"),
        ({"method": "obert", "recompute": 0}, "--recompute is 0"),
        ({"group_size": 32, "symmetric": False}, "without --bits there is no grid; leave out --group-size, --asymmetric"),
        ({"loss": "kl"}, "method alps looks at layers, and not at the model's loss; leave out --loss kl"),
        ({"method": "mfac", "refit": False}, "leave out --no-refit"),
        ({"pattern": "row", "refit": False}, "leave out --no-refit"),
        ({"method": "wanda", "refit": False, "damping": 0.1}, "leave out --damping"),
        ({"method": "wanda", "refit": False, "effort": "fast"}, "leave out --effort fast"),
        ({"method": "obert", "effort": "fast"}, "leave out --effort fast"),
        ({"pattern": "row", "effort": "fast"}, "leave out --effort fast"),
        ({"pattern": "row", "method": "magnitude"}, "leave out --calib, --samples, --seq-len"),
        ({"method": "magnitude", "refit": False}, "leave out --calib, --samples, --seq-len"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(llama, tmp_path, arguments, message):
    with pytest.raises(CompressError, match=f"(?i){message}"):
        prune(llama, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
