"""Who can load a checkpoint and why not: which rules each reader has, without loading any of them.

The rules were checked by running transformers 5.23 with compressed-tensors 0.20, and GPTQModel 7.7 alone and through optimum
2.3; vLLM's are those of version 0.33. A reader that gives wrong numbers does not load a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.formats import compressed_tensors, gptq, gptq_rules, rules
from compress.formats.facts import DENSE, Facts, planned
from compress.formats.rules import Rule
from compress.spec import Plan

if TYPE_CHECKING:
    from compress.models import Layer

TRANSFORMERS_METHODS = frozenset(
    {
        "aqlm",
        "auto-round",
        "awq",
        "bitnet",
        "bitsandbytes",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        "compressed-tensors",
        "eetq",
        "fbgemm_fp8",
        "fouroversix",
        "fp8",
        "fp_quant",
        "gemma",
        "gguf",
        "gptq",
        "higgs",
        "hqq",
        "metal",
        "mxfp4",
        "mxfp8",
        "nvfp4",
        "quanto",
        "quark",
        "sinq",
        "spqr",
        "torchao",
        "vptq",
    }
)


@dataclass(frozen=True)
class Verdict:
    """Whether a reader loads a checkpoint correctly: `reasons` say why not, `warnings` on what condition it does."""

    reader: str
    loads: bool
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    reasons: Sequence[Rule] = ()
    warnings: Sequence[Rule] = ()


TRANSFORMERS, DEQUANTIZE = "transformers + compressed-tensors", "transformers (dequantize=True)"
VLLM, GPTQMODEL, OPTIMUM, OURS = "vLLM", "GPTQModel", "transformers + optimum + gptqmodel", "compress"
CONFIG_RULES = (
    rules.rejected_config,
    rules.unfollowed_order,
    rules.legacy_sparsity,
    rules.transforms,
    rules.unknown_format,
    rules.quantized_embedding,
    rules.unlike_experts,
    rules.dense_experts,
    rules.old_words,
    rules.uneven_groups,
)
READERS: Mapping[str, Mapping[str, Rules]] = {  # reader: {quant_method: rules}
    TRANSFORMERS: {
        DENSE: Rules((rules.no_config, rules.left_out_zeros)),
        compressed_tensors.METHOD: Rules(
            (*CONFIG_RULES, rules.uncovered, rules.missing_codes, rules.tied_head, rules.asymmetric, rules.expanded_to_bfloat16),
            (rules.three_bits, rules.simulated_activations, rules.unchecked),
        ),
    },
    DEQUANTIZE: {
        DENSE: Rules((rules.no_config, rules.left_out_zeros)),
        compressed_tensors.METHOD: Rules((*CONFIG_RULES, rules.several_schemes, rules.asymmetric_experts), (rules.three_bits,)),
    },
    VLLM: {
        DENSE: Rules((rules.no_config, rules.left_out_zeros), (rules.image_model,)),
        compressed_tensors.METHOD: Rules(
            (
                rules.unread_layers,
                rules.unknown_format,
                rules.unfollowed_order,
                rules.legacy_sparsity,
                rules.sparsity_targets,
                rules.no_group_format,
                rules.kv_cache,
                rules.uncovered,
                rules.missing_codes,
                rules.unlike_fused,
                rules.unlike_experts_of_a_layer,
                rules.old_words,
                rules.uneven_groups,
            ),
            (
                rules.rare_kernels,
                rules.rare_group_sizes,
                rules.marlin_alone,
                rules.cpu_limits,
                rules.image_model,
                rules.unchecked,
            ),
        ),
        gptq.METHOD: Rules(
            (
                rules.beyond_us,
                gptq_rules.missing_keys,
                gptq_rules.not_marlin,
                gptq_rules.stored_order,
                gptq_rules.unlike_fused_rules,
            ),
            (rules.rare_group_sizes, rules.cpu_limits),
        ),
    },
    GPTQMODEL: {
        gptq.METHOD: Rules(
            (gptq_rules.unnamed_dense, gptq_rules.gptq_group_sizes, gptq_rules.whole_three_bits, gptq_rules.no_generation),
            (rules.unchecked,),
        )
    },
    OPTIMUM: {
        DENSE: Rules((rules.no_config, rules.left_out_zeros)),
        gptq.METHOD: Rules(
            (
                rules.beyond_us,
                gptq_rules.dynamic_rules,
                gptq_rules.unnamed_dense,
                gptq_rules.gptq_group_sizes,
                gptq_rules.whole_three_bits,
                gptq_rules.unfound_blocks,
                gptq_rules.transposed_linears,
                gptq_rules.no_text,
            ),
            (gptq_rules.cpu_kernel,),
        ),
    },
    OURS: {
        DENSE: Rules((rules.no_config,)),
        compressed_tensors.METHOD: Rules(
            (
                rules.beyond_us,
                rules.uncovered,
                rules.missing_codes,
                rules.quantized_embedding,
                rules.old_words,
                rules.uneven_groups,
            ),
            (rules.no_kernel,),
        ),
        gptq.METHOD: Rules((rules.beyond_us, rules.separate_experts)),
    },
}


def readers(facts: Facts) -> list[Verdict]:
    """One verdict per reader."""
    return [_verdict(reader, facts) for reader in READERS]


def loads_somewhere(verdicts: Iterable[Verdict]) -> bool:
    """Whether this package and at least one other reader load the checkpoint."""
    loading = {verdict.reader for verdict in verdicts if verdict.loads}
    return OURS in loading and len(loading) > 1


def warnings_for(
    plan: Plan,
    layers: Sequence[Layer],
    format_name: str,
    config: Mapping[str, Any] | None = None,
    dense_modules: Sequence[str] = (),
) -> tuple[str, ...]:
    """What to tell people before the work starts: who will not load the result, and on what condition others will.

    `config` is the dense model's config.json. Readers that never take the format are not mentioned.
    """
    return said_of(planned(plan, layers, format_name, config or {}, dense_modules))


def said_of(facts: Facts) -> tuple[str, ...]:
    """Who does not load a checkpoint, and on what condition others do, a sentence each."""
    verdicts = [verdict for verdict in readers(facts) if facts.method in READERS[verdict.reader]]
    if any(verdict.reader == TRANSFORMERS and not verdict.loads for verdict in verdicts):
        verdicts = [verdict for verdict in verdicts if verdict.reader != DEQUANTIZE]  # one refusal by transformers is enough
    refused = [f"{verdict.reader} will not load the result: {reason}" for verdict in verdicts for reason in verdict.reasons]
    return (*refused, *(f"{verdict.reader}: {warning}" for verdict in verdicts for warning in verdict.warnings))


def _verdict(reader: str, facts: Facts) -> Verdict:
    known = READERS[reader].get(facts.method)
    if known is None:
        return Verdict(reader, False, (_foreign(reader, facts),))
    if reasons := tuple(said for rule in known.reasons if (said := rule(facts))):
        return Verdict(reader, False, reasons)
    return Verdict(reader, True, (), tuple(said for rule in known.warnings if (said := rule(facts))))


def _foreign(reader: str, facts: Facts) -> str:
    if facts.method == DENSE:
        return "It is not quantized, and this reader takes quantized checkpoints only."
    if facts.method not in TRANSFORMERS_METHODS and reader in (TRANSFORMERS, DEQUANTIZE, OPTIMUM):
        return f"transformers does not know quant_method {facts.method!r}: it only warns and then computes with random weights."
    return f"It is quantized with {facts.method}, which this reader does not take; write it in a format that it does."
