"""Quantize with GPTQModel on the calibration tokens that a job names; run by the Python of an environment that has it.

    PYTHON -m benchmarks.peer_gptqmodel MODEL JOBS.json

JOBS.json is that of `benchmarks.peer`; a job's method is gptq or gptaq, both with GPTQModel's defaults (activation order aware of
groups; a quarter of GPTAQ's correction). All paths are absolute.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default of one on two cores is fewer than it asks for itself

import time
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig

from benchmarks.peer import Job, answer, rows


def quantize(model: str, job: Job) -> float:
    """Seconds from loading the model to its quantized copy on disk, imports not counted."""
    start = time.perf_counter()
    settings = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=True,
        gptaq=GPTAQConfig() if job.method == "gptaq" else None,
        offload_to_disk=False,
    )
    out = Path(job.out).parent
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # where it leaves its logs
    loaded = GPTQModel.load(model, settings, device="cpu", dtype=torch.float32)
    tokens = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows(job)]
    loaded.quantize(tokens, batch_size=job.batch)
    loaded.save(job.out)
    return time.perf_counter() - start


if __name__ == "__main__":
    answer(quantize)
