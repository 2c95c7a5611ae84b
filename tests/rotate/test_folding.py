"""Folding keeps the function of every decoder that it takes, and refuses the others with the reason."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers as T  # noqa: N812
from torch import nn

from compress import experts, models
from compress.errors import CompressError
from compress.rotate.folding import Change, folds
from tests import tiny

SMALL = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=tiny.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
MOE = dict(moe_intermediate_size=32, num_experts_per_tok=2)
LATENT = dict(
    q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=2,
    topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
MORE = {
    "llama with biases": (T.LlamaForCausalLM, T.LlamaConfig(**SMALL, head_dim=24, attention_bias=True, mlp_bias=True)),
    "gemma": (T.GemmaForCausalLM, T.GemmaConfig(**SMALL, head_dim=16)),
    "granite": (T.GraniteForCausalLM, T.GraniteConfig(**SMALL, embedding_multiplier=3.0, residual_multiplier=0.5)),
    "glm": (T.GlmForCausalLM, T.GlmConfig(**SMALL, head_dim=16)),
    "qwen2_moe": (
        T.Qwen2MoeForCausalLM,
        T.Qwen2MoeConfig(**SMALL, **MOE, shared_expert_intermediate_size=48, num_experts=4),
    ),
    "deepseek_v3": (
        T.DeepseekV3ForCausalLM,
        T.DeepseekV3Config(**(SMALL | {"num_key_value_heads": 4}), **MOE, **LATENT),
    ),
}
SMALL_FAMILIES = tiny.FAMILIES | MORE
DENSE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "llama with biases", "gemma", "granite", "glm"]
SPARSE = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"]
REFUSED = {
    "gemma3": "post_feedforward_layernorm",
    "olmo2": "post_feedforward_layernorm",
    "gpt_oss": "sinks",
    "tied": "its output layer is its embedding",
    "without a head": "output layer",
} | dict.fromkeys(("opt", "gpt2", "gpt_neox", "bloom", "bert", "vit"), "layer norms")
UNFIT = {
    "olmo2": (T.Olmo2ForCausalLM, T.Olmo2Config(**SMALL)),
    "gpt_oss": (T.GptOssForCausalLM, T.GptOssConfig(**SMALL, head_dim=16, num_local_experts=4)),
    "tied": (T.LlamaForCausalLM, T.LlamaConfig(**(SMALL | {"tie_word_embeddings": True}))),
    "without a head": (T.LlamaModel, T.LlamaConfig(**SMALL)),
}


def build(family: str, dtype: torch.dtype) -> T.PreTrainedModel:
    """A random model whose norms and biases are random, too, with its experts split."""
    torch.manual_seed(0)
    cls, config = (SMALL_FAMILIES | UNFIT)[family]
    model = cls(config).to(dtype).eval()
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=dtype)
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    experts.split(model, every=True)
    return model


def logits(model: T.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs("llama", samples=2)).logits


def fold(model: T.PreTrainedModel, seed: int = 0) -> None:
    apply(model, folds(model, models.anatomy(model).blocks, seed))


def apply(model: T.PreTrainedModel, changes: Mapping[str, Change]) -> None:
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(change(parameter))


def exact_norms(model: T.PreTrainedModel) -> None:
    """RMS norms in the dtype of their input; those of transformers compute in float32."""

    def forward(module: nn.Module, x: torch.Tensor, offset: float) -> torch.Tensor:
        eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (module.weight + offset)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            offset = 1.0 if type(module).__name__ == "GemmaRMSNorm" else 0.0
            module.forward = lambda x, module=module, offset=offset: forward(module, x, offset)


@pytest.mark.parametrize("family", DENSE)
def test_in_float64_the_logits_are_the_same(family):
    model = build(family, torch.float64)
    changes = folds(model, models.anatomy(model).blocks, 0)
    exact_norms(model)
    before = logits(model)
    apply(model, changes)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", DENSE + SPARSE)
def test_in_float32_too_as_far_as_that_goes(family):
    model = build(family, torch.float32)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    fold(model)
    assert before.std() > 0.3
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5)
    stream = [name for name, p in model.named_parameters() if p.ndim == 2 and p.shape[1] == model.config.hidden_size]
    assert all(not torch.allclose(model.get_parameter(name), weights[name], atol=1e-2) for name in stream)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_norms_are_left_without_an_effect_and_values_turn(family):
    model = build(family, torch.float32)
    values = model.get_parameter("model.layers.0.self_attn.v_proj.weight").clone()
    fold(model)
    for name, parameter in model.named_parameters():
        assert "norm" not in name or (parameter == (0 if family == "gemma" else 1)).all()
    turned = model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    assert not torch.allclose((turned @ turned.t()).diagonal(), (values @ values.t()).diagonal(), rtol=0.1)


def test_a_seed_draws_the_rotation():
    first, again, other = (build("llama", torch.float32) for _ in range(3))
    fold(first)
    fold(again)
    fold(other, seed=1)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_tied_embeddings_can_stay_where_the_last_norm_is_constant():
    model = build("tied", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.7)
    before = logits(model)
    fold(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.norm.weight == 1.7).all()


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason(family):
    model = build(family, torch.float32)
    with pytest.raises(CompressError, match=f"cannot be rotated: .*{REFUSED[family]}"):
        folds(model, models.anatomy(model).blocks, 0)


def test_a_norm_that_is_called_one_but_is_none_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model = tiny.build("llama")
    model.model.layers[1].input_layernorm = Odd()
    with pytest.raises(CompressError, match=r"layers\.1\.input_layernorm is no RMS norm"):
        folds(model, models.anatomy(model).blocks, 0)
