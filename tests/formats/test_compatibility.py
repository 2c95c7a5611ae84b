import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from compress.formats import facts, gptq_rules, rules
from compress.formats.compatibility import (
    DEQUANTIZE,
    GPTQMODEL,
    OPTIMUM,
    OURS,
    READERS,
    TRANSFORMERS,
    VLLM,
    Verdict,
    loads_somewhere,
    readers,
    warnings_for,
)
from compress.models import Layer
from compress.spec import LayerSpec, Plan, Scheme

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
LAYERS = [Layer(f"model.layers.{i}.{leaf}", "linear", 128, 256) for i in range(2) for leaf in LEAVES]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
G32, G128, EIGHT, THREE = Scheme(4, 32), Scheme(4, 128), Scheme(8, 32), Scheme(3, 32)
CT, GPTQ = "compressed-tensors", "gptq"
Tensors = dict[str, facts.Planned]


@dataclass(frozen=True)
class Draft:
    """config.json, the quantization_config in it, and tensor headers: to be changed."""

    config: dict[str, Any]
    q: dict[str, Any]
    tensors: Tensors


Change = Callable[[Draft], object]


def plan(otherwise: Scheme | None = G128, layers: list[Layer] = LAYERS, **special: Scheme | None) -> Plan:
    """`otherwise`, but a layer whose name ends with a key gets that key's scheme."""
    chosen = {layer.name: next((s for key, s in special.items() if layer.name.endswith(key)), otherwise) for layer in layers}
    return Plan({name: LayerSpec(scheme) for name, scheme in chosen.items()})


def checkpoint(plan: Plan, form: str, change: Change | None = None, layers: list[Layer] = LAYERS) -> facts.Facts:
    found = facts.planned(plan, layers, form, LLAMA, ["lm_head"])
    config, tensors = copy.deepcopy(dict(found.config)), dict(found.tensors)
    if change is not None:
        change(Draft(config, config["quantization_config"], tensors))
    return facts.gather(config, tensors)


def verdict(found: facts.Facts, reader: str) -> Verdict:
    return next(verdict for verdict in readers(found) if verdict.reader == reader)


def group(key: str, value: Any) -> Change:
    return lambda draft: draft.q["config_groups"]["group_0"].update({key: value})


def weights(key: str, value: Any) -> Change:
    return lambda draft: draft.q["config_groups"]["group_0"]["weights"].update({key: value})


def top(key: str, value: Any) -> Change:
    return lambda draft: draft.q.update({key: value})


def model(key: str, value: Any) -> Change:
    return lambda draft: draft.config.update({key: value})


def without(key: str) -> Change:
    return lambda draft: draft.q.pop(key)


def tensor(name: str, shape: tuple[int, ...], dtype: str = "I32") -> Change:
    return lambda draft: draft.tensors.update({name: facts.Planned(dtype, shape)})


def packed_module(name: str) -> Change:
    def change(draft: Draft) -> None:
        draft.tensors.pop(f"{name}.weight", None)
        draft.tensors[f"{name}.weight_packed"] = facts.Planned("I32", (128, 32))
        draft.tensors[f"{name}.weight_scale"] = facts.Planned("F16", (128, 2))

    return change


def dense_module(name: str) -> Change:
    def change(draft: Draft) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape", "qweight", "qzeros", "scales", "g_idx"):
            draft.tensors.pop(f"{name}.{suffix}", None)
        draft.tensors[f"{name}.weight"] = facts.Planned("F16", (128, 256))

    return change


def both(*changes: Change) -> Change:
    return lambda draft: [change(draft) for change in changes]


NARROW = [Layer("model.layers.0.up_proj", "linear", 48, 256)]
SHORT = [Layer("model.layers.0.up_proj", "linear", 64, 96)]
EXPERTS = [Layer(f"model.layers.{i}.mlp.experts.{e}.up_proj", "linear", 128, 256) for i in range(2) for e in range(2)]


def preset(draft: Draft) -> None:
    draft.q["config_groups"] = {"W4A16": ["Linear"]}


def old_words(draft: Draft) -> None:
    for name in [name for name in draft.tensors if name.endswith("weight_packed")]:
        draft.tensors[name] = facts.Planned("I32", (128, 26))  # ceil(256 / 10)


NAME = LAYERS[0].name
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
REFUSED = [  # (what the checkpoint is, reader, what the reason says, rule)
    (checkpoint(plan(Scheme(4, 128, symmetric=False)), CT), TRANSFORMERS, "weight_zero_point", rules.asymmetric),
    (
        checkpoint(plan(Scheme.of("mxfp4")), CT, model("dtype", "float16")),
        TRANSFORMERS,
        "expanded to bfloat16, and the first float16 input",
        rules.expanded_to_bfloat16,
    ),
    (checkpoint(plan(G128, o_proj=EIGHT), CT), DEQUANTIZE, "first group's scheme", rules.several_schemes),
    (checkpoint(plan(THREE), CT, old_words), TRANSFORMERS, "ten 3-bit codes", rules.old_words),
    (checkpoint(plan(THREE), CT, old_words), OURS, "ten 3-bit codes", rules.old_words),
    (checkpoint(plan(), CT, tensor(f"{NAME}.weight_packed", (128, 35))), TRANSFORMERS, "do not divide", rules.uneven_groups),
    (checkpoint(plan(), CT, tensor(f"{NAME}.weight_packed", (128, 35))), VLLM, "do not divide", rules.uneven_groups),
    (checkpoint(plan(G128, q_proj=EIGHT), CT), VLLM, "qkv_proj", rules.unlike_fused),
    (checkpoint(plan(G128, up_proj=None), CT), VLLM, "gate_up_proj", rules.unlike_fused),
    (
        checkpoint(plan(), CT, top("sparsity_config", {"format": "dense", "targets": ["Linear"]})),
        VLLM,
        "targets",
        rules.sparsity_targets,
    ),
    (
        checkpoint(plan(), CT, top("sparsity_config", {"format": "sparse-bitmask"})),
        TRANSFORMERS,
        "sparse-bitmask",
        rules.legacy_sparsity,
    ),
    (checkpoint(plan(), CT, top("sparsity_config", {"format": "sparse-bitmask"})), VLLM, "sparse-bitmask", rules.legacy_sparsity),
    (checkpoint(plan(), CT, group("format", "marlin-24")), VLLM, "marlin-24", rules.legacy_sparsity),
    (checkpoint(plan(), CT, weights("actorder", "group")), TRANSFORMERS, "actorder group", rules.unfollowed_order),
    (checkpoint(plan(), CT, weights("actorder", "dynamic")), VLLM, "actorder dynamic", rules.unfollowed_order),
    (checkpoint(plan(), CT, weights("actorder", True)), OURS, "actorder True", rules.beyond_us),
    (
        checkpoint(plan(), CT, both(group("format", None), top("format", "mixed-precision"))),
        VLLM,
        "no format",
        rules.no_group_format,
    ),
    (checkpoint(plan(), CT, group("format", "made-up")), TRANSFORMERS, "made-up", rules.unknown_format),
    (checkpoint(plan(), CT, group("format", "made-up")), VLLM, "made-up", rules.unknown_format),
    (checkpoint(plan(), CT, group("extra", 1)), TRANSFORMERS, "the key extra", rules.rejected_config),
    (checkpoint(plan(), CT, weights("extra", 1)), DEQUANTIZE, "the key extra", rules.rejected_config),
    (checkpoint(plan(), CT, group("module_type", "Conv1D")), TRANSFORMERS, "Conv1D", rules.rejected_config),
    (checkpoint(plan(), CT, group("module_type", "Conv2d")), VLLM, "Conv2d", rules.unread_layers),
    (checkpoint(plan(), CT, packed_module("model.embed_tokens")), TRANSFORMERS, "embeddings", rules.quantized_embedding),
    (checkpoint(plan(), CT, packed_module("model.embed_tokens")), OURS, "embeddings", rules.quantized_embedding),
    (
        checkpoint(plan(), CT, both(top("ignore", []), packed_module("lm_head"), model("tie_word_embeddings", True))),
        TRANSFORMERS,
        "tied",
        rules.tied_head,
    ),
    (checkpoint(plan(), CT, top("ignore", ["re:.*q_proj"])), TRANSFORMERS, "the config says dense", rules.uncovered),
    (checkpoint(plan(), CT, top("ignore", ["re:.*q_proj"])), OURS, "the config says dense", rules.uncovered),
    (checkpoint(plan(), CT, dense_module(NAME)), TRANSFORMERS, "the config says quantized", rules.missing_codes),
    (checkpoint(plan(), CT, top("ignore", [])), VLLM, "the config says quantized", rules.missing_codes),
    (
        checkpoint(plan(), CT, top("transform_config", {"config_groups": {"u": {}}})),
        TRANSFORMERS,
        "transform_config",
        rules.transforms,
    ),
    (checkpoint(plan(), CT, top("transform_config", {"config_groups": {"u": {}}})), OURS, "transform_config", rules.beyond_us),
    (checkpoint(plan(), CT, top("kv_cache_scheme", {**FP8, "strategy": "token"})), VLLM, "kv_cache_scheme", rules.kv_cache),
    (checkpoint(plan(), CT, preset), OURS, "preset W4A16", rules.beyond_us),
    (
        checkpoint(plan(G128, EXPERTS, **{"1.mlp.experts.0.up_proj": EIGHT}), CT, layers=EXPERTS),
        TRANSFORMERS,
        "Experts",
        rules.unlike_experts,
    ),
    (
        checkpoint(plan(G128, EXPERTS, **{"experts.0.up_proj": EIGHT}), CT, layers=EXPERTS),
        VLLM,
        "2 layers",
        rules.unlike_experts_of_a_layer,
    ),
    (
        checkpoint(plan(G128, EXPERTS, **{"1.mlp.experts.0.up_proj": None}), CT, layers=EXPERTS),
        VLLM,
        "model.layers.1.mlp differ",
        rules.unlike_experts_of_a_layer,
    ),
    (
        checkpoint(plan(G128, EXPERTS, **{"1.mlp.experts.0.up_proj": None, "1.mlp.experts.1.up_proj": None}), CT, layers=EXPERTS),
        TRANSFORMERS,
        "2 layers (first model.layers.1.mlp.experts.0.up_proj) are experts stored dense",
        rules.dense_experts,
    ),
    (
        checkpoint(plan(Scheme(4, 128, symmetric=False), EXPERTS), CT, layers=EXPERTS),
        DEQUANTIZE,
        "asymmetric experts",
        rules.asymmetric_experts,
    ),
    (checkpoint(plan(G128, EXPERTS), GPTQ, layers=EXPERTS), OURS, "experts", rules.separate_experts),
    (
        checkpoint(plan(), CT, lambda draft: draft.config.pop("quantization_config")),
        VLLM,
        "no quantization_config",
        rules.no_config,
    ),
    (checkpoint(plan(Scheme(3, 128)), GPTQ), VLLM, "symmetric 4 and 8 bits", gptq_rules.not_marlin),
    (checkpoint(plan(Scheme(4, 128, symmetric=False)), GPTQ), VLLM, "symmetric 4 and 8 bits", gptq_rules.not_marlin),
    (checkpoint(plan(), GPTQ, top("desc_act", True)), VLLM, "desc_act", gptq_rules.stored_order),
    (checkpoint(plan(), GPTQ, without("desc_act")), VLLM, "desc_act", gptq_rules.missing_keys),
    (checkpoint(plan(G128, q_proj=EIGHT), GPTQ), VLLM, "qkv_proj", gptq_rules.unlike_fused_rules),
    (checkpoint(plan(G128, o_proj=EIGHT), GPTQ), OPTIMUM, "dynamic", gptq_rules.dynamic_rules),
    (checkpoint(plan(G128, o_proj=None), GPTQ), OPTIMUM, "dynamic", gptq_rules.dynamic_rules),
    (checkpoint(plan(), "dense", tensor(f"{NAME}.weight_bitmask", (4096,), "U8")), VLLM, "without their", rules.left_out_zeros),
    (checkpoint(plan(), GPTQ, dense_module(NAME)), GPTQMODEL, "does not say so", gptq_rules.unnamed_dense),
    (checkpoint(plan(), GPTQ, dense_module(NAME)), OPTIMUM, "does not say so", gptq_rules.unnamed_dense),
    (checkpoint(plan(), GPTQ, top("block_name_to_quantize", "model.h")), OPTIMUM, "outside", gptq_rules.unfound_blocks),
    (checkpoint(plan(), GPTQ, model("model_type", "gpt2")), OPTIMUM, "Conv1D", gptq_rules.transposed_linears),
    (checkpoint(plan(), GPTQ, model("architectures", ["ViTForImageClassification"])), OPTIMUM, "text models", gptq_rules.no_text),
    (
        checkpoint(plan(), GPTQ, model("architectures", ["BertForMaskedLM"])),
        GPTQMODEL,
        "BertForMaskedLM",
        gptq_rules.no_generation,
    ),
    (checkpoint(plan(Scheme(4, 256), o_proj=Scheme(4, 48)), GPTQ), GPTQMODEL, "power of two", gptq_rules.gptq_group_sizes),
    (checkpoint(plan(Scheme(3, -1), NARROW), GPTQ, layers=NARROW), GPTQMODEL, "multiples of 32", gptq_rules.whole_three_bits),
    (checkpoint(plan(Scheme(3, -1), NARROW), GPTQ, layers=NARROW), OPTIMUM, "multiples of 32", gptq_rules.whole_three_bits),
    (checkpoint(plan(), GPTQ, top("bits", 5)), OPTIMUM, "5 bits", rules.beyond_us),
    (checkpoint(plan(), GPTQ, top("checkpoint_format", "gptq_p")), OURS, "gptq_p", rules.beyond_us),
    (checkpoint(plan(), GPTQ, top("checkpoint_format", "gptq_p")), VLLM, "gptq_p", rules.beyond_us),
]
WARNED = [
    (checkpoint(plan(THREE), CT), TRANSFORMERS, "0.18 or later", rules.three_bits),
    (checkpoint(plan(Scheme(2, 128)), CT), VLLM, "Humming", rules.rare_kernels),
    (checkpoint(plan(Scheme(8, 128, symmetric=False)), CT), VLLM, "Humming", rules.rare_kernels),
    (checkpoint(plan(Scheme(4, 16)), CT), VLLM, "other than 32, 64, 128", rules.rare_group_sizes),
    (checkpoint(plan(EIGHT), CT), VLLM, "On a CPU", rules.cpu_limits),
    (checkpoint(plan(Scheme.of("fp8")), CT), VLLM, "On a CPU", rules.cpu_limits),
    (checkpoint(plan(Scheme.of("fp8")), CT), VLLM, "fp8: vLLM needs a CUDA device", rules.marlin_alone),
    (checkpoint(plan(Scheme.of("nvfp4")), CT), VLLM, "nvfp4: vLLM needs a CUDA device", rules.marlin_alone),
    (checkpoint(plan(Scheme.of("fp8")), CT), OURS, "dequantized in every call", rules.no_kernel),
    (checkpoint(plan(), CT, model("architectures", ["ViTForImageClassification"])), VLLM, "ViTForImage", rules.image_model),
    (
        checkpoint(plan(), CT, group("input_activations", {"num_bits": 8})),
        TRANSFORMERS,
        "Activations",
        rules.simulated_activations,
    ),
    (checkpoint(plan(), CT, group("format", "int-quantized")), TRANSFORMERS, "not checked", rules.unchecked),
    (checkpoint(plan(), GPTQ, top("bits", 5)), GPTQMODEL, "not checked", rules.unchecked),
    (checkpoint(plan(Scheme(4, -1), SHORT), GPTQ, layers=SHORT), OPTIMUM, "CPU", gptq_rules.cpu_kernel),
]


@pytest.mark.parametrize(("found", "reader", "said", "rule"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_in_the_way_is_said(found: facts.Facts, reader: str, said: str, rule: rules.Rule) -> None:
    refused = verdict(found, reader)
    assert not refused.loads
    assert said in (rule(found) or "")
    assert rule(found) in refused.reasons


@pytest.mark.parametrize(("found", "reader", "said", "rule"), WARNED, ids=lambda value: getattr(value, "__name__", ""))
def test_conditions_are_warnings_and_no_refusal(found: facts.Facts, reader: str, said: str, rule: rules.Rule) -> None:
    warned = verdict(found, reader)
    assert warned.loads
    assert said in (rule(found) or "")
    assert rule(found) in warned.warnings


def test_every_rule_of_every_reader_is_triggered_above() -> None:
    known = {rule for methods in READERS.values() for r in methods.values() for rule in (*r.reasons, *r.warnings)}
    assert known == {rule for *_, rule in REFUSED + WARNED}


@pytest.mark.parametrize(
    ("form", "loading"), [(CT, {TRANSFORMERS, DEQUANTIZE, VLLM, OURS}), (GPTQ, {GPTQMODEL, OPTIMUM, VLLM, OURS})]
)
def test_the_default_scheme_loads_everywhere_without_a_word(form: str, loading: set[str]) -> None:
    verdicts = readers(checkpoint(plan(), form))
    assert {v.reader for v in verdicts if v.loads} == loading
    assert not any(v.warnings for v in verdicts)
    assert all(v.reasons for v in verdicts if not v.loads)
    assert loads_somewhere(verdicts)


def test_a_dense_checkpoint_loads_everywhere_but_in_gptqmodel() -> None:
    verdicts = readers(checkpoint(plan(), "dense"))
    assert [v.reader for v in verdicts if not v.loads] == [GPTQMODEL]


def test_asymmetric_gptq_is_read_through_optimum_and_by_gptqmodel() -> None:
    found = checkpoint(plan(Scheme(4, 128, symmetric=False)), GPTQ)
    assert {v.reader for v in readers(found) if v.loads} == {GPTQMODEL, OPTIMUM, OURS}


@pytest.mark.parametrize(("method", "said"), [("mine", "random weights"), ("awq", "does not take"), (None, "random weights")])
def test_other_methods_load_nowhere(method: str | None, said: str) -> None:
    verdicts = readers(checkpoint(plan(), CT, top("quant_method", method)))
    assert not any(v.loads for v in verdicts)
    assert said in verdicts[0].reasons[0]
    assert not loads_somewhere(verdicts)


def test_one_reader_beside_ours_is_enough_and_ours_is_needed() -> None:
    assert not loads_somewhere([Verdict(OURS, True)])
    assert not loads_somewhere([Verdict(VLLM, True), Verdict(OURS, False)])
    assert loads_somewhere([Verdict(VLLM, True), Verdict(OURS, True)])


def test_warnings_come_before_any_work_and_name_the_reader() -> None:
    assert warnings_for(plan(), LAYERS, CT, LLAMA, ["lm_head"]) == ()
    assert warnings_for(plan(), LAYERS, "dense") == ()
    said = warnings_for(plan(G128, q_proj=Scheme(4, 128, symmetric=False)), LAYERS, CT)
    assert any(warning.startswith(f"{TRANSFORMERS} will not load the result") for warning in said)
    assert any(warning.startswith(f"{VLLM} will not load the result") and "qkv_proj" in warning for warning in said)
    assert not any(warning.startswith((OURS, DEQUANTIZE)) for warning in said)
    assert any("dynamic" in warning for warning in warnings_for(plan(G128, o_proj=EIGHT), LAYERS, GPTQ))


def test_layers_are_listed_in_the_order_of_blocks() -> None:
    layers = [Layer(f"model.layers.{i}.up_proj", "linear", 128, 256) for i in (10, 9, 1)]
    found = checkpoint(plan(G128, layers), CT, layers=layers)
    assert [module.name for module in found.modules] == [f"model.layers.{i}.up_proj" for i in (1, 9, 10)]
