"""Which weights of a decoder to change, and how, so that its residual stream is rotated and its predictions stay the same.

With RMS norms, which rotations commute with, `x' = x R` runs through a model whose embeddings and outputs of blocks are
multiplied by R, and whose inputs of blocks by its inverse; a norm's weights move into the layers that read it (SliceGPT, arXiv
2401.15024). Values turn head by head, which the output projection undoes (QuaRot, arXiv 2404.00456, without what it adds at
run time).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import models
from compress.errors import CompressError
from compress.rotate.orthogonal import Rotation

Change = Callable[[Tensor], Tensor]  # of a parameter, to one of the same shape and dtype

ROWS_AT_A_TIME = 4096  # of a matrix in float64
NORMS: Mapping[str, str] = MappingProxyType({"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"})
READERS: Mapping[str, Set[str]] = MappingProxyType(
    {
        "self_attn": {"q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"},
        "mlp": {"gate_proj", "up_proj", "gate_up_proj", "gate", "shared_expert_gate"},
    }
)
WRITERS: Mapping[str, Set[str]] = MappingProxyType({"self_attn": {"o_proj"}, "mlp": {"down_proj"}})
INSIDE = {"q_norm", "k_norm", "q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj"}  # away from the stream
NORM_ERROR = 1e-3  # relative; a norm computes in float32 and has an epsilon
UNTIE = (
    "Give it an output layer of its own first: load it, set config.tie_word_embeddings to False, replace lm_head.weight by a "
    "copy, and save it."
)


@dataclass(frozen=True)
class Fold:
    """W' = L^T W diag(gain) R; L turns the last `turned` rows, all of them for None."""

    gain: Float64[Tensor, "K"] | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    turned: int | None = None

    def __call__(self, parameter: Tensor) -> Tensor:
        """The changed weight, or bias, which has no inputs; computed in float64."""
        if parameter.ndim == 1:
            return self._outputs(parameter.double()[:, None])[:, 0].to(parameter.dtype)
        if self.outputs is None:
            return torch.cat([self._inputs(rows).to(parameter.dtype) for rows in parameter.split(ROWS_AT_A_TIME)])
        return self._outputs(self._inputs(parameter)).to(parameter.dtype)

    def _inputs(self, W: Float[Tensor, "N K"]) -> Float64[Tensor, "N K"]:
        W = W.double() if self.gain is None else W.double() * self.gain
        return W if self.inputs is None else self.inputs.rows(W)

    def _outputs(self, W: Float64[Tensor, "N K"]) -> Float64[Tensor, "N K"]:
        if self.outputs is None:
            return W
        still = 0 if self.turned is None else len(W) - self.turned
        return torch.cat([W[:still], self.outputs.columns(W[still:])])


def folds(model: PreTrainedModel, blocks: Sequence[str], seed: int) -> dict[str, Change]:
    """What to do with every parameter that changes, by name; raises where this would not keep the model's function.

    Every parameter must be known to read the stream, write it, or lie between such layers.
    """
    embedding, head, norm = _ends(model)
    stream = Rotation.random(embedding.embedding_dim, seed)
    changes: dict[str, Change | None] = {}
    for name in blocks:
        found = _of_block(model.get_submodule(name), name, model, stream, seed)
        changes |= {f"{name}.{local}": change for local, change in found}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    last, gain, neutral = names[norm.get_parameter("weight")], *_gain(norm, "its last norm", model)
    changes[names[embedding.weight]] = Fold(inputs=stream)
    if head.weight is not embedding.weight:
        changes |= {names[head.weight]: Fold(gain, stream), last: partial(torch.full_like, fill_value=neutral)}
    elif torch.allclose(gain, gain[0].expand_as(gain), rtol=NORM_ERROR):
        changes[last] = None
    else:
        raise _refused(model, "its output layer is its embedding, and cannot take up the weights of the last norm", UNTIE)
    if head.bias is not None:
        changes[names[head.bias]] = None
    if unknown := [name for name in names.values() if name not in changes]:
        raise _refused(model, f"what {unknown[0]} does to the stream between its blocks is not known")
    return {name: change for name, change in changes.items() if change is not None}


def _ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear, nn.Module]:
    """Embedding, output layer and last norm."""
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise _refused(model, "it has layer norms, which subtract the mean, and rotations commute with RMS norms alone")
    embedding = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    head, norm = model.get_output_embeddings(), dict(model.base_model.named_children()).get("norm")
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or norm is None:
        raise _refused(model, "it is not a decoder with an embedding, a last norm called norm, and an output layer")
    return embedding, head, norm


def _of_block(
    block: nn.Module, name: str, model: PreTrainedModel, stream: Rotation, seed: int
) -> Iterator[tuple[str, Change | None]]:
    """Every parameter of a block with its change, None for those away from the stream."""
    children = {child for child, module in block.named_children() if any(True for _ in module.parameters())}
    if children != {*NORMS, *NORMS.values()}:
        odd = sorted(children ^ {*NORMS, *NORMS.values()})
        raise _refused(model, f"its blocks are not an attention and an MLP with a norm before each ({name}: {', '.join(odd)})")
    for part, norm in NORMS.items():
        gain, neutral = _gain(block.get_submodule(norm), f"{name}.{norm}", model)
        yield f"{norm}.weight", partial(torch.full_like, fill_value=neutral)
        values = _heads(block.get_submodule(part), model) if part == "self_attn" else None
        turn = Rotation.random(values.width, seed) if values else None  # the same in every block
        for local, _ in block.get_submodule(part).named_parameters():
            owner, _, kind = f"{part}.{local}".rpartition(".")
            layer = owner.rpartition(".")[2]
            outputs = turn if values and layer == values.layer else None
            if layer in READERS[part] and kind in ("weight", "bias"):
                yield f"{part}.{local}", Fold(gain, stream, outputs, values.rows if values else None)
            elif layer in WRITERS[part] and kind in ("weight", "bias"):
                yield f"{part}.{local}", Fold(None, turn, stream)
            elif layer in INSIDE:
                yield f"{part}.{local}", None
            else:
                raise _refused(model, f"what {name}.{part}.{local} does to the stream is not known")


@dataclass(frozen=True)
class _Values:
    """The layer that makes the values, how many of its last rows they are, and the width of a head."""

    layer: str
    rows: int
    width: int


def _heads(attention: nn.Module, model: PreTrainedModel) -> _Values | None:
    """None where queries, keys and values are not made in the common way, from the stream: the values then stay."""
    config = model.config
    layers = dict(attention.named_children())
    width = vars(attention).get("head_dim")
    if not isinstance(width, int) or "o_proj" not in layers:
        return None
    mixed, rows = config.num_attention_heads * width, config.num_key_value_heads * width
    shapes = {name: models.weight_of(layer).shape[0] for name, layer in layers.items() if name in READERS["self_attn"]}
    if models.weight_of(layers["o_proj"]).shape[1] != mixed:
        return None
    if shapes == {"q_proj": mixed, "k_proj": rows, "v_proj": rows}:
        return _Values("v_proj", rows, width)
    return _Values("qkv_proj", rows, width) if shapes == {"qkv_proj": mixed + 2 * rows} else None


def _gain(norm: nn.Module, name: str, model: PreTrainedModel) -> tuple[Float64[Tensor, "K"], float]:
    """What an RMS norm multiplies by, and the weight that would make this 1; both seen from what it does to some rows."""
    parameters = dict(norm.named_parameters())
    if set(parameters) == {"weight"}:
        weight = parameters["weight"].detach().double()
        x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)) + 1
        unit = x / x.square().mean(-1, keepdim=True).sqrt()
        with torch.no_grad():
            y = copy.deepcopy(norm).float()(x).double()
        for neutral in (1.0, 0.0):
            gain = weight + (1 - neutral)
            if torch.allclose(y, unit * gain, rtol=NORM_ERROR, atol=NORM_ERROR * gain.abs().max().item()):
                return gain, neutral
    raise _refused(model, f"{name} is no RMS norm, and rotations commute with no other")


def _refused(model: PreTrainedModel, why: str, instead: str = "Leave out --rotate.") -> CompressError:
    return CompressError(f"{type(model).__name__} cannot be rotated: {why}. {instead}")
