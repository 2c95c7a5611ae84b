"""Quantize with auto-round on the calibration tokens that a job names; run by the Python of an environment that has it.

    PYTHON -m benchmarks.peer_autoround MODEL JOBS.json

JOBS.json is that of `benchmarks.peer`; a job's method is the number of iterations. All tokens are used. What is not named here is
auto-round's default, among it torch.compile, except that it would cast a float32 model to bfloat16 and works in float32 here, as
the others do. The result is saved dense: the same numbers, and no time for packing.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import time

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peer import Job, answer, rows


def quantize(model: str, job: Job) -> float:
    """Seconds from loading the model to its quantized copy on disk, imports not counted."""
    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokens = rows(job)
    rounder = AutoRound(
        loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        bits=job.bits,
        group_size=job.group_size,
        sym=True,
        iters=int(job.method),
        dataset=[torch.tensor([row]) for row in tokens],
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=job.batch,
        amp=False,
        device_map="cpu",
    )
    quantized, _ = rounder.quantize()
    quantized.save_pretrained(job.out)
    return time.perf_counter() - start


if __name__ == "__main__":
    answer(quantize)
