from __future__ import annotations

import pytest
import torch
from torch import nn

from compress import models
from compress.calib import capture, residual
from tests import tiny

PRE_NORM = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
POST_NORM = {"attention.output.dense": "attention", "output.dense": "intermediate"}
SOURCES = {
    "llama": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "bert": POST_NORM,
    "mpnet": {"attention.attn.o": "attention", "output.dense": "intermediate"},
    "vit": {"attention.o_proj": "layernorm_before", "mlp.fc2": "layernorm_after"},
    "mixtral": {"self_attn.o_proj": "input_layernorm"},  # the experts' outputs are weighted first
    "gemma3": {},  # the outputs are normalised first
    "gpt_neox": {},  # three tensors are added up
}


@pytest.mark.parametrize("family", SOURCES)
def test_the_residual_stream_is_found(family):
    model, inputs = tiny.build(family), tiny.inputs(family)
    anatomy = models.anatomy(model)
    chain = capture.record(model, anatomy.blocks, [inputs])
    name, block = anatomy.blocks[-1], model.get_submodule(anatomy.blocks[-1])
    layers = [layer.name.removeprefix(f"{name}.") for layer in anatomy.of_block(name)]

    def forward():
        return capture.replay(block, chain.hidden[0], chain.calls[0][-1], torch.device("cpu"), torch.float32)

    assert residual.sources(block, layers, forward) == SOURCES[family]


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.norm = scale, nn.LayerNorm(8)
        self.one, self.two, self.late = nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = x + self.scale * self.one(self.norm(x))
        aside = torch.randn_like(x)
        return stream, self.late(self.two(stream) + aside), self.late(aside)


@pytest.mark.parametrize(("scale", "found"), [(1.0, {"one": "norm"}), (0.5, {})])
def test_what_is_scaled_on_its_way_or_comes_later_is_none(scale, found):
    block = Block(scale)
    assert residual.sources(block, ["one", "two"], lambda: block(torch.randn(2, 3, 8))[0]) == found
