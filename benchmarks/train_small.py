"""Train small models of other families on the reference model's text, with its tokenizer and from its token embeddings.

    python -m benchmarks.train_small --families opt qwen3 gpt_neox --out FOLDER

Writes FOLDER/<family>. About six minutes each on two idle cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.train_reference import CONTEXT, encode, held_out_loss
from compress import models
from compress.calib import corpus

SIZE: dict[str, Any] = dict(vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0, pad_token_id=None, max_position_embeddings=CONTEXT)
DROPOUT = 0.05


def opt() -> PreTrainedModel:
    """Layer norms, biases everywhere, ReLU and learned positions."""
    return OPTForCausalLM(OPTConfig(**SIZE, **TOKENS, ffn_dim=512, word_embed_proj_dim=SIZE["hidden_size"], dropout=DROPOUT))


def qwen3() -> PreTrainedModel:
    """Norms of queries and keys, grouped queries, tied embeddings."""
    config = Qwen3Config(
        **SIZE,
        **TOKENS,
        intermediate_size=512,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        attention_dropout=DROPOUT,
    )
    return Qwen3ForCausalLM(config)


def gpt_neox() -> PreTrainedModel:
    """Attention and MLP of one input, added to the stream at once."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, **TOKENS, intermediate_size=512, attention_dropout=DROPOUT))


FAMILIES = {"opt": opt, "qwen3": qwen3, "gpt_neox": gpt_neox}


def train(family: str, out: Path, *, steps: int, batch: int, lr: float, seed: int = 0) -> float:
    """Write the model and its tokenizer to a folder; returns the mean loss of held-out text in nats."""
    torch.manual_seed(seed)
    tokenizer: Any = models.tokenizer(models.REFERENCE)
    stream, held_out = (encode(tokenizer, list(corpus.documents(part))) for part in ("train", "eval"))
    model = FAMILIES[family]().train()
    model.get_input_embeddings().weight.data.copy_(models.load(models.REFERENCE).get_input_embeddings().weight)
    learn(model, stream, steps=steps, batch=batch, lr=lr, name=family)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return held_out_loss(model, held_out, windows=len(held_out))


def learn(
    model: PreTrainedModel, stream: torch.Tensor, *, steps: int, batch: int, lr: float, name: str, bfloat16: bool = True
) -> None:
    """Minimise the loss of windows drawn from a stream of tokens; every hundredth step says how it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        at = torch.randint(len(stream) - CONTEXT, (batch,))
        ids = torch.stack([stream[i : i + CONTEXT] for i in at])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == 9:
            print(f"{name}: step {step + 1} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    for family in args.families:
        loss = train(family, args.out / family, steps=args.steps, batch=args.batch, lr=args.lr)
        print(f"{family}: held-out loss {loss:.3f}, perplexity {math.exp(loss):.2f}", flush=True)


if __name__ == "__main__":
    main()
