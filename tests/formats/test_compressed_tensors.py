import copy
import re

import pytest

from compress.errors import CompressError
from compress.formats import compressed_tensors, names
from compress.models import Layer
from compress.spec import LayerSpec, Plan, Scheme

G32, G128, EIGHT = Scheme(4, 32), Scheme(4, 128), Scheme(8, -1)


def linears(*names: str) -> list[Layer]:
    return [Layer(name, "linear", 64, 128) for name in names]


def blocks(count: int, *leaves: str, prefix: str = "model.layers") -> list[Layer]:
    return linears(*(f"{prefix}.{i}.{leaf}" for i in range(count) for leaf in leaves))


def plan_of(layers: list[Layer], *schemes: Scheme | None) -> Plan:
    """Schemes in turn."""
    return Plan({layer.name: LayerSpec(schemes[i % len(schemes)]) for i, layer in enumerate(layers)})


def test_uniform_plan_targets_linears_and_ignores_the_dense_ones() -> None:
    layers = blocks(2, "a", "b")
    config = compressed_tensors.config(plan_of(layers, G32), layers, ["lm_head", "model.extra.proj"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", r"re:(.*\.)?extra\.proj$"]
    assert config["sparsity_config"] == {}
    assert tuple(map(int, config["version"].split("."))) >= (0, 18, 0)


def test_per_row_is_the_channel_strategy() -> None:
    layers = blocks(1, "a")
    weights = compressed_tensors.config(plan_of(layers, EIGHT), layers, [])["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["num_bits"]) == ("channel", None, 8)


@pytest.mark.parametrize("prefix", ["model.layers", "encoder.layer", "layers"])
def test_every_layer_of_a_mixed_plan_is_in_one_group_alone(prefix: str) -> None:
    layers = blocks(12, "attn.q", "attn.o", "up", prefix=prefix)
    plan = plan_of(layers, G32, EIGHT, G128, G32, None)
    config = compressed_tensors.config(plan, layers, ["lm_head"])
    groups = [group["targets"] for group in config["config_groups"].values()]
    assert len(groups) == 3
    assert all(target.startswith("re:(.*") for targets in groups for target in targets)
    for layer in layers:
        for prefixed in (layer.name, "language_model." + layer.name):
            matching = [g for g, targets in enumerate(groups) for t in targets if re.match(t[3:], prefixed)]
            ignored = any(re.match(target[3:], prefixed) for target in config["ignore"] if target.startswith("re:"))
            assert (len(matching), ignored) == ((0, True) if plan.layers[layer.name].scheme is None else (1, False))
        assert compressed_tensors.scheme_of(config, layer.name, "Linear") == plan.layers[layer.name].scheme
    assert compressed_tensors.scheme_of(config, "lm_head", "Linear") is None


def test_patterns_hold_without_the_base_models_prefix() -> None:
    layers = blocks(2, "up", "down", prefix="bert.encoder.layer")
    config = compressed_tensors.config(plan_of(layers, G32, EIGHT), layers, ["classifier", "bert.pooler.dense"])
    assert compressed_tensors.scheme_of(config, "encoder.layer.1.up", "Linear") == G32
    assert compressed_tensors.scheme_of(config, "pooler.dense", "Linear") is None
    assert compressed_tensors.scheme_of(config, "classifier", "Linear") is None


def test_patterns_take_names_literally() -> None:
    (pattern,) = names.patterns(["model.layers.1.a+b"])
    assert re.match(pattern, "model.layers.1.a+b")
    for other in (
        "model.layers.11.a+b",
        "model.layers.1.aab",
        "model.layers.1.a+b.c",
        "modelxlayers.1.a+b",
        "xmodel.layers.1.a+b",
    ):
        assert not re.match(pattern, other)


def test_other_modules_have_groups_of_their_own_that_name_them() -> None:
    layers = [*blocks(2, "proj"), Layer("h.0.c_attn", "conv1d", 64, 128), Layer("stem.conv", "conv2d", 8, 128)]
    config = compressed_tensors.config(plan_of(layers, G32), layers, [])
    by_type = {group.get("module_type"): group["targets"] for group in config["config_groups"].values()}
    assert by_type[None] == ["Linear"]
    assert set(by_type) == {None, "Conv1D", "Conv2d"}
    assert compressed_tensors.scheme_of(config, "h.0.c_attn", "Conv1D") == G32
    assert compressed_tensors.scheme_of(config, "stem.conv", "Conv2d") == G32
    assert compressed_tensors.scheme_of(config, "stem.other", "Conv2d") is None


def test_dense_convolutions_need_no_mention() -> None:
    layers = [*blocks(1, "proj"), Layer("stem.conv", "conv2d", 8, 128)]
    plan = Plan({"model.layers.0.proj": LayerSpec(G32), "stem.conv": LayerSpec(None)})
    assert compressed_tensors.config(plan, layers, [])["ignore"] == []


def test_a_plan_without_schemes_is_refused() -> None:
    layers = blocks(1, "a")
    with pytest.raises(CompressError, match="dense"):
        compressed_tensors.config(plan_of(layers, None), layers, [])


FOREIGN = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, "actorder": "static"}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}},
        "group_2": {"targets": ["model.layers.0.down_proj"], "weights": {"num_bits": 2, "group_size": -1}},
    },
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.up_proj", G128),
        ("model.layers.3.down_proj", Scheme(8, -1, symmetric=False)),
        ("model.layers.0.down_proj", Scheme(2, -1)),
        ("model.layers.0.gate", None),
        ("lm_head", None),
    ],
)
def test_foreign_configs_resolve_names_before_expressions_before_classes(name: str, expected: Scheme | None) -> None:
    assert compressed_tensors.scheme_of(FOREIGN, name, "Linear") == expected


def test_only_targeted_classes_are_quantized() -> None:
    assert compressed_tensors.scheme_of(FOREIGN, "model.embed_tokens", "Embedding") is None


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"format": "mxfp8-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "group"}}, "mxfp8-quantized"),
        ({"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, "scales per tensor"),
        ({"format": "float-quantized", "weights": {"num_bits": 8, "strategy": "channel"}}, "8-bit int"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"weights": {"num_bits": 8, "type": "float", "group_size": 128}}, "8-bit float"),
        ({"weights": {"num_bits": 6, "group_size": 128}}, "6-bit int"),
        ({"weights": {"num_bits": 4, "group_size": 128, "actorder": "group"}}, "actorder group"),
        ({"weights": {"num_bits": 4, "strategy": "block", "block_structure": [64, 64]}}, "scales per block"),
        ({"weights": {"num_bits": 4}}, "scales per"),
        ({"input_activations": {"num_bits": 8}}, "quantized activations"),
        ({"weights": {"num_bits": 4, "group_size": 128, "dynamic": True}}, "dynamic"),
    ],
)
def test_what_cannot_be_read_is_named(group: dict, said: str) -> None:
    config = copy.deepcopy(FOREIGN)
    config["config_groups"]["group_0"].update(group)
    with pytest.raises(CompressError, match=said):
        compressed_tensors.scheme_of(config, "model.layers.3.up_proj", "Linear")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_status": "frozen"}, "frozen"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "dense", "targets": ["Linear"]}}, "sparsity_config"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset W4A16"),
    ],
)
def test_what_concerns_the_whole_checkpoint_is_named(change: dict, said: str) -> None:
    with pytest.raises(CompressError, match=said):
        compressed_tensors.scheme_of({**FOREIGN, **change}, "model.layers.3.up_proj", "Linear")


def test_reordered_groups_cannot_be_written() -> None:
    import torch

    from compress.qtensor import QTensor

    codes, ones = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2)
    q = QTensor(codes, ones, ones.to(torch.uint8) * 8, G32, g_idx=torch.arange(64) % 2)
    with pytest.raises(CompressError, match="g_idx"):
        compressed_tensors.encode(q)


@pytest.mark.parametrize(
    ("found", "root"), [(["model.layers.0.a", "model.b", "head"], "model."), (["h.0.a", "h.1.b"], ""), (["enc.a", "dec.a"], "")]
)
def test_the_shared_root_is_a_base_models_prefix(found: list[str], root: str) -> None:
    assert names.shared_root(found) == root


def test_fused_sets_are_found_whole() -> None:
    found = names.fused_sets(["a.0.q_proj", "a.0.k_proj", "a.0.v_proj", "a.0.o_proj", "a.1.q_proj", "m.up_proj", "m.gate_proj"])
    assert found == {"a.0.qkv_proj": ("a.0.q_proj", "a.0.k_proj", "a.0.v_proj"), "m.gate_up_proj": ("m.gate_proj", "m.up_proj")}


def test_experts_of_one_scheme_share_a_pattern_whatever_they_lie_in():
    experts = [f"m.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1)]
    others = ["m.layers.0.mlp.gate", "m.layers.1.attention"]
    found = names.with_whole_experts(experts[:3], [*experts, *others])
    assert found == ["m.layers.0.mlp.experts.*", "m.layers.1.mlp.experts.0.up_proj"]
    whole, single = names.patterns(found, "m.")
    for name in ("m.layers.0.mlp.experts.1.up_proj", "layers.0.block_sparse_moe.experts.7.w1"):
        assert re.match(whole, name)
        assert not re.match(single, name)
    for name in (*experts[2:], *others, "m.layers.0.mlp.experts_bias", "m.layers.0.a.b.experts.0.w1"):
        assert not re.match(whole, name)
    assert [name for name in experts if re.match(single, name)] == [experts[2]]
    plan = Plan({name: LayerSpec(Scheme(8, 32) if name in others else Scheme(4, 32)) for name in [*experts, *others]})
    config = compressed_tensors.config(plan, linears(*experts, *others), [])
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [1, 2]
    for name in [*experts, *others]:
        assert compressed_tensors.scheme_of(config, name, "Linear") == plan.layers[name].scheme
