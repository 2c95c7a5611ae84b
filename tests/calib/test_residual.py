from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T  # noqa: N812  (a dozen of its names follow)
from torch import nn

from compress import models
from compress.calib import capture, residual
from compress.calib.residual import Source
from tests import tiny

PRE_NORM = {"self_attn.o_proj": Source("input_layernorm"), "mlp.down_proj": Source("post_attention_layernorm")}
POST_NORM = {"attention.output.dense": Source("attention"), "output.dense": Source("intermediate")}
SOURCES = {
    "llama": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "opt": {"self_attn.out_proj": Source("self_attn_layer_norm"), "fc2": Source("final_layer_norm")},
    "gpt2": {"attn.c_proj": Source("ln_1"), "mlp.c_proj": Source("ln_2")},
    "bert": POST_NORM,
    "mpnet": {"attention.attn.o": Source("attention"), "output.dense": Source("intermediate")},
    "vit": {"attention.o_proj": Source("layernorm_before"), "mlp.fc2": Source("layernorm_after")},
    "mixtral": {"self_attn.o_proj": Source("input_layernorm")},  # the experts' outputs are weighted first
    "gemma3": {},  # the outputs are normalised first
}
SMALL: dict[str, Any] = dict(vocab_size=tiny.VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
AT_ONCE = {  # attention and MLP of one input: the layers that end them, and the norm before both
    "gpt_neox": (*tiny.FAMILIES["gpt_neox"], "attention.dense", "mlp.dense_4h_to_h", "input_layernorm"),
    "falcon": (T.FalconForCausalLM, T.FalconConfig(**SMALL), "self_attention.dense", "mlp.dense_4h_to_h", "input_layernorm"),
    "phi": (T.PhiForCausalLM, T.PhiConfig(**SMALL), "self_attn.dense", "mlp.fc2", "input_layernorm"),
    "cohere": (T.CohereForCausalLM, T.CohereConfig(**SMALL), "self_attn.o_proj", "mlp.down_proj", "input_layernorm"),
    "gptj": (
        T.GPTJForCausalLM,
        T.GPTJConfig(vocab_size=tiny.VOCAB, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
        "attn.out_proj",
        "mlp.fc_out",
        "ln_1",
    ),
}


def found(model: nn.Module, family: str) -> dict[str, Source]:
    anatomy = models.anatomy(model)
    chain = capture.record(model, anatomy.blocks, [tiny.inputs(family)])
    name, block = anatomy.blocks[-1], model.get_submodule(anatomy.blocks[-1])
    layers = [layer.name.removeprefix(f"{name}.") for layer in anatomy.of_block(name)]

    def forward():
        return capture.replay(block, chain.hidden[0], chain.calls[0][-1], torch.device("cpu"), torch.float32)

    return {name: source for name, source in residual.sources(block, layers, forward).items() if source is not None}


@pytest.mark.parametrize("family", SOURCES)
def test_the_residual_stream_is_found(family):
    assert found(tiny.build(family), family) == SOURCES[family]


@pytest.mark.parametrize("family", AT_ONCE)
def test_what_attention_and_mlp_are_added_to_at_once_is_found(family):
    cls, config, attention, mlp, norm = AT_ONCE[family]
    torch.manual_seed(0)
    assert found(cls(config).eval(), family) == {attention: Source(norm), mlp: Source(norm, attention)}


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.norm = scale, nn.LayerNorm(8)
        self.one, self.two, self.late = nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = x + self.scale * self.one(self.norm(x))
        aside = torch.randn_like(x)
        return stream, self.late(self.two(stream) + aside), self.late(aside)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, {"one": Source("norm"), "two": None}), (0.5, {"one": None, "two": None})])
def test_what_is_scaled_on_its_way_or_comes_later_is_none(scale, expected):
    block = Block(scale)
    assert residual.sources(block, ["one", "two"], lambda: block(torch.randn(2, 3, 8))[0]) == expected
