"""Held-out perplexity of the pruned reference model, against llm-compressor on the same calibration tokens.

    python -m benchmarks.pruning --peer-python PYTHON
    python -m benchmarks.pruning --peer-python PYTHON --cost    time and memory instead, on a machine that does nothing else

Both sides prune the same float32 copy of the model to dense checkpoints, and the same code judges them. The cost is that of whole
processes on a Llama of random bfloat16 weights.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import compress
from benchmarks import record, workload
from benchmarks.judge import KL, SAMPLES, SEQ_LEN, float32_copy
from benchmarks.peer import Job
from benchmarks.record import Measurement
from compress import evaluate, models
from compress.calib import data
from compress.evaluate import Comparison
from compress.spec import Sparsity

PERPLEXITY = "held-out perplexity"
JUDGED = 192  # windows of the held-out text
SPARSITIES = [Sparsity(0.5), Sparsity(0.6), Sparsity(0.7), Sparsity(0.5, "2:4")]
OURS = {  # name: (method, refit, effort)
    "compress default": ("alps", True, "default"),
    "compress ALPS, refitted": ("alps", True, "fast"),
    "compress SparseGPT": ("sparsegpt", False, "fast"),
    "compress SparseGPT, refitted": ("sparsegpt", True, "fast"),
    "compress Wanda": ("wanda", False, "default"),  # nothing is solved
    "compress Wanda, refitted": ("wanda", True, "fast"),
    "compress magnitude, refitted": ("magnitude", True, "fast"),
}
COST_BLOCKS, LINEARS, COST_VOCABULARY = 2, 7, 8000
COST_SETTING = "2 blocks, hidden 1024, 32 x 256 tokens, half zeros"
PEERS = {"llm-compressor SparseGPT": "sparsegpt", "llm-compressor Wanda": "wanda"}


def measure(model: Path, peer_python: str | None, seeds: int, only: Sequence[str] | None = None) -> list[Measurement]:
    """Perplexity, and KL to the dense model, over held-out text; medians over `seeds` draws of calibration text."""
    found: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with workload.folder() as scratch:
        base = float32_copy(model, scratch / "base")
        tokenizer = models.tokenizer(base)
        held_out = data.held_out_text(None, tokenizer, seq_len=SEQ_LEN, samples=JUDGED).inputs["input_ids"]
        dense = models.load(base)
        found["dense", record.ALL].append(evaluate.compare(dense, dense, held_out))
        for seed in range(seeds):
            drawn = data.text(None, tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs["input_ids"]
            calib = workload.write_tokens(scratch / f"calibration-{seed}.jsonl", drawn)
            runs = [
                *_ours(base, calib, scratch, seed, only),
                *(_peers(base, calib, scratch, seed, peer_python) if peer_python else ()),
            ]
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


def cost(peer_python: str) -> list[Measurement]:
    """Wall seconds per linear layer and peak anonymous memory of one run each."""
    found = []
    with workload.folder() as scratch:
        model = workload.random_llama(
            scratch / "model", hidden=1024, intermediate=2816, layers=COST_BLOCKS, heads=16, vocabulary=COST_VOCABULARY
        )
        calib = workload.random_tokens(scratch / "tokens.jsonl", samples=32, seq_len=256, vocabulary=COST_VOCABULARY)
        ours = {
            "compress default": [],
            "compress ALPS, refitted": ["--method", "alps", "--effort", "fast"],
            "compress SparseGPT": ["--method", "sparsegpt", "--no-refit", "--effort", "fast"],
            "compress SparseGPT, refitted": ["--method", "sparsegpt", "--effort", "fast"],
        }
        for number, (subject, flags) in enumerate([*ours.items(), ("llm-compressor SparseGPT", [])]):
            out = scratch / str(number)
            if subject in ours:
                command = [sys.executable, "-m", "compress", "prune", str(model), "--sparsity", "0.5", "--calib", str(calib)]
                command += ["--samples", "32", "--seq-len", "256", "-o", str(out), *flags]
            else:
                command = workload.peers(
                    peer_python, model, [Job("sparsegpt", 0, 0, None, str(calib), 8, str(out), sparsity=0.5)], scratch
                )
            process = workload.run(command)
            seconds, memory = process.seconds / (COST_BLOCKS * LINEARS), process.anonymous / (1 << 20)
            print(f"{subject}: {process.seconds:.0f} s, {memory:.0f} MiB", flush=True)
            found.append(Measurement(subject, COST_SETTING, "wall time per linear layer", seconds, "s"))
            found.append(Measurement(subject, COST_SETTING, "peak anonymous memory", memory, "MiB"))
    return found


def _ours(
    base: Path, calib: Path, scratch: Path, seed: int, only: Sequence[str] | None
) -> Iterator[tuple[str, Sparsity, Path, float]]:
    for number, (name, (method, refit, effort)) in enumerate(OURS.items()):
        if only and name not in only:
            continue
        for sparsity in SPARSITIES:
            out = scratch / f"ours-{number}-{sparsity.fraction}-{sparsity.pattern.replace(':', '')}-{seed}"
            asked = {
                "sparsity": sparsity.fraction,
                "pattern": sparsity.pattern,
                "method": method,
                "refit": refit,
                "effort": effort,
            }
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
    parser.add_argument("--only", nargs="+", help="names of our methods")
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    versions = workload.peer_versions(args.peer_python) if args.peer_python else ""
    if args.cost:
        record.append("pruning cost", cost(args.peer_python), versions)
        return
    record.append("pruning", measure(args.model, args.peer_python, args.seeds, args.only), versions)


if __name__ == "__main__":
    main()
