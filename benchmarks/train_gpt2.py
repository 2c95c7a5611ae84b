"""Train a GPT-2 of a million weights on the reference model's text, with its tokenizer: a second architecture for the proxies.

    python -m benchmarks.train_gpt2 --out FOLDER

About five minutes on two idle cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.train_reference import CONTEXT, encode, held_out_loss
from benchmarks.train_small import learn
from compress import models
from compress.calib import corpus

CONFIG = dict(
    vocab_size=1024,
    n_embd=128,
    n_layer=4,
    n_head=4,
    n_positions=CONTEXT,
    resid_pdrop=0.05,
    embd_pdrop=0.05,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)


def train(out: Path, *, steps: int = 1200, batch: int = 16, lr: float = 3e-3, seed: int = 0) -> float:
    """Write the model and its tokenizer to a folder; returns the mean loss of held-out text in nats."""
    torch.manual_seed(seed)
    tokenizer = models.tokenizer(models.REFERENCE)
    stream, held_out = (encode(tokenizer, list(corpus.documents(part))) for part in ("train", "eval"))
    model = GPT2LMHeadModel(GPT2Config(**CONFIG)).train()
    learn(model, stream, steps=steps, batch=batch, lr=lr, name="GPT-2", bfloat16=False)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return held_out_loss(model, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    print(f"held-out loss {train(args.out, steps=args.steps):.3f}")


if __name__ == "__main__":
    main()
