"""What stays dense unasked is said, group sizes are such as runtimes serve, and fallbacks are told by kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress import left_dense, models
from compress.cli.outcome import kinds
from compress.errors import CompressError
from compress.formats.names import fused_sets
from compress.report import LayerReport
from compress.spec import Plan, Scheme
from tests import tiny


@pytest.mark.parametrize("size", [7777, 100, 48])
def test_a_group_size_that_no_layer_can_take_is_refused_before_work(size, tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    monkeypatch.setattr("compress.pipeline.layer_wise", lambda *_: pytest.fail("work has started"))
    given = {"skip": ["down_proj"]} if size == 48 else {}  # which has 96 inputs
    with pytest.raises(CompressError, match=rf"group size is {size}, which divides the inputs of no layer \(64.*Use 64, 32, 16"):
        compress.quantize(source, out=tmp_path / "out", bits=4, group_size=size, method="rtn", **given)
    assert not (tmp_path / "out").exists()


def test_an_unusual_group_size_that_some_layer_can_take_is_taken():
    plan = Plan.uniform({"a": 96, "b": 64, "c": 40}, Scheme(4, 48))
    assert [plan.layers[name].scheme.group_size for name in "abc"] == [48, 32, -1]


def test_hidden_576_is_served_in_groups_of_64():
    """As of SmolLM2: 96 would divide it, too, and vLLM's kernels refuse that."""
    plan = Plan.uniform({"q_proj": 576, "down_proj": 1536}, Scheme())
    assert [spec.scheme.group_size for spec in plan.layers.values()] == [64, 128]


def layer(name: str, *notes: str) -> LayerReport:
    return LayerReport(name, (4, 4), "int4", None, None, None, 0.0, notes)


def test_fallbacks_are_told_by_kind():
    reports = [layer(f"model.layers.{i}.q", f"group size 128 does not divide {64 + i} inputs: 32") for i in range(210)]
    reports += [layer("a", "rounded to nearest", "12 tokens were routed"), layer("b", "3.5 tokens were routed")]
    assert list(kinds(reports)) == [
        (210, "model.layers.0.q", "group size 128 does not divide 64 inputs: 32"),
        (1, "a", "rounded to nearest"),
        (2, "a", "12 tokens were routed"),
    ]


def test_what_stays_dense_unasked_is_said_above_a_twentieth():
    model = nn.ModuleDict({"head": nn.Linear(10, 10, bias=False), "experts": nn.Linear(10, 10, bias=False)})
    dense = {"head": "output layer", "experts": "experts in one tensor, of a kind that is not known"}
    (said,) = left_dense.warnings(model, dense)
    assert said.startswith("50% of the parameters stay dense")
    assert "experts in one tensor" in said
    assert list(left_dense.warnings(model, {"head": "output layer", "experts": "skipped by request"})) == []
    model["body"] = nn.Linear(10, 400, bias=False)
    assert list(left_dense.warnings(model, dense)) == []


def test_experts_of_an_unknown_kind_are_said(tmp_path):
    import transformers as T  # noqa: N812

    torch.manual_seed(0)
    config = T.GraniteMoeConfig(**tiny.LLAMA, **tiny.GQA, num_local_experts=4, num_experts_per_tok=2)
    T.GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "source")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    report = compress.quantize(tmp_path / "source", out=tmp_path / "out", bits=4, group_size=32, method="rtn")
    (said,) = [warning for warning in report.warnings if "stay dense" in warning]
    model = models.load(tmp_path / "source")
    experts = [model.get_submodule(name) for name, why in report.dense.items() if "experts in one tensor" in why]
    dense, whole = (sum(p.numel() for one in some for p in one.parameters()) for some in (experts, [model]))
    assert said.startswith(f"{dense / whole:.0%} of the parameters stay dense")
    assert dense > whole / 2
    quiet = compress.quantize(tiny.save("llama", tmp_path / "llama"), out=tmp_path / "other", bits=4, method="rtn")
    assert not any("stay dense" in warning for warning in quiet.warnings)


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        ("fused_qkv_a_proj", ["q_a_proj", "kv_a_proj_with_mqa"]),
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"]),
        ("in_proj_ba", ["in_proj_b", "in_proj_a"]),
        ("in_proj_qkvgfab", ["q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"]),
    ],
)
def test_sets_that_vllm_fuses(fused, parts):
    names = [f"model.layers.0.attn.{part}" for part in parts]
    assert fused_sets(names)[f"model.layers.0.attn.{fused}"] == tuple(names)
    assert f"model.layers.0.attn.{fused}" not in fused_sets(names[1:])


def test_tensors_that_transformers_does_not_load_are_in_the_config(tmp_path, monkeypatch, capsys):
    """Heads for further tokens, and layers beyond the last: stored, not loaded, and so never quantized."""
    import json

    from safetensors.torch import load_file, save_file

    from compress.cli import main

    source = tiny.save("llama", tmp_path / "source")
    extra = {"mtp.layers.0.self_attn.q_proj.weight": torch.ones(64, 64), "model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", metadata={"format": "pt"})
    report = compress.quantize(source, out=tmp_path / "out", bits=4, group_size=32, method="rtn")
    assert {"vLLM", "compress", "transformers + compressed-tensors"} <= set(report.readers)
    assert report.warnings == ()
    monkeypatch.setattr("sys.argv", ["compress", "check", str(tmp_path / "out")])
    assert main.run() == 0
    assert capsys.readouterr().out
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    config = QuantizationConfig.model_validate(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    linear = nn.Linear(2, 2)
    names = ["mtp.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "lm_head", "model.layers.1.mlp.up_proj"]
    assert [is_match(name, linear, ["Linear"], config.ignore) for name in names] == [False, False, False, True]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in extra.items())
