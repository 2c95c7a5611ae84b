"""Quantize or prune with llm-compressor. Runs in an environment of its own, where neither this package nor its dependencies are.

    PYTHON -m benchmarks.peer MODEL JOBS.json

JOBS.json is a list of objects with the keys of `Job`; the last line of output is a JSON list of seconds, one per job.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One checkpoint: `method` is gptq, rtn, sparsegpt or wanda, `observer` one of llm-compressor's or None for its default.

    A pruner takes `sparsity` and `mask`, "0:0" or zeros of every M weights, instead of bits and groups. `calib` is a .jsonl
    file of `input_ids` rows of one length, `batch` how many of them run at once. Other solving scripts have other methods.
    """

    method: str
    bits: int
    group_size: int
    observer: str | None
    calib: str
    batch: int
    out: str
    sparsity: float = 0.0
    mask: str = "0:0"


def prune(model: str, job: Job) -> float:
    """Seconds from loading the model to its pruned copy on disk, imports not counted."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    pruner = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.method]
    targets = [r"re:model\.layers\.\d+$"]
    oneshot(model=loaded, recipe=pruner(sparsity=job.sparsity, mask_structure=job.mask, targets=targets), **_data(job))
    loaded.save_pretrained(job.out)
    return time.perf_counter() - start


def rows(job: Job) -> list[list[int]]:
    """The calibration tokens."""
    return [json.loads(line)["input_ids"] for line in Path(job.calib).read_text(encoding="utf-8").splitlines()]


def _data(job: Job) -> dict[str, Any]:
    from datasets import Dataset

    tokens = rows(job)
    return {
        "dataset": Dataset.from_dict({"input_ids": tokens}),
        "num_calibration_samples": len(tokens),
        "max_seq_length": len(tokens[0]),
        "batch_size": job.batch,
        "shuffle_calibration_samples": False,
    }


def quantize(model: str, job: Job) -> float:
    """Seconds from loading the model to its compressed copy on disk, imports not counted."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    weights = {"num_bits": job.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group_size}
    if job.observer is not None:
        weights["observer"] = job.observer
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if job.method == "gptq":
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], block_size=128, dampening_frac=0.01, actorder="static")
        oneshot(model=loaded, recipe=recipe, **_data(job))
    else:
        oneshot(model=loaded, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    loaded.save_pretrained(job.out, save_compressed=True, quantization_format="pack-quantized")
    return time.perf_counter() - start


def answer(solve: Callable[[str, Job], float]) -> None:
    """The command line of a solving script: solve all jobs, and print the seconds that each took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("jobs", type=Path)
    args = parser.parse_args()
    jobs = [Job(**job) for job in json.loads(args.jobs.read_text(encoding="utf-8"))]
    print(json.dumps([solve(args.model, job) for job in jobs]))


if __name__ == "__main__":
    answer(lambda model, job: (prune if job.sparsity else quantize)(model, job))
