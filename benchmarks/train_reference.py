"""Train the small Llama that ships with the package, from text that every CPython carries.

    python -m benchmarks.train_reference --out compress/reference_llama

Takes about half an hour on two idle cores and ends at a held-out perplexity of 12.7. The text is `compress.calib.corpus`; a
tenth of its documents is never trained on.
The shipped weights were made with CPython 3.11.7 and torch 2.13.0; another version gives a slightly different model.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.calib import corpus

CONTEXT = 256
CONFIG = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)
END = "<|end|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONFIG["max_position_embeddings"]
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of token ids, each followed by the end token."""
    return torch.tensor([i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), 0]])


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Drop residual branches while training: a million tokens are few, and Llama itself only drops attention weights."""

    def drop(module: torch.nn.Module, _args: object, output: object) -> object:
        if not module.training:
            return output
        first = output[0] if isinstance(output, tuple) else output
        first = torch.nn.functional.dropout(first, p)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, windows: int = 64) -> float:
    model.eval()
    ids = stream[: min(windows, len(stream) // CONTEXT) * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in ids.split(16)]
    model.train()
    return sum(losses) / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_texts, eval_texts = list(corpus.documents("train")), list(corpus.documents("eval"))
    tokenizer = train_tokenizer(train_texts)
    train, held_out = encode(tokenizer, train_texts), encode(tokenizer, eval_texts)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    add_dropout(model, args.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} tokens, {len(held_out):,} held out")

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    start = time.time()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * cosine)
        at = torch.randint(len(train) - CONTEXT, (args.batch,))
        ids = torch.stack([train[i : i + CONTEXT] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == 9:
            spent = time.time() - start
            print(
                f"step {step + 1} loss {loss.item():.3f} held out {held_out_loss(model, held_out):.3f} {spent:.0f} s", flush=True
            )

    final = held_out_loss(model, held_out, windows=len(held_out))
    model.eval().half()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"held_out_loss": final, "perplexity": math.exp(final), "seconds": time.time() - start}))


if __name__ == "__main__":
    main()
