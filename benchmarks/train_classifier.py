"""Train a small BERT that tells from 48 tokens of source code which package of the standard library they are from.

    python -m benchmarks.train_classifier --out FOLDER

Takes a few minutes on two cores. Every CPython carries the text; one piece in ten, chosen by a hash, is held out.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import json
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PACKAGES = (
    "asyncio", "email", "tkinter", "xml", "multiprocessing", "unittest", "importlib", "http", "logging", "urllib",
    "_pydecimal.py", "turtle.py",
)  # fmt: skip
LINES, LENGTH = 8, 48  # of a piece: lines of text, and tokens that the model sees
HELD_OUT_ONE_IN = 10
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
CONFIG = dict(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    type_vocab_size=1,
    num_labels=len(PACKAGES),
)


@dataclass(frozen=True)
class Examples:
    """Pieces of text as a model takes them, padded, and the number of the package that each is from."""

    ids: Int64[Tensor, "n T"]
    mask: Int64[Tensor, "n T"]
    labels: Int64[Tensor, "n"]

    def __getitem__(self, at: slice | Tensor) -> dict[str, Tensor]:
        return {"input_ids": self.ids[at], "attention_mask": self.mask[at], "labels": self.labels[at]}

    def __len__(self) -> int:
        return len(self.ids)


def pieces(split: Literal["train", "eval"]) -> Iterator[tuple[str, int]]:
    """Runs of a few lines of source, with their package's number; the same on the same Python."""
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for label, package in enumerate(PACKAGES):
        path = root / package
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*.py") if "test" not in f.parts)
        for file in files:
            lines = file.read_text(encoding="utf-8").splitlines()
            for start in range(0, len(lines), LINES):
                text = "\n".join(lines[start : start + LINES]).strip()
                digest = zlib.crc32(text.encode())
                if len(text) >= 80 and digest not in seen and (digest % HELD_OUT_ONE_IN == 0) == (split == "eval"):
                    seen.add(digest)
                    yield text, label


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **names)


def examples(tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"]) -> Examples:
    texts, labels = zip(*pieces(split), strict=True)
    found = tokenizer(list(texts), truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return Examples(found["input_ids"], found["attention_mask"], torch.tensor(labels))


@torch.inference_mode()
def accuracy(model: PreTrainedModel, data: Examples) -> float:
    """The fraction of the examples that a model in evaluation mode puts into the right package."""
    right = 0
    for start in range(0, len(data), 256):
        batch = data[start : start + 256]
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(data)


def train(out: Path, *, epochs: int = 8, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> dict[str, float]:
    """Save a trained model and its tokenizer to `out`; its accuracies and the seconds it took."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([text for text, _ in pieces("train")])
    data, held_out = examples(tokenizer, "train"), examples(tokenizer, "eval")
    model = BertForSequenceClassification(BertConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start, order = time.time(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(data))
        taken, order = order[:batch], order[batch:]
        optimizer.zero_grad(set_to_none=True)
        loss = model(**data[taken]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    measured = {"train": accuracy(model, data), "held out": accuracy(model, held_out)}
    return {**measured, "examples": len(data), "held-out examples": len(held_out), "seconds": time.time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(train(args.out, seed=args.seed)))


if __name__ == "__main__":
    main()
