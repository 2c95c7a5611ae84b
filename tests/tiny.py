"""Tiny random models of real transformers classes, saved the way a user would find them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers as T  # noqa: N812  (two dozen of its names follow)
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 128
LLAMA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BERT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
GQA = dict(num_key_value_heads=2)

FAMILIES = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**LLAMA, **GQA, max_position_embeddings=64)),
    "mistral": (T.MistralForCausalLM, T.MistralConfig(**LLAMA, **GQA, sliding_window=8)),
    "qwen2": (T.Qwen2ForCausalLM, T.Qwen2Config(**LLAMA, **GQA)),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config(**LLAMA, **GQA, head_dim=16)),
    "gemma3": (
        T.Gemma3ForCausalLM,
        T.Gemma3TextConfig(**(LLAMA | {"num_hidden_layers": 6}), **GQA, head_dim=16, sliding_window=8),
    ),
    "mixtral": (
        T.MixtralForCausalLM,
        T.MixtralConfig(**LLAMA, **GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen3_moe": (
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig(**LLAMA, **GQA, head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2),
    ),
    "phi3": (T.Phi3ForCausalLM, T.Phi3Config(**LLAMA)),
    "opt": (
        T.OPTForCausalLM,
        T.OPTConfig(
            hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "gpt2": (
        T.GPT2LMHeadModel,
        T.GPT2Config(
            n_embd=64, n_inner=96, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    ),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**LLAMA)),
    "bloom": (T.BloomForCausalLM, T.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB, pad_token_id=0)),
    "bert": (T.BertForSequenceClassification, T.BertConfig(**BERT)),
    "bert_model": (T.BertModel, T.BertConfig(**BERT)),
    "roberta": (T.RobertaForMaskedLM, T.RobertaConfig(**BERT)),
    "distilbert": (T.DistilBertModel, T.DistilBertConfig(dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=VOCAB)),
    "mpnet": (T.MPNetModel, T.MPNetConfig(**BERT)),
    "vit": (
        T.ViTForImageClassification,
        T.ViTConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
        ),
    ),
    "resnet": (
        T.ResNetForImageClassification,
        T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    ),
    "mobilenet": (T.MobileNetV2ForImageClassification, T.MobileNetV2Config(image_size=32, depth_multiplier=0.35)),
}  # fmt: skip
# Not for every test: models within models, one that calibration refuses, and one of which it leaves most layers dense.
SPECIAL = {
    "qwen2_5_vl": (
        T.Qwen2_5_VLForConditionalGeneration,
        T.Qwen2_5_VLConfig(
            text_config=dict(**LLAMA, **GQA, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
            vision_config=dict(
                hidden_size=32, intermediate_size=64, depth=1, num_heads=2, out_hidden_size=64, patch_size=4,
                fullatt_block_indexes=[0],
            ),
            image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
        ),
    ),
    "gemma3_vl": (
        T.Gemma3ForConditionalGeneration,
        T.Gemma3Config(
            text_config=dict(**(LLAMA | {"num_hidden_layers": 6}), **GQA, head_dim=16, sliding_window=8),
            vision_config=dict(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
            ),
            mm_tokens_per_image=4, image_token_index=120, boi_token_index=121, eoi_token_index=122,
        ),
    ),
    "albert": (
        T.AlbertForMaskedLM,
        T.AlbertConfig(
            vocab_size=VOCAB, embedding_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
        ),
    ),
    "mamba": (
        T.MambaForCausalLM,
        T.MambaConfig(
            hidden_size=64, state_size=16, num_hidden_layers=2, vocab_size=VOCAB, time_step_rank=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
    ),
}  # fmt: skip
IMAGE_SIZES = {"vit": 16, "resnet": 32, "mobilenet": 32}
CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "bloom"]


def build(family: str, dtype: torch.dtype = torch.float32) -> T.PreTrainedModel:
    """The model, with weights large enough to matter and batch statistics that keep activations alive."""
    torch.manual_seed(0)
    cls, config = copy.deepcopy((FAMILIES | SPECIAL)[family])  # a test may change what it gets
    model = cls(config)
    if family in ("resnet", "mobilenet"):
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(pixel_values=torch.randn(8, 3, 32, 32))
    return model.to(dtype).eval()


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder with a tokenizer."""
    build(family, dtype).save_pretrained(folder)
    if family not in IMAGE_SIZES:
        tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> T.PreTrainedTokenizerFast:
    """One token for every word w0, w1, ...; anything else is unknown."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def inputs(family: str, samples: int = 16, length: int = 24) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    if size := IMAGE_SIZES.get(family):
        return {"pixel_values": torch.randn(samples, 3, size, size, generator=g)}
    return {"input_ids": torch.randint(4, VOCAB, (samples, length), generator=g)}


def calibration(family: str, path: Path) -> Path:
    """`inputs` as a file that --calib takes."""
    for name, value in inputs(family).items():
        if name == "pixel_values":
            np.savez(path.with_suffix(".npz"), pixel_values=value.numpy())
            return path.with_suffix(".npz")
        path.with_suffix(".jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in value.tolist()))
    return path.with_suffix(".jsonl")
