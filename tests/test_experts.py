"""Experts that transformers keeps in 3-D parameters, from a saved folder to packed layers and back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as T  # noqa: N812
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import compress
from compress import checkpoint, experts, hf, models, sequential
from compress.cli import folder
from compress.experts import PARTS, SplitExperts
from compress.formats import compatibility
from compress.kernels import dispatch, planar
from compress.nn import QuantLinear, StackedExperts, stack
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

ROUNDING = 1e-6  # of logits below 1: threads may add up in another order
FAMILIES = ["mixtral", "qwen3_moe"]
QWEN2 = T.Qwen2MoeConfig(
    **tiny.LLAMA, **tiny.GQA, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=2
)
OSS = T.GptOssConfig(**tiny.LLAMA, **tiny.GQA, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
CALIB = dict(samples=16, seq_len=24)
FOUR, EIGHT = Scheme(4, 32), Scheme(8, 32)


def logits(model, family="mixtral"):
    with torch.no_grad():
        return model(**tiny.inputs(family, samples=2))[0]


def saved(family, path):
    return tiny.save(family, path / "model"), tiny.calibration(family, path / "calib")


def moe_blocks(model):
    return [module for module in model.modules() if isinstance(module, SplitExperts)]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_split_experts_compute_the_same(family, every):
    torch.manual_seed(0)
    model = T.Qwen2MoeForCausalLM(QWEN2).eval() if family == "qwen2_moe" else tiny.build(family)
    expected = logits(model)
    stacked = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim == 3}
    experts.split(model, every)
    assert experts.is_split(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)
    assert not list(experts.unsplit(model))
    for name, parameter in stacked.items():
        where, _, leaf = name.rpartition(".")
        for e, one in enumerate(model.get_submodule(where)):
            parts = [one.get_parameter(f"{part}.weight") for part in PARTS[leaf]]
            assert torch.equal(torch.cat(parts), parameter[e])
            assert parts[0].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()  # no copy


def test_what_chooses_experts_stays_dense():
    torch.manual_seed(0)
    model = T.Qwen2MoeForCausalLM(QWEN2).eval()
    experts.split(model, every=True)
    anatomy = models.anatomy(model)
    chooses = {name for name, why in anatomy.dense.items() if why == "chooses experts"}
    assert chooses == {f"model.layers.{i}.mlp.{leaf}" for i in (0, 1) for leaf in ("gate", "shared_expert_gate")}
    assert {layer.name for layer in anatomy.layers if "shared_expert" in layer.name} == {
        f"model.layers.{i}.mlp.shared_expert.{part}" for i in (0, 1) for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert not chooses & anatomy.shapes.keys()


def test_experts_of_another_kind_are_named_as_left_dense():
    model = T.GptOssForCausalLM(OSS).eval()  # transposed, interleaved, with biases
    experts.split(model, every=True)
    assert not experts.is_split(model)
    dense = models.anatomy(model).dense
    assert {name for name, why in dense.items() if "not known" in why} == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}


@pytest.mark.parametrize("model", [torch.nn.Conv1d(4, 4, 3, groups=4), tiny.build("vit")], ids=["depthwise", "positions"])
def test_other_parameters_of_three_dimensions_are_no_experts(model):
    assert any(parameter.ndim == 3 for parameter in model.parameters())
    assert list(experts.unsplit(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_under_the_names_that_are_stored(family, tmp_path):
    source, _ = saved(family, tmp_path)
    model, stored = models.load(source), load_file(source / "model.safetensors")
    anatomy = models.anatomy(model)
    names = models.weight_names(model, anatomy.in_features, checkpoint.index(source))
    assert set(names.values()) | {"lm_head.weight"} == {key for key, t in stored.items() if t.ndim == 2} - {
        key for key in stored if key.endswith(("embed_tokens.weight", ".gate.weight"))
    }
    for layer, key in names.items():
        assert torch.equal(model.get_parameter(f"{layer}.weight"), stored[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_computes_the_same_and_saving_gives_the_same_file(family, tmp_path):
    source, calib = saved(family, tmp_path)
    anatomy = models.anatomy(models.load(source))
    plan = Plan({name: LayerSpec(FOUR if ".experts." in name else EIGHT) for name in anatomy.in_features})
    compress.quantize(source, out=tmp_path / "out", plan=plan, calib=calib, **CALIB)
    ours = compress.load(tmp_path / "out", device="cpu")
    packed = [module for block in moe_blocks(ours) for module in block.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == sum(".experts." in name for name in anatomy.in_features)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=ROUNDING)
    verdicts = {verdict.reader: verdict.loads for verdict in compatibility.readers(folder.read(str(tmp_path / "out"))[0])}
    assert verdicts[compatibility.TRANSFORMERS]
    assert verdicts[compatibility.OURS]

    ours.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
        == json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )


def test_a_base_model_and_experts_that_stay_dense(tmp_path):
    source, calib = saved("mixtral", tmp_path)
    arguments = dict(calib=calib, group_size=32, skip=[r"layers\.0\..*experts", r"experts\.2\."], **CALIB)
    packed = compress.quantize(source, out=tmp_path / "packed", **arguments)
    compress.quantize(source, out=tmp_path / "dense", format="dense", **arguments)
    assert sum("stored dense" in warning and "transformers" in warning for warning in packed.warnings) == 1
    served = compress.load(tmp_path / "packed", device="cpu")
    kinds = [[type(expert.up_proj).__name__ for expert in block] for block in moe_blocks(served)]
    assert kinds == [["Linear"] * 4, ["QuantLinear", "QuantLinear", "Linear", "QuantLinear"]]
    torch.testing.assert_close(logits(served), logits(compress.load(tmp_path / "dense", device="cpu")), rtol=1e-4, atol=1e-4)
    with hf.enable_transformers():
        base = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        hidden, expected = (m(**tiny.inputs("mixtral", samples=2))[0] for m in (base, served.model))
    assert torch.equal(hidden, expected)


def test_experts_without_tokens_are_no_obstacle_and_are_said(tmp_path):
    model, calib = tiny.build("qwen3_moe"), tiny.calibration("qwen3_moe", tmp_path / "calib")
    direction, generator = torch.tensor([1, 0.9, 0.1, -0.1, -0.9, -1]), torch.Generator().manual_seed(0)
    for i in (0, 1):  # whatever the input, two others come before the third and the fourth
        row = torch.randn(64, generator=generator)
        model.get_parameter(f"model.layers.{i}.mlp.gate.weight").data = direction[:, None] * row
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = compress.quantize(tmp_path / "model", out=tmp_path / "out", calib=calib, group_size=32, **CALIB)
    without = {layer.name for layer in report.layers if any("no calibration token" in note for note in layer.notes)}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert without == {f"model.layers.{i}.mlp.experts.{e}.{part}" for i in (0, 1) for e in (2, 3) for part in parts}
    assert {layer.name for layer in report.layers if layer.output_error is None} == without
    assert logits(compress.load(tmp_path / "out")).isfinite().all()


def test_statistics_of_an_expert():
    """None without tokens, shrunk with few, as they are with many and for what is no expert."""
    model = tiny.build("mixtral")
    experts.split(model, every=True)
    block, expert = model.get_submodule("model.layers.0"), "mlp.experts.1.up_proj"
    H = torch.ones(64, 64)
    for name, tokens, kept, said in (
        (expert, 0, None, "no calibration token"),
        (expert, 127, 127 / (127 + 32), "127 calibration tokens"),
        (expert, 128, 1.0, ""),
        ("self_attn.q_proj", 1, 1.0, ""),
    ):
        stats, notes = sequential.usable(sequential.LayerStats(H, tokens), block, name)
        assert said in " ".join(notes)
        assert bool(said) == bool(notes)
        assert (stats is None) == (kept is None)
        if stats is not None:
            assert stats.H[0, 1] == pytest.approx(kept)


def test_padding_reaches_no_expert():
    model = tiny.build("mixtral")
    model.config.use_cache = False
    experts.split(model, every=True)
    anatomy, ids = models.anatomy(model), tiny.inputs("mixtral")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 7))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 7))
    options = (Options(), torch.device("cpu"), torch.float32, torch.float32)
    settings = sequential.Settings("gptq", "alps", *options)
    plain = sequential.dense_stats(model, anatomy, {"input_ids": ids}, settings)
    masked = sequential.dense_stats(model, anatomy, {"input_ids": padded, "attention_mask": mask}, settings)
    for (layer, _, one), (_, _, other) in zip(plain, masked, strict=True):
        assert one.tokens == other.tokens, layer.name
        torch.testing.assert_close(one.H, other.H, rtol=1e-4, atol=1e-5)


def planar_linear(layer: torch.nn.Linear, bits: int, symmetric: bool) -> QuantLinear:
    """A layer as a GPU would hold it, with random codes."""
    N, K = layer.weight.shape
    generator = torch.Generator().manual_seed(N * K + bits)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    scales = torch.rand(N, K // 32, generator=generator) * 0.02
    zeros = None if symmetric else torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, generator=generator)
    tensors = planar.to_planar(codes, scales, zeros, bits)
    return QuantLinear(dispatch.Packed("planar", bits, (N, K), K // 32, tensors), Scheme(bits, 32, symmetric))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_the_grouped_kernel_serves_all_experts_of_a_block(monkeypatch, bits, symmetric):
    monkeypatch.setattr(dispatch, "layout_for", lambda *_: "planar")
    model = tiny.build("mixtral")
    experts.split(model, every=False)
    split = moe_blocks(model)[0]
    for expert in split:
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(expert, part, planar_linear(expert.get_submodule(part), bits, symmetric))
    dense = copy.deepcopy(split)
    for expert in dense:
        for part in ("gate_proj", "up_proj", "down_proj"):
            packed = expert.get_submodule(part).packed
            layer = torch.nn.Linear(packed.shape[1], packed.shape[0], bias=False)
            layer.weight.data = dispatch.dequantize(packed)
            setattr(expert, part, layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, generator=generator)
    index = torch.tensor([[0, 2], [2, 0], [1, 2], [2, 1], [0, 1]])  # nobody goes to the last
    weights = torch.rand(5, 2, generator=generator)
    with torch.no_grad():
        expected = dense(x, index, weights)

    before = {f"{e}.{part}": expert.get_submodule(part).restore() for e, expert in enumerate(split) for part in
              ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    stack(model)
    stacked = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(stacked, StackedExperts)
    assert type(model.get_submodule("model.layers.1.mlp.experts")) is SplitExperts  # not packed
    with torch.no_grad():
        torch.testing.assert_close(stacked(x, index, weights), expected, rtol=1e-4, atol=1e-5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for block, given in zip((dense, stacked), inputs, strict=True):
        (block(given, index, weights) ** 2).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    parts = {name: (scheme, restored) for name, scheme, restored in stacked.parts()}
    assert parts.keys() == before.keys()
    for name, (scheme, restored) in parts.items():
        assert scheme == Scheme(bits, 32, symmetric)
        assert all(torch.equal(a, b) for a, b in zip(restored[:3], before[name][:3], strict=True))

    scales = stacked.get_buffer("down_proj_scales").clone()
    assert torch.equal(stacked.half().get_buffer("down_proj_scales"), scales)  # no cast reaches the scales
    on_meta = stacked.to("meta")
    assert all(tensor.is_meta for packed in on_meta.packed.values() for tensor in packed.tensors.values())


def test_unlike_experts_are_not_stacked(monkeypatch):
    monkeypatch.setattr(dispatch, "layout_for", lambda *_: "planar")
    model = tiny.build("mixtral")
    experts.split(model, every=False)
    for e, expert in enumerate(moe_blocks(model)[0]):
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(expert, part, planar_linear(expert.get_submodule(part), 8 if e == 1 else 4, True))
    stack(model)
    assert not [module for module in model.modules() if isinstance(module, StackedExperts)]
