"""Held-out perplexity of the pruned reference model, against llm-compressor on the same calibration tokens.

    python benchmarks/pruning.py --peer-python PYTHON

Both sides prune the same float32 copy of the model to dense checkpoints, and the same code judges them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compress
from benchmarks import record, workload
from benchmarks.peer import Job
from benchmarks.quality import KL, PERPLEXITY, SAMPLES, SEQ_LEN, float32_copy
from benchmarks.record import Measurement
from compress import evaluate, models
from compress.calib import data
from compress.evaluate import Comparison
from compress.spec import Sparsity

SPARSITIES = [Sparsity(0.5), Sparsity(0.6), Sparsity(0.7), Sparsity(0.5, "2:4")]
OURS = {  # name: (method, refit)
    "compress ALPS, refitted": ("alps", True),
    "compress SparseGPT": ("sparsegpt", False),
    "compress SparseGPT, refitted": ("sparsegpt", True),
    "compress Wanda": ("wanda", False),
    "compress Wanda, refitted": ("wanda", True),
    "compress magnitude": ("magnitude", False),
    "compress magnitude, refitted": ("magnitude", True),
}
PEERS = {"llm-compressor SparseGPT": "sparsegpt", "llm-compressor Wanda": "wanda"}


def measure(model: Path, peer_python: str | None, seeds: int) -> list[Measurement]:
    """Perplexity, and KL to the dense model, over the whole held-out text; medians over `seeds` draws of calibration text."""
    found: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with workload.folder() as scratch:
        base = float32_copy(model, scratch / "base")
        tokenizer = models.tokenizer(base)
        held_out = data.held_out_text(None, tokenizer, seq_len=SEQ_LEN).inputs["input_ids"]
        dense = models.load(base)
        found["dense", record.ALL].append(evaluate.compare(dense, dense, held_out))
        for seed in range(seeds):
            drawn = data.text(None, tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs["input_ids"]
            calib = workload.write_tokens(scratch / f"calibration-{seed}.jsonl", drawn)
            runs = [*_ours(base, calib, scratch, seed), *(_peers(base, calib, scratch, seed, peer_python) if peer_python else ())]
            for subject, sparsity, folder, took in runs:
                found[subject, str(sparsity)].append(evaluate.compare(models.load(folder), dense, held_out))
                seconds[subject, str(sparsity)].append(took)
                last = found[subject, str(sparsity)][-1]
                shown = f"{last.perplexity:.3f}, KL {last.kl:.4f}, {took:.0f} s"
                print(f"{subject:30} {sparsity!s:18} seed {seed}: {shown}", flush=True)
    return [
        *(Measurement.of(*key, PERPLEXITY, "", [one.perplexity for one in each]) for key, each in found.items()),
        *(Measurement.of(*key, KL, "nats/token", [one.kl for one in each]) for key, each in found.items()),
        *(Measurement.of(*key, "time in the process", "s", each) for key, each in seconds.items()),
    ]


def _ours(base: Path, calib: Path, scratch: Path, seed: int) -> Iterator[tuple[str, Sparsity, Path, float]]:
    for number, (name, (method, refit)) in enumerate(OURS.items()):
        for sparsity in SPARSITIES:
            out = scratch / f"ours-{number}-{sparsity.fraction}-{sparsity.pattern.replace(':', '')}-{seed}"
            asked = {"sparsity": sparsity.fraction, "pattern": sparsity.pattern, "method": method, "refit": refit}
            report = compress.prune(base, out=out, calib=calib, samples=SAMPLES, seq_len=SEQ_LEN, **asked)
            yield name, sparsity, out, report.seconds


def _peers(base: Path, calib: Path, scratch: Path, seed: int, python: str) -> Iterator[tuple[str, Sparsity, Path, float]]:
    jobs = {}
    for name, method in PEERS.items():
        for number, sparsity in enumerate(SPARSITIES):
            mask = "0:0" if sparsity.nm is None else f"{sparsity.nm[1] - sparsity.nm[0]}:{sparsity.nm[1]}"
            out = str(scratch / f"peer-{method}-{number}-{seed}")
            jobs[name, sparsity] = Job(method, 0, 0, None, str(calib), 8, out, sparsity.fraction, mask)
    process = workload.run(workload.peers(python, base, list(jobs.values()), scratch))
    took = workload.last_line(process)
    for ((name, sparsity), job), each in zip(jobs.items(), took, strict=True):
        yield name, sparsity, Path(job.out), each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python")
    parser.add_argument("--model", type=Path, default=models.REFERENCE)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    measured = measure(args.model, args.peer_python, args.seeds)
    record.append("pruning", measured, workload.peer_versions(args.peer_python) if args.peer_python else "")


if __name__ == "__main__":
    main()
