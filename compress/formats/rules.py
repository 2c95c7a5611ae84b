"""What stands in the way of readers: rules over a checkpoint's facts; those of GPTQ checkpoints are in `gptq_rules`.

A rule takes the facts and gives a sentence - what is in the way, and what to do - or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from compress.errors import CompressError
from compress.formats import compressed_tensors, names, sparse
from compress.formats.facts import Facts, Module, class_name
from compress.kernels import packing
from compress.spec import PER_ROW

Rule = Callable[[Facts], "str | None"]
CT_FORMATS = frozenset(
    {
        "dense",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "pack-quantized",
        "mixed-precision",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
    }
)
CT_LEGACY = frozenset({"sparse-bitmask", "sparse-24-bitmask", "marlin-24"})
CT_GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
CT_WEIGHT_KEYS = frozenset(
    {
        "num_bits",
        "type",
        "symmetric",
        "group_size",
        "strategy",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
        "zp_dtype",
        "observer",
        "observer_kwargs",
    }
)
VLLM_GROUP_SIZES = (PER_ROW, 32, 64, 128)
CPU_MULTIPLE = 32
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
EXPERT = re.compile(r"\.experts\.\d+\.")
PACKED_SUFFIXES = (".weight_packed", ".qweight")
OLD_3BIT_CODES = 10  # to a word, before compressed-tensors 0.18


def some(found: Iterable[Module | str]) -> str:
    names = [module if isinstance(module, str) else module.name for module in found]
    return f"{len(names)} layers (first {names[0]})" if len(names) > 1 else names[0]


def are(found: Sequence[Module | str]) -> str:
    return f"{some(found)} {'are' if len(found) > 1 else 'is'}"


def no_config(facts: Facts) -> str | None:
    if any(name.endswith(PACKED_SUFFIXES) for name in facts.tensors):
        return "It has packed weights, but config.json has no quantization_config: readers would leave random weights."
    return None


def left_out_zeros(facts: Facts) -> str | None:
    if sparse.is_packed(facts.tensors):
        return "Its weights are stored without their zeros, which only compress reads; prune again with --format dense."
    return None


def rejected_config(facts: Facts) -> str | None:
    for key, group in compressed_tensors.groups(facts.quantization).items():
        if kind := _module_type(group):
            return f"{key} holds {kind} layers, which only compress reads; for other readers use --format dense."
        weights = group.get("weights") or {}
        if extra := sorted((group.keys() - CT_GROUP_KEYS) | (weights.keys() - CT_WEIGHT_KEYS)):
            return f"{key} has the key {extra[0]}, which compressed-tensors rejects; remove it from config.json."
    return None


def unknown_format(facts: Facts) -> str | None:
    for key, group in compressed_tensors.groups(facts.quantization).items():
        if (written := group.get("format")) and written not in CT_FORMATS | CT_LEGACY:
            return f"{key} has the format {written}, which no reader knows."
    return None


def unfollowed_order(facts: Facts) -> str | None:
    for key, group in compressed_tensors.groups(facts.quantization).items():
        if (order := (group.get("weights") or {}).get("actorder")) in (True, "group", "dynamic"):
            return f"{key} has actorder {order}, removed from readers in 2026; quantize again with static groups."
    return None


def legacy_sparsity(facts: Facts) -> str | None:
    written = {facts.quantization.get("format"), (facts.quantization.get("sparsity_config") or {}).get("format")}
    written |= {group.get("format") for group in compressed_tensors.groups(facts.quantization).values()}
    if legacy := written & CT_LEGACY:
        return f"The format {legacy.pop()} was dropped by every reader in 2026; save the pruned weights dense."
    return None


def sparsity_targets(facts: Facts) -> str | None:
    if (facts.quantization.get("sparsity_config") or {}).get("targets"):
        return "sparsity_config names targets, which vLLM refuses; set it to {} in config.json."
    return None


def asymmetric(facts: Facts) -> str | None:
    if found := _asymmetric(facts):
        read_once = all(m.scheme and m.scheme.bits != 3 and not EXPERT.search(m.name) for m in found)
        old = "install 0.15 to 0.17, " if read_once else ""
        return (
            f"{are(found)} asymmetric: compressed-tensors 0.18 and later stop at the size of weight_zero_point; "
            f"{old}quantize with --symmetric, or load with compress."
        )
    return None


def _asymmetric(facts: Facts) -> list[Module]:
    return [module for module in facts.modules if module.scheme and not module.scheme.symmetric]


def asymmetric_experts(facts: Facts) -> str | None:
    if found := [module for module in _asymmetric(facts) if EXPERT.search(module.name)]:
        return f"{are(found)} asymmetric experts, at which transformers stops; quantize with --symmetric, or load with compress."
    return None


def dense_experts(facts: Facts) -> str | None:
    if facts.modules and (found := [name for name in facts.dense if EXPERT.search(name)]):
        return f"{are(found)} experts stored dense, at which transformers stops in a quantized checkpoint; quantize them too."
    return None


def several_schemes(facts: Facts) -> str | None:
    schemes = {module.settings for module in facts.modules if module.group}
    if len(schemes) > 1:
        return (
            f"dequantize=True uses the first group's scheme for all {len(schemes)}: it stops, or computes wrong numbers without "
            "a warning; leave dequantize out."
        )
    return None


def uncovered(facts: Facts) -> str | None:
    if found := [module for module in facts.modules if module.scheme is None and module.group is None and not module.problem]:
        return f"{are(found)} quantized, but the config says dense: readers would leave random weights; correct config.json."
    return None


def missing_codes(facts: Facts) -> str | None:
    leaves = {name.rpartition(".")[2] for name in [*(module.name for module in facts.modules), "lm_head"]}
    found = [
        name
        for name in facts.dense
        if name.rpartition(".")[2] in leaves and compressed_tensors.group_of(facts.quantization, name, class_name(name))
    ]
    if found:
        return f"{are(found)} dense, but the config says quantized: readers would leave random weights; add to `ignore`."
    return None


def tied_head(facts: Facts) -> str | None:
    quantized = any(module.name.rpartition(".")[2] == "lm_head" for module in facts.modules)
    has_head = facts.architecture.endswith(GENERATES)
    if facts.config.get("tie_word_embeddings") and (
        quantized or (has_head and compressed_tensors.group_of(facts.quantization, "lm_head", "Linear"))
    ):
        return "lm_head is quantized although it is tied to the embedding, which stops transformers; leave it dense."
    return None


def quantized_embedding(facts: Facts) -> str | None:
    if found := [module for module in facts.modules if class_name(module.name) == "Embedding"]:
        return f"{are(found)} quantized, and readers take linear layers only; leave embeddings dense."
    return None


def old_words(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.bits == 3 and _is_old(m)]:
        return (
            f"{are(found)} packed ten 3-bit codes to a word, as before compressed-tensors 0.18; later readers take them for "
            "something else. Quantize again, or install compressed-tensors 0.15 to 0.17."
        )
    return None


def _is_old(module: Module) -> bool:
    return module.tensors["weight_packed"].shape[-1] == math.ceil(module.K / OLD_3BIT_CODES) != packing.words_per_row(module.K, 3)


def uneven_groups(facts: Facts) -> str | None:
    found = [
        m
        for m in facts.modules
        if m.scheme
        and m.scheme.group_size != PER_ROW
        and not _is_old(m)
        and m.tensors["weight_packed"].shape != compressed_tensors.layout(m.scheme, (m.N, m.K), torch.float16)["weight_packed"][1]
    ]
    return f"{are(found)} in groups that do not divide the inputs; quantize again with a group size that does." if found else None


def separate_experts(facts: Facts) -> str | None:
    if found := [module for module in facts.modules if EXPERT.search(module.name)]:
        return f"{are(found)} experts, which are served packed from the compressed-tensors format only; quantize to that."
    return None


def unlike_experts(facts: Facts) -> str | None:
    schemes = {module.settings for module in facts.modules if EXPERT.search(module.name)}
    if len(schemes) > 1:
        return (
            f"Experts have {len(schemes)} schemes; transformers stacks them as if alike, with wrong numbers. Give all one scheme."
        )
    return None


def unlike_experts_of_a_layer(facts: Facts) -> str | None:
    layers: dict[str, set[object]] = {}
    for module in facts.modules:
        if EXPERT.search(module.name):
            layers.setdefault(module.name.partition(".experts.")[0], set()).add(module.settings)
    for name in facts.dense:
        if EXPERT.search(name):
            layers.setdefault(name.partition(".experts.")[0], set()).add("dense")
    mixed = [layer for layer, schemes in layers.items() if len(schemes) > 1]
    return f"The experts of {some(mixed)} differ in scheme; vLLM runs them as one: give them one scheme." if mixed else None


def transforms(facts: Facts) -> str | None:
    if facts.quantization.get("transform_config"):
        return "transform_config is dropped without a warning, which gives wrong numbers; fuse the rotations into the weights."
    return None


def unlike_fused(facts: Facts) -> str | None:
    scheme: dict[str, object] = dict.fromkeys(facts.dense, "dense") | {module.name: module.settings for module in facts.modules}
    found = [fused for fused, parts in names.fused_sets(scheme).items() if len({scheme[part] for part in parts}) > 1]
    return f"The parts of {some(found)} differ in scheme, and vLLM fuses them: give them one scheme." if found else None


def no_group_format(facts: Facts) -> str | None:
    groups = compressed_tensors.groups(facts.quantization)
    if facts.quantization.get("format") != compressed_tensors.PACK_QUANTIZED and any(
        not group.get("format") for group in groups.values()
    ):
        return "A config group has no format, and the global one does not say it; set `format` in every group."
    return None


def unread_layers(facts: Facts) -> str | None:
    kinds = {_module_type(group) for group in compressed_tensors.groups(facts.quantization).values()} - {""}
    return f"{kinds.pop()} layers are quantized, which only compress reads; for vLLM use --format dense." if kinds else None


def _module_type(group: Mapping[str, Any]) -> str:
    return str(group.get("module_type", ""))


def kv_cache(facts: Facts) -> str | None:
    cache = facts.quantization.get("kv_cache_scheme")
    wanted = {"num_bits": 8, "type": "float", "symmetric": True}
    if cache and (
        any(cache.get(key) != value for key, value in wanted.items()) or cache.get("strategy") not in ("tensor", "attn_head")
    ):
        return "kv_cache_scheme is not 8-bit float, symmetric, per tensor or head, the only one that vLLM takes."
    return None


def expanded_to_bfloat16(facts: Facts) -> str | None:
    found = [module for module in _floats(facts) if module.scheme and module.scheme.form == "e2m1"]
    dtype = facts.config.get("dtype") or facts.config.get("torch_dtype") or "bfloat16"
    if not found or dtype == "bfloat16":
        return None
    return (
        f"{are(found)} {_grids(found)}, always expanded to bfloat16, and the first {dtype} input stops it; pass "
        "dtype=torch.bfloat16, or CompressedTensorsConfig(dequantize=True)."
    )


def three_bits(facts: Facts) -> str | None:
    found = any(module.scheme and module.scheme.bits == 3 for module in facts.modules)
    return "3-bit layers need compressed-tensors 0.18 or later." if found else None


def simulated_activations(facts: Facts) -> str | None:
    if any(module.group and module.group.get("input_activations") for module in facts.modules):
        return "Activations are quantized too: transformers simulates that, slowly."
    return None


def unchecked(facts: Facts) -> str | None:
    if problem := next((module.problem for module in facts.modules if module.problem), None):
        return f"What follows is not checked here: {problem}"
    return None


def rare_kernels(facts: Facts) -> str | None:
    usual = ((4, True), (4, False), (8, True))
    found = [m for m in facts.modules if m.scheme and m.scheme.form == "int" and (m.scheme.bits, m.scheme.symmetric) not in usual]
    schemes = ", ".join(sorted({str(module.scheme) for module in found}))
    return f"{are(found)} {schemes}: vLLM needs a CUDA device and its optional Humming kernels." if found else None


def marlin_alone(facts: Facts) -> str | None:
    if found := _floats(facts):
        return f"{are(found)} {_grids(found)}: vLLM needs a CUDA device, for its Marlin kernels."
    return None


def no_kernel(facts: Facts) -> str | None:
    if found := _floats(facts):
        return f"{are(found)} {_grids(found)}, for which it has no kernel: they stay packed and are dequantized in every call."
    return None


def _floats(facts: Facts) -> list[Module]:
    return [module for module in facts.modules if module.scheme and module.scheme.form != "int"]


def _grids(modules: Iterable[Module]) -> str:
    return " and ".join(sorted({module.scheme.grid for module in modules if module.scheme}))


def rare_group_sizes(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.form == "int" and m.scheme.group_size not in VLLM_GROUP_SIZES]:
        return f"{are(found)} in groups other than 32, 64, 128 or a whole row, which vLLM's usual kernels do not take."
    return None


def cpu_limits(facts: Facts) -> str | None:
    found = [
        m
        for m in facts.modules
        if m.scheme and (m.scheme.form != "int" or m.scheme.bits != 4 or m.N % CPU_MULTIPLE or m.K % CPU_MULTIPLE)
    ]
    return (
        f"On a CPU it runs only 4-bit integer layers whose sizes are multiples of {CPU_MULTIPLE}, which {are(found)} not."
        if found
        else None
    )


def image_model(facts: Facts) -> str | None:
    return f"vLLM serves no {facts.architecture}." if facts.architecture.endswith("ForImageClassification") else None


def beyond_us(facts: Facts) -> str | None:
    if facts.method == compressed_tensors.METHOD:
        try:
            compressed_tensors.check_config(facts.quantization)
        except CompressError as error:
            return str(error)
    return next((module.problem for module in facts.modules if module.problem), None)
