"""Which neurons and heads of which families can go: the layers that share them, and the config values that count them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError


@dataclass(frozen=True)
class Neurons:
    """A feed-forward pair: how many times each maker stacks the neurons in its rows, and who reads them."""

    makers: Mapping[str, int]
    reader: str
    size: str = "intermediate_size"


@dataclass(frozen=True)
class Heads:
    """An attention: for every maker what it stacks, of queries, keys and values, and who reads the heads' outputs.

    Only where the model takes the width of a head from `head_dim` in its config can their number change.
    """

    makers: Mapping[str, str]
    reader: str


@dataclass(frozen=True)
class Family:
    neurons: Neurons
    heads: Heads | None = None


_GATED = Neurons({"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj")
_QKV = Heads({"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}, "self_attn.o_proj")
_BERT = Neurons({"intermediate.dense": 1}, "output.dense")

FAMILIES = {  # by model_type; names are those inside a block
    "llama": Family(_GATED, _QKV),
    "mistral": Family(_GATED, _QKV),
    "qwen2": Family(_GATED, _QKV),
    "qwen3": Family(_GATED, _QKV),
    "gemma3_text": Family(_GATED, _QKV),
    "phi3": Family(Neurons({"mlp.gate_up_proj": 2}, "mlp.down_proj"), Heads({"self_attn.qkv_proj": "qkv"}, "self_attn.o_proj")),
    "vit": Family(
        Neurons({"mlp.fc1": 1}, "mlp.fc2"),
        Heads({"attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v"}, "attention.o_proj"),
    ),
    "opt": Family(Neurons({"fc1": 1}, "fc2", "ffn_dim")),
    "gpt2": Family(Neurons({"mlp.c_fc": 1}, "mlp.c_proj", "n_inner")),
    "gpt_neox": Family(Neurons({"mlp.dense_h_to_4h": 1}, "mlp.dense_4h_to_h")),
    "bert": Family(_BERT),
    "roberta": Family(_BERT),
    "mpnet": Family(_BERT),
    "distilbert": Family(Neurons({"ffn.lin1": 1}, "ffn.lin2", "hidden_dim")),
}
FIXED = {"bloom": "its feed-forward layers are always 4 x hidden_size wide and its heads hidden_size / n_head"}


@dataclass(frozen=True)
class Part:
    """Units of a block that can go, and how many do: U neurons, or key-value heads with the queries that read them.

    Unit u owns inputs u*width .. (u+1)*width of the reader. `makers` gives, for every layer that makes them, the rows that
    a unit owns in each of the parts stacked in it.
    """

    what: str
    reader: str
    width: int
    makers: Mapping[str, tuple[int, ...]]
    units: int
    remove: int

    def inputs(self, kept: Bool[Tensor, "U"]) -> Int64[Tensor, "k"]:
        """Which inputs of the reader are left."""
        return kept.repeat_interleave(self.width).nonzero().flatten()

    def rows(self, maker: str, kept: Bool[Tensor, "U"]) -> Int64[Tensor, "n"]:
        """Which rows of a maker are left."""
        return torch.cat([kept.repeat_interleave(width) for width in self.makers[maker]]).nonzero().flatten()


@dataclass(frozen=True)
class Shrinkage:
    """What every block loses, attention first; the config values that say so; and what could not be done as asked."""

    parts: tuple[Part, ...]
    config: Mapping[str, int]
    notes: tuple[str, ...]


def shrinkage(model: PreTrainedModel, fraction: float) -> Shrinkage:
    """What goes for `fraction` of all neurons and of all heads, as far as stock transformers can load what is left.

    The same number goes from every block, so that the config's sizes stay single numbers: round(fraction x U) neurons. Of heads,
    whole groups that share keys and values go: the nearest number to the request or, where the config refuses it (some demand
    that the number of heads divide hidden_size), the next smaller one that it accepts. One of each stays.
    """
    family = _family(model)
    config = model.config
    neurons = _neurons(family.neurons, config, fraction)
    parts, changes = [neurons], {family.neurons.size: neurons.units - neurons.remove}
    notes: tuple[str, ...]
    if family.heads is None:
        notes = (f"attention heads stay: {type(model).__name__} makes them hidden_size / heads wide, so their number is fixed",)
    else:
        heads, head_changes = _heads(family.heads, config, fraction)
        parts, changes = [heads, *parts], changes | (head_changes if heads.remove else {})
        notes = _heads_note(heads, config, fraction)
    parts = [part for part in parts if part.remove]
    if not parts:
        raise CompressError(f"Sparsity {fraction:g} removes none of the {neurons.units} neurons of a block; ask for more.")
    return Shrinkage(tuple(parts), changes, notes)


def _family(model: PreTrainedModel) -> Family:
    name, kind = type(model).__name__, model.config.model_type
    if kind in FIXED:
        raise CompressError(f"{name} has no neurons or heads that could go: {FIXED[kind]}. Prune it with another pattern.")
    if kind not in FAMILIES:
        raise CompressError(
            f"Which layers of {name} make its neurons and heads is not known, so it cannot be pruned by rows. Use another "
            f"pattern; rows go for {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def _neurons(neurons: Neurons, config: PreTrainedConfig, fraction: float) -> Part:
    """The neurons of a block; GPT-2's `n_inner` may be empty, which means four times its width."""
    units = getattr(config, neurons.size) or 4 * config.hidden_size
    makers = {name: (1,) * stacked for name, stacked in neurons.makers.items()}
    return Part("neurons", neurons.reader, 1, makers, units, min(round(fraction * units), units - 1))


def _heads(heads: Heads, config: PreTrainedConfig, fraction: float) -> tuple[Part, dict[str, int]]:
    values = config.to_dict()
    queries = config.num_attention_heads
    units = values.get("num_key_value_heads") or queries
    width = values.get("head_dim") or config.hidden_size // queries
    per = queries // units
    rows = {"q": per * width, "k": width, "v": width}
    makers = {name: tuple(rows[letter] for letter in stacked) for name, stacked in heads.makers.items()}

    def changes(kept: int) -> dict[str, int]:
        grouped = {"num_key_value_heads": kept} if "num_key_value_heads" in values else {}
        return {"num_attention_heads": kept * per, **grouped, "head_dim": width}

    remove = next(r for r in range(_wanted(fraction, units), -1, -1) if r == 0 or _accepted(config, changes(units - r)))
    return Part("heads", heads.reader, per * width, makers, units, remove), changes(units - remove)


def _wanted(fraction: float, units: int) -> int:
    """The number of units nearest to the fraction, the smaller of two; one unit stays."""
    return min(math.ceil(fraction * units - 0.5), units - 1)


def _accepted(config: PreTrainedConfig, changes: Mapping[str, int]) -> bool:
    """Whether the class of a config takes these values."""
    try:
        type(config).from_dict({**config.to_dict(), **changes})
    except (StrictDataclassError, ValueError):
        return False
    return True


def _heads_note(heads: Part, config: PreTrainedConfig, fraction: float) -> tuple[str, ...]:
    """What keeps the number of heads from the request, if anything does."""
    queries = config.num_attention_heads
    per = queries // heads.units
    wanted = _wanted(fraction, heads.units)
    if wanted == 0:
        return (f"attention heads stay: {fraction:g} of their {heads.units} groups is nearest to none",)
    if heads.remove < wanted:
        return (
            f"{queries - per * heads.remove} of {queries} attention heads stay: {type(config).__name__} does not accept "
            f"{queries - per * wanted} of them, and nothing in between",
        )
    return ()
