import pytest
import torch

from compress.errors import CompressError
from compress.formats import gptq
from compress.models import Layer
from compress.qtensor import QTensor, dequantize
from compress.spec import LayerSpec, Plan, Scheme

G32, EIGHT = Scheme(4, 32), Scheme(8, 32)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = [Layer(f"model.layers.{i}.{leaf}", "linear", 64, 128) for i in range(12) for leaf in ATTENTION]


def plan_with(**special: Scheme | None) -> Plan:
    return Plan(
        {
            layer.name: LayerSpec(next((scheme for leaf, scheme in special.items() if layer.name.endswith(leaf)), G32))
            for layer in LAYERS
        }
    )


def test_uniform_plan_has_every_key_and_no_rules() -> None:
    config = gptq.config(plan_with(), LAYERS, ["lm_head"])
    expected = {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "block_name_to_quantize": "model.layers",
    }
    assert expected.items() <= config.items()
    assert 0 < config["damp_percent"] < 1
    assert "dynamic" not in config
    assert config["meta"]["quantizer"][0].startswith("compress-toolkit:")
    assert gptq.scheme_of(config, "lm_head", "Linear") is None
    assert gptq.scheme_of(config, "score", "Linear") is None
    assert gptq.scheme_of(config, LAYERS[0].name, "LayerNorm") is None


def test_asymmetric_plans_are_written_as_v2() -> None:
    config = gptq.config(plan_with(proj=Scheme(4, 32, symmetric=False)), LAYERS, [])
    assert (config["format"], config["checkpoint_format"], config["sym"]) == ("gptq_v2", "gptq_v2", False)


def test_rules_give_every_layer_its_scheme_and_cover_fused_names() -> None:
    plan = plan_with(q_proj=EIGHT, k_proj=EIGHT, v_proj=EIGHT, o_proj=None)
    plan = Plan({**plan.layers, LAYERS[3].name: LayerSpec(G32)})
    config = gptq.config(plan, LAYERS, ["lm_head", "model.layers.3.extra"])
    for layer in LAYERS:
        assert gptq.scheme_of(config, layer.name, "Linear") == plan.layers[layer.name].scheme
    assert gptq.scheme_of(config, "model.layers.3.extra", "Linear") is None
    assert gptq.rule_of(config, "model.layers.5.self_attn.qkv_proj") == gptq.rule_of(config, LAYERS[0].name)


def test_a_layer_outside_numbered_blocks_gets_a_rule() -> None:
    layer = Layer("proj", "linear", 64, 128)
    config = gptq.config(Plan({"proj": LayerSpec(G32)}), [layer], ["head"])
    assert gptq.scheme_of(config, "proj", "Linear") == G32
    assert gptq.scheme_of(config, "head", "Linear") is None


@pytest.mark.parametrize(
    ("plan", "layers", "said"),
    [
        (plan_with(q_proj=Scheme(4, 32, symmetric=False)), LAYERS, "symmetric and asymmetric"),
        (plan_with(proj=None), LAYERS, "dense"),
        (Plan({"conv": LayerSpec(G32)}), [Layer("conv", "conv2d", 8, 64)], "convolution"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(plan: Plan, layers: list[Layer], said: str) -> None:
    with pytest.raises(CompressError, match=said):
        gptq.config(plan, layers, [])


def asymmetric() -> QTensor:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (8, 2), generator=draw, dtype=torch.uint8)
    zeros[0, 0] = 0  # the value that v1 stores as 15
    return QTensor(codes, torch.randn(8, 2, generator=draw).half(), zeros, Scheme(4, 32, symmetric=False))


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_both_zero_point_conventions_are_read_and_written_back(version: str, key: str) -> None:
    q, config = asymmetric(), {key: version}
    tensors = gptq.encode(q, config)
    assert torch.equal(gptq.decode(tensors, q.scheme, q.shape, config).zeros, q.zeros)
    other = gptq.decode(tensors, q.scheme, q.shape, {key: "gptq" if version == "gptq_v2" else "gptq_v2"})
    assert not torch.equal(other.zeros, q.zeros)


def test_a_config_without_convention_is_v1() -> None:
    symmetric = QTensor(asymmetric().codes, asymmetric().scales, torch.full((8, 2), 8, dtype=torch.uint8), G32)
    assert torch.equal(gptq.encode(symmetric, {})["qzeros"], torch.full((2, 1), 0x77777777, dtype=torch.int32))
    v2 = gptq.encode(symmetric, {"checkpoint_format": "gptq_v2"})["qzeros"]
    assert torch.equal(v2, torch.full((2, 1), 0x88888888 - 2**32, dtype=torch.int32))


def test_reordered_groups_of_other_tools_survive() -> None:
    q, draw = asymmetric(), torch.Generator().manual_seed(1)
    shuffled = gptq.encode(q) | {"g_idx": (torch.randperm(64, generator=draw) % 2).int()}
    again = gptq.decode(shuffled, q.scheme, q.shape)
    assert again.g_idx is not None
    picked = again.g_idx.long()
    expected = (q.codes.float() - q.zeros[:, picked].float()) * q.scales[:, picked].float()
    assert torch.equal(dequantize(again), expected)
    assert torch.equal(gptq.encode(again)["g_idx"], shuffled["g_idx"])


def test_a_last_group_that_is_short_is_read() -> None:
    scheme, shape = Scheme(4, 64), (8, 96)
    layout = gptq.layout(scheme, shape, torch.float16)
    tensors = {key: torch.ones(size).to(dtype) for key, (dtype, size) in layout.items()}
    tensors["g_idx"] = (torch.arange(96) // 64).int()
    q = gptq.decode(tensors, scheme, shape)
    assert q.scales.shape == (8, 2)
    assert dequantize(q).shape == shape


def test_other_scales_than_float16_are_a_mistake_of_the_caller() -> None:
    q = asymmetric()
    with pytest.raises(ValueError, match="float16"):
        gptq.encode(QTensor(q.codes, q.scales.float(), q.zeros, q.scheme))
    assert gptq.scale_dtype(torch.bfloat16) == torch.float16


FOREIGN = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": True}


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        ({}, "model.layers.0.up", Scheme(4, 128, symmetric=False)),
        ({"lm_head": True}, "lm_head", Scheme(4, 128, symmetric=False)),
        ({"lm_head": True}, "model.norm", None),
        ({"dynamic": {".*up": {"bits": 8}}}, "model.layers.0.up", Scheme(8, 128, symmetric=False)),
        ({"dynamic": {"-:.*up": {}, "+:.*up": {"bits": 8}}}, "model.layers.0.up", None),
        ({"dynamic": {"up": {"bits": 8}}}, "model.layers.0.up", Scheme(4, 128, symmetric=False)),
        (
            {"modules_in_block_to_quantize": [["mlp.up"], ["mlp.down"]]},
            "model.layers.0.mlp.down",
            Scheme(4, 128, symmetric=False),
        ),
        ({"modules_in_block_to_quantize": [["mlp.up"]]}, "model.layers.0.mlp.down", None),
    ],
)
def test_foreign_configs(change: dict, name: str, expected: Scheme | None) -> None:
    assert gptq.scheme_of({**FOREIGN, **change}, name, "Linear") == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [({"bits": 5}, "5 bits"), ({"checkpoint_format": "gptq_p"}, "gptq_p"), ({"checkpoint_format": "marlin"}, "marlin")],
)
def test_what_cannot_be_read_is_named(change: dict, said: str) -> None:
    with pytest.raises(CompressError, match=said):
        gptq.scheme_of({**FOREIGN, **change}, "model.layers.0.up", "Linear")


def test_a_config_without_bits_is_refused() -> None:
    with pytest.raises(CompressError, match="bits and group_size"):
        gptq.scheme_of({"quant_method": "gptq"}, "model.layers.0.up", "Linear")
