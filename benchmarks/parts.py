"""What every part of an effort is worth: each left out of the default, or added to it, on three trained models.

    python -m benchmarks.parts --models FOLDER... [--seeds 3]

Judged as in `benchmarks.defaults`, on documents kept from calibration; the held-out text stays unseen. Beside it stand processor
time and by how much the process grows while it solves.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import record
from benchmarks.defaults import JUDGED, Variant, solve, variants, windows
from benchmarks.efforts import SCHEMES
from benchmarks.judge import SAMPLES, Judge
from benchmarks.record import Measurement
from compress import models

DEFAULT = "default"
PARTS = (
    "round to nearest",
    "corrected targets rounded to nearest",
    "effort fast",
    "0 sweeps",
    "target not corrected",
    "residual stream not brought along",
    "products in float32",
    DEFAULT,
    "effort best",
)
LOSS, TIME, MEMORY = "KL / default's", "processor time", "growth while solving"
MIB_KB = 1024


def measure(model: Path, seeds: int) -> list[Measurement]:
    """KL over the default's with the range of the draws' own ratios; time and memory of the three schemes, means over draws."""
    dense = models.load(model).float()
    anatomy, tokenizer = models.anatomy(dense), models.tokenizer(model)
    judge = Judge(dense, windows(tokenizer, True, 0, JUDGED))
    name = type(dense).__name__.removesuffix("ForCausalLM")
    chosen = [variant for part in PARTS for variant in variants() if variant.name == part]
    found: dict[str, list[list[float]]] = defaultdict(list)  # by variant: KLs of the schemes for every seed
    seconds: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    for seed in range(seeds):
        inputs = {"input_ids": windows(tokenizer, False, seed, SAMPLES)}
        for variant in chosen:
            start, before = time.process_time(), _reset()
            solved = [solve(dense, anatomy, variant, scheme, inputs) for scheme in SCHEMES]
            seconds[variant.name].append(time.process_time() - start)
            memory[variant.name].append((_status("VmHWM") - before) / MIB_KB)
            found[variant.name].append([judge(one).kl for one in solved])
            shown = "  ".join(f"{kl:.5f}" for kl in found[variant.name][-1])
            print(f"{name} seed {seed}  {variant.name:36}{shown}  {seconds[variant.name][-1]:.1f} s", flush=True)
    return [
        *(one for variant in chosen for one in _ratios(variant, name, found)),
        *(Measurement.of(part, name, TIME, "s", values, statistics.fmean) for part, values in seconds.items()),
        *(Measurement.of(part, name, MEMORY, "MiB", values, statistics.fmean) for part, values in memory.items()),
    ]


def _ratios(variant: Variant, model: str, found: dict[str, list[list[float]]]) -> list[Measurement]:
    made = []
    for i, scheme in enumerate(SCHEMES):
        own, default = ([one[i] for one in found[name]] for name in (variant.name, DEFAULT))
        each = [a / b for a, b in zip(own, default, strict=True)]
        ratio = statistics.fmean(own) / statistics.fmean(default)
        made.append(Measurement(variant.name, f"{model} {scheme}", LOSS, ratio, "", max(each) - min(each), len(each)))
    return made


def _reset() -> int:
    """Forget the process's peak memory; kB that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", default=[models.REFERENCE])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    record.append("parts", [one for model in args.models for one in measure(model, args.seeds)])


if __name__ == "__main__":
    main()
