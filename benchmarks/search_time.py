"""Seconds of a whole search by default options beside one plain 4-bit run, with the same calibration tokens.

    python -m benchmarks.search_time [--layers 12] [--append]

A Llama of random bfloat16 weights: 24 layers or as asked, hidden size 1024, 64 x 512 tokens. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks import record, workload
from benchmarks.record import Measurement

SAMPLES, SEQ_LEN, VOCABULARY, LAYERS = 64, 512, 32000, 24
JUDGED = 32  # further samples that the search judges plans on
MIB = 1 << 20


def search(model: Path, calib: Path, out: Path, folder: Path) -> list[str]:
    """The command line of a search as a user would type it, with a library of its own."""
    options = ["--avg-bits", "3.5", "--calib", calib, "--samples", SAMPLES, "--seq-len", SEQ_LEN, "-o", out, "--library", folder]
    return [sys.executable, "-m", "compress", "search", str(model), *map(str, options)]


def measure(runs: int, layers: int) -> list[Measurement]:
    """Both in turn, each in a process of its own."""
    setting = f"{layers} layers, hidden 1024, {SAMPLES} x {SEQ_LEN} tokens"
    seconds: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    with workload.folder() as scratch:
        model = workload.random_llama(
            scratch / "model", hidden=1024, intermediate=2816, layers=layers, heads=16, vocabulary=VOCABULARY
        )
        calib = workload.random_tokens(scratch / "tokens.jsonl", samples=SAMPLES + JUDGED, seq_len=SEQ_LEN, vocabulary=VOCABULARY)
        for run in range(runs):
            for subject, command in {
                "quantize --bits 4": workload.quantize(model, calib, scratch / f"q-{run}", samples=SAMPLES, seq_len=SEQ_LEN),
                "search --avg-bits 3.5": search(model, calib, scratch / f"{run}.json", scratch / f"library-{run}"),
            }.items():
                process = workload.run(command)
                seconds[subject].append(process.seconds)
                memory[subject].append(process.anonymous / MIB)
                print(f"run {run} {subject}: {process.seconds:.1f} s, {process.anonymous / MIB:.0f} MiB", flush=True)
    plain, searched = seconds.values()
    return [
        *(Measurement.of(subject, setting, "wall time", "s", values) for subject, values in seconds.items()),
        *(Measurement.of(subject, setting, "peak anonymous memory", "MiB", values) for subject, values in memory.items()),
        Measurement.of(
            "search --avg-bits 3.5", setting, "time / plain run's", "x", [s / p for s, p in zip(searched, plain, strict=True)]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    measured = measure(args.runs, args.layers)
    if args.append:
        record.append("search time", measured)


if __name__ == "__main__":
    main()
