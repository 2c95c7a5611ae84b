"""Quantize with this package as the peers' scripts do with theirs: imports not counted, several jobs in one process.

    python -m benchmarks.ours MODEL JOBS.json

JOBS.json is that of `benchmarks.peer`; a job's method is rtn or an effort.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import time
from typing import Any

from benchmarks.peer import Job, answer, rows
from compress import api


def quantize(model: str, job: Job) -> float:
    """Seconds from loading the model to its quantized copy on disk, imports not counted."""
    start = time.perf_counter()
    tokens = rows(job)
    drawn = {"calib": job.calib, "samples": len(tokens), "seq_len": len(tokens[0])}
    how: dict[str, Any] = {"method": "rtn"} if job.method == "rtn" else {"effort": job.method, **drawn}
    api.quantize(model, out=job.out, bits=job.bits, group_size=job.group_size, **how)
    return time.perf_counter() - start


if __name__ == "__main__":
    answer(quantize)
