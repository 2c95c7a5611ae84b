"""What stands in the way of readers: rules over a checkpoint's facts.

A rule takes the facts and gives a sentence - what is in the way, and what to do - or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compress.errors import CompressError
from compress.formats import compressed_tensors, gptq, names
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
GPTQMODEL_GROUP_SIZES = (PER_ROW, 16, 32, 64, 128, 256, 512, 1024)
GPTQ_KEYS = ("bits", "group_size", "desc_act", "sym")
OPTIMUM_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
CPU_MULTIPLE = 32
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
EXPERT = re.compile(r"\.experts\.\d+\.")
PACKED_SUFFIXES = (".weight_packed", ".qweight")
OLD_3BIT_CODES = 10  # to a word, before compressed-tensors 0.18


def _some(found: Iterable[Module | str]) -> str:
    names = [module if isinstance(module, str) else module.name for module in found]
    return f"{len(names)} layers (first {names[0]})" if len(names) > 1 else names[0]


def _are(found: Sequence[Module | str]) -> str:
    return f"{_some(found)} {'are' if len(found) > 1 else 'is'}"


def no_config(facts: Facts) -> str | None:
    if any(name.endswith(PACKED_SUFFIXES) for name in facts.tensors):
        return "It has packed weights, but config.json has no quantization_config: readers would leave random weights."
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
        old = "install 0.15 to 0.17, " if all(m.scheme and m.scheme.bits != 3 for m in found) else ""
        return (
            f"{_are(found)} asymmetric: compressed-tensors 0.18 and later stop at the size of weight_zero_point; "
            f"{old}quantize with --symmetric, or load with compress."
        )
    return None


def _asymmetric(facts: Facts) -> list[Module]:
    return [module for module in facts.modules if module.scheme and not module.scheme.symmetric]


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
        return f"{_are(found)} quantized, but the config says dense: readers would leave random weights; correct config.json."
    return None


def missing_codes(facts: Facts) -> str | None:
    leaves = {name.rpartition(".")[2] for name in [*(module.name for module in facts.modules), "lm_head"]}
    found = [
        name
        for name in facts.dense
        if name.rpartition(".")[2] in leaves and compressed_tensors.group_of(facts.quantization, name, class_name(name))
    ]
    if found:
        return f"{_are(found)} dense, but the config says quantized: readers would leave random weights; add to `ignore`."
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
        return f"{_are(found)} quantized, and readers take linear layers only; leave embeddings dense."
    return None


def old_words(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.bits == 3 and _is_old(m)]:
        return (
            f"{_are(found)} packed ten 3-bit codes to a word, as before compressed-tensors 0.18; later readers take them for "
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
        and m.tensors["weight_packed"].shape[-1] != packing.words_per_row(m.K, m.scheme.bits)
    ]
    return (
        f"{_are(found)} in groups that do not divide the inputs; quantize again with a group size that does." if found else None
    )


def separate_experts(facts: Facts) -> str | None:
    if found := [module for module in facts.modules if EXPERT.search(module.name)]:
        return f"{_are(found)} experts packed one by one; transformers 5 keeps experts as one tensor, which is not served packed."
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
    mixed = [layer for layer, schemes in layers.items() if len(schemes) > 1]
    return f"The experts of {_some(mixed)} differ in scheme; vLLM runs them as one: give them one scheme." if mixed else None


def transforms(facts: Facts) -> str | None:
    if facts.quantization.get("transform_config"):
        return "transform_config is dropped without a warning, which gives wrong numbers; fuse the rotations into the weights."
    return None


def unlike_fused(facts: Facts) -> str | None:
    scheme: dict[str, object] = dict.fromkeys(facts.dense, "dense") | {module.name: module.settings for module in facts.modules}
    found = [fused for fused, parts in names.fused_sets(scheme).items() if len({scheme[part] for part in parts}) > 1]
    return f"The parts of {_some(found)} differ in scheme, and vLLM fuses them: give them one scheme." if found else None


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
    found = [
        m for m in facts.modules if m.scheme and (m.scheme.bits, m.scheme.symmetric) not in ((4, True), (4, False), (8, True))
    ]
    schemes = ", ".join(sorted({str(module.scheme) for module in found}))
    return f"{_are(found)} {schemes}: vLLM needs a CUDA device and its optional Humming kernels." if found else None


def rare_group_sizes(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.group_size not in VLLM_GROUP_SIZES]:
        return f"{_are(found)} in groups other than 32, 64, 128 or a whole row, which vLLM's usual kernels do not take."
    return None


def cpu_limits(facts: Facts) -> str | None:
    found = [m for m in facts.modules if m.scheme and (m.scheme.bits != 4 or m.N % CPU_MULTIPLE or m.K % CPU_MULTIPLE)]
    return (
        f"On a CPU it runs only 4-bit layers whose sizes are multiples of {CPU_MULTIPLE}, which {_are(found)} not."
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


def gptq_group_sizes(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.group_size not in (*GPTQMODEL_GROUP_SIZES, m.K)]:
        return f"{_are(found)} in groups of a size that GPTQModel's kernels do not take; use {PER_ROW} or a power of two from 16."
    return None


def no_generation(facts: Facts) -> str | None:
    if "For" in facts.architecture and not facts.architecture.endswith(GENERATES):
        return f"GPTQModel loads models that generate text, not {facts.architecture}; load it with compress."
    return None


def dynamic_rules(facts: Facts) -> str | None:
    if facts.quantization.get("dynamic"):
        return (
            "optimum does not read `dynamic`, which gives layers different schemes or leaves some dense; use GPTQModel, or one "
            "scheme for all layers, or --format compressed-tensors."
        )
    return None


def unnamed_dense(facts: Facts) -> str | None:
    """Linears inside blocks that are dense although nothing in the config leaves them out."""
    leaves = {module.name.rpartition(".")[2] for module in facts.modules}
    found = [name for name in facts.dense if name.rpartition(".")[2] in leaves and gptq.covers(facts.quantization, name)]
    return f"{_are(found)} dense, but the config does not say so: readers would leave random weights." if found else None


def unfound_blocks(facts: Facts) -> str | None:
    named = facts.quantization.get("block_name_to_quantize")
    blocks = (
        [named] if named else [block for block in OPTIMUM_BLOCKS if any(name.startswith(block) for name in facts.tensors)][:1]
    )
    outside = [module for module in facts.modules if not any(module.name.startswith(f"{block}.") for block in blocks)]
    return (
        f"{_are(outside)} outside the one list of blocks that optimum looks into; use GPTQModel or compress." if outside else None
    )


def transposed_linears(facts: Facts) -> str | None:
    if facts.config.get("model_type") == "gpt2":
        return "GPT-2's layers are Conv1D, for which transformers stops with an error; use GPTQModel or compress."
    return None


def no_text(facts: Facts) -> str | None:
    return f"transformers reads GPTQ for text models only, not {facts.architecture}." if image_model(facts) else None


def cpu_rows(facts: Facts) -> str | None:
    if any(m.scheme and m.scheme.bits == 4 and m.scheme.group_size == PER_ROW for m in facts.modules):
        return "On a CPU, 4-bit layers with one scale per row stop in the kernel that is chosen by default."
    return None


def missing_keys(facts: Facts) -> str | None:
    missing = [key for key in GPTQ_KEYS if key not in facts.quantization]
    return f"The quantization_config lacks {', '.join(missing)}, which vLLM needs; add it." if missing else None


def not_marlin(facts: Facts) -> str | None:
    found = [m for m in facts.modules if m.scheme and (m.scheme.bits not in (4, 8) or not m.scheme.symmetric)]
    return f"{_are(found)} {found[0].scheme}: vLLM reads GPTQ with symmetric 4 and 8 bits only." if found else None


def stored_order(facts: Facts) -> str | None:
    if facts.quantization.get("desc_act") and facts.quantization.get("group_size") != PER_ROW:
        return "desc_act with groups is refused; quantize again with static groups."
    return None


def unlike_fused_rules(facts: Facts) -> str | None:
    """vLLM asks `dynamic` about the names of the layers that it fuses."""
    found = [
        fused
        for fused, parts in names.fused_sets([*facts.dense, *(module.name for module in facts.modules)]).items()
        if any(gptq.rule_of(facts.quantization, part) != gptq.rule_of(facts.quantization, fused) for part in parts)
    ]
    return f"`dynamic` has no rule for {_some(found)} as there is for its parts; vLLM fuses them: add one." if found else None
