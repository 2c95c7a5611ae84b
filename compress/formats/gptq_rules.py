"""What stands in the way of those who read GPTQ checkpoints: GPTQModel, transformers through optimum, and vLLM."""

from __future__ import annotations

from compress.formats import gptq, names
from compress.formats.facts import Facts
from compress.formats.rules import GENERATES, are, image_model, some
from compress.kernels import packing
from compress.spec import PER_ROW

GPTQMODEL_GROUP_SIZES = (PER_ROW, 16, 32, 64, 128, 256, 512, 1024)
GPTQ_KEYS = ("bits", "group_size", "desc_act", "sym")
OPTIMUM_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
CPU_GROUP_SIZES = (16, 32, 64, 128, 256)


def gptq_group_sizes(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.group_size not in (*GPTQMODEL_GROUP_SIZES, m.K)]:
        return f"{are(found)} in groups of a size that GPTQModel's kernels do not take; use {PER_ROW} or a power of two from 16."
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
    return f"{are(found)} dense, but the config does not say so: readers would leave random weights." if found else None


def unfound_blocks(facts: Facts) -> str | None:
    named = facts.quantization.get("block_name_to_quantize")
    blocks = (
        [named] if named else [block for block in OPTIMUM_BLOCKS if any(name.startswith(block) for name in facts.tensors)][:1]
    )
    outside = [module for module in facts.modules if not any(module.name.startswith(f"{block}.") for block in blocks)]
    return (
        f"{are(outside)} outside the one list of blocks that optimum looks into; use GPTQModel or compress." if outside else None
    )


def transposed_linears(facts: Facts) -> str | None:
    if facts.config.get("model_type") == "gpt2":
        return "GPT-2's layers are Conv1D, for which transformers stops with an error; use GPTQModel or compress."
    return None


def no_text(facts: Facts) -> str | None:
    return f"transformers reads GPTQ for text models only, not {facts.architecture}." if image_model(facts) else None


def whole_three_bits(facts: Facts) -> str | None:
    if found := [m for m in facts.modules if m.scheme and m.scheme.bits == 3 and (m.N % packing.WORD or m.K % packing.WORD)]:
        return (
            f"{are(found)} 3-bit with sizes that are no multiples of {packing.WORD}, which GPTQModel stops at; use 4 bits there."
        )
    return None


def cpu_kernel(facts: Facts) -> str | None:
    four = [module for module in facts.modules if module.scheme and module.scheme.bits == 4]
    if found := [m for m in four if m.N % 16 or (m.scheme and m.scheme.group(m.K) not in CPU_GROUP_SIZES)]:
        return f"On a CPU the kernel chosen by default stops at the group size or width of {some(found)}."
    return None


def missing_keys(facts: Facts) -> str | None:
    missing = [key for key in GPTQ_KEYS if key not in facts.quantization]
    return f"The quantization_config lacks {', '.join(missing)}, which vLLM needs; add it." if missing else None


def not_marlin(facts: Facts) -> str | None:
    found = [m for m in facts.modules if m.scheme and (m.scheme.bits not in (4, 8) or not m.scheme.symmetric)]
    return f"{are(found)} {found[0].scheme}: vLLM reads GPTQ with symmetric 4 and 8 bits only." if found else None


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
    return f"`dynamic` has no rule for {some(found)} as there is for its parts; vLLM fuses them: add one." if found else None
