from __future__ import annotations

import json

import pytest
import torch

import compress
from compress import checkpoint, models, sequential
from compress.errors import CompressError
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

DRAWN = dict(samples=16, seq_len=24)
SMALL = dict(**DRAWN, group_size=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny.save("llama", folder / "model", torch.bfloat16), tiny.calibration("llama", folder / "calib")


def quantize(llama, out, **arguments):
    source, calib = llama
    return compress.quantize(source, out=out, calib=calib, **(SMALL | arguments))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "dense"])
def test_the_size_was_known_before_and_the_report_agrees_with_the_files(llama, tmp_path, bits, name):
    report = quantize(llama, tmp_path / "out", bits=bits, format=name)
    stored = checkpoint.index(tmp_path / "out")
    assert report.size_after == sum(info.nbytes for info in stored.values())
    weights = sum(info.numel for info in checkpoint.index(llama[0]).values())
    assert report.bits_per_weight == pytest.approx(8 * report.size_after / weights)
    written = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert written["size_after"] == report.size_after
    assert written["arguments"]["bits"] == bits
    assert len(written["layers"]) == 14
    assert written["versions"]["torch"] == torch.__version__
    checkpoint.verify(tmp_path / "out")
    assert compress.load(tmp_path / "out").config.vocab_size == tiny.VOCAB


def test_the_same_command_gives_the_same_bytes(llama, tmp_path):
    for out in ("one", "two"):
        quantize(llama, tmp_path / out)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_fewer_bits_lose_more(llama, tmp_path):
    errors = [quantize(llama, tmp_path / str(bits), bits=bits).output_errors[1] for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 * errors[-1]


def test_a_group_size_that_does_not_divide_is_fitted_and_said(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", group_size=64)
    fitted = {layer.name: layer.notes for layer in report.fallbacks}
    assert fitted == {f"model.layers.{i}.mlp.down_proj": ("group size 64 does not divide 96 inputs: 32",) for i in (0, 1)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["group_size"] for group in config["config_groups"].values()} == {64, 32}


def test_a_plan_decides_layer_by_layer(llama, tmp_path):
    names = models.anatomy(models.load(llama[0])).in_features
    layers = {name: LayerSpec(Scheme(3 if "mlp" in name else 8, 32)) for name in names}
    layers["model.layers.1.mlp.down_proj"] = LayerSpec(None)
    (tmp_path / "plan.json").write_text(Plan(layers).to_json())
    given = dict(calib=llama[1], **DRAWN)
    report = compress.quantize(llama[0], out=tmp_path / "out", plan=tmp_path / "plan.json", **given)
    assert {layer.name: layer.spec for layer in report.layers} == {
        name: str(spec.scheme) for name, spec in layers.items() if spec.scheme
    }
    assert report.dense["model.layers.1.mlp.down_proj"] == "dense by plan"
    assert Plan.load(tmp_path / "out" / "compress_plan.json").layers == layers
    again = compress.quantize(llama[0], out=tmp_path / "again", plan=tmp_path / "out" / "compress_plan.json", **given)
    assert again.size_after == report.size_after


def test_skipped_layers_stay_as_they_are(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", skip=["layers.0", "o_proj$"])
    assert len(report.layers) == 6
    assert sum(reason == "skipped by request" for reason in report.dense.values()) == 8
    served, source = compress.load(tmp_path / "out"), models.load(llama[0])
    assert torch.equal(served.model.layers[0].mlp.up_proj.weight, source.model.layers[0].mlp.up_proj.weight)


def test_tied_heads_stay_tied_and_dense(tmp_path):
    model = tiny.build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    calib = tiny.calibration("llama", tmp_path / "calib")
    compress.quantize(tmp_path / "model", out=tmp_path / "out", calib=calib, **SMALL)
    assert not [name for name in checkpoint.index(tmp_path / "out") if "lm_head" in name]
    served = compress.load(tmp_path / "out")
    assert served.lm_head.weight is served.model.embed_tokens.weight


def test_asymmetric_and_uncalibrated(llama, tmp_path):
    report = compress.quantize(llama[0], out=tmp_path / "out", symmetric=False, method="rtn", group_size=32)
    assert report.calibration is None
    assert report.output_errors is None
    assert any("transformers" in warning for warning in report.warnings)  # stock transformers cannot load asymmetric


def test_checkpoint_names_of_other_spellings_are_found(tmp_path):
    """A bare encoder's folder, read by a class that adds the prefix, and the other way round."""
    from safetensors.torch import load_file, save_file

    source = tiny.save("bert", tmp_path / "model")
    tensors = {name.removeprefix("bert."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    calib = tiny.calibration("bert", tmp_path / "calib")
    compress.quantize(source, out=tmp_path / "out", calib=calib, **SMALL)
    assert "encoder.layer.0.output.dense.weight_packed" in checkpoint.index(tmp_path / "out")
    with torch.no_grad():
        inputs = tiny.inputs("bert", 4)
        error = compress.load(tmp_path / "out")(**inputs)[0] - models.load(source)(**inputs)[0]
    assert 0 < error.abs().max() < 0.1


def test_a_sharded_source(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    report = compress.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=32)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert len(report.layers) == 14


@pytest.mark.parametrize(("bits", "dtype", "narrow"), [(4, None, True), (4, "float32", False), (8, None, False)])
def test_products_are_in_bfloat16_only_if_no_dtype_is_asked_for(llama, tmp_path, monkeypatch, bits, dtype, narrow):
    blocks = []
    monkeypatch.setattr(sequential, "narrow_", blocks.append)
    quantize(llama, tmp_path / "out", bits=bits, dtype=dtype)
    assert len(blocks) == (2 if narrow else 0)


def test_effort_default_is_more_than_fast_and_the_report_has_it(llama, tmp_path):
    fast, default = (quantize(llama, tmp_path / effort, effort=effort, bits=3) for effort in ("fast", "default"))
    assert (fast.arguments["effort"], default.arguments["effort"]) == ("fast", "default")
    assert quantize(llama, tmp_path / "unsaid", bits=3).arguments["effort"] == "default"
    codes = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fast", "default", "unsaid")]
    assert codes[0] != codes[1] == codes[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rtn", "effort": "best"}, "Method rtn rounds every weight by itself; leave out --effort best."),
        ({"method": "rtn", "effort": "fast", "damping": 0.1}, "leave out --effort fast, --damping."),
        ({"method": "rtn", "order": "natural"}, "leave out --no-act-order."),
        ({"method": "rtn", "order": "act"}, "leave out --static-groups."),
        ({"method": "rtn", "rotate": True, "effort": "best"}, "leave out --effort best."),
        ({"method": "rtn", "calib": "nowhere.txt"}, "looks at calibration data; leave out --calib."),
        ({"method": "rtn", "samples": 16, "seq_len": 24}, "leave out --samples, --seq-len."),
        ({"plan": "nowhere.json", "bits": 4, "symmetric": False}, "every layer becomes; leave out --bits, --asymmetric."),
        ({"plan": "nowhere.json", "group_size": 32}, "leave out --group-size."),
        ({"plan": "nowhere.json", "grid": "fp8"}, "leave out --grid fp8."),
        ({"plan": "nowhere.json", "avg_bits": 3.5}, "to search one for; give one of them."),
    ],
)
def test_what_would_change_nothing_is_refused_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(CompressError) as raised:
        compress.quantize(None, out=tmp_path / "out", **arguments)
    assert str(raised.value).endswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_a_method_without_calibration_does_read_is_taken(llama, tmp_path):
    given = dict(method="rtn", bits=3, group_size=32, device="cpu")
    report = compress.quantize(llama[0], out=tmp_path / "out", eval=True, seq_len=24, **given)
    assert report.perplexity_after is not None
    assert report.calibration is None
    report = quantize(llama, tmp_path / "rotated", method="rtn", rotate=True, effort="fast")
    assert report.calibration is not None
