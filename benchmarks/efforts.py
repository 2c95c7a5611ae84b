"""What every effort loses, beside llm-compressor, GPTQModel and auto-round, on three trained models of different architecture.

    python -m benchmarks.efforts --models FOLDER... --work FOLDER [--seeds 3] [--append]
        --peer-python PYTHON --gptqmodel-python PYTHON --autoround-python PYTHON

All compress the same float32 copy of a model on the same calibration tokens, symmetric and with dense heads, and the same code
judges the results on text that nothing was trained, calibrated or tuned on. Each seed draws its own calibration text. A process
solves all schemes of one method, model and seed; what was measured is kept in the work folder, where an interrupted run finds it
again (ours only at the same commit). --append adds rows to results.csv once everything that was asked for is there.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

import compress
from benchmarks import record, workload
from benchmarks.judge import KL, SAMPLES, SEQ_LEN, Judge, float32_copy
from benchmarks.peer import Job
from benchmarks.record import Average, Measurement
from compress import models
from compress.calib import data
from compress.solvers.options import Effort
from compress.spec import Scheme

SCHEMES = (Scheme(4, 128), Scheme(3, 128), Scheme(2, 32))
LOSS, TIME, MEMORY = "held-out loss increase", "wall time", "peak anonymous memory"
RATIO, KL_RATIO, TIME_RATIO = "loss increase / another's", "KL / another's", "time / another's"
EVERY = "mean of the models"
BATCH, ITERATIONS = 8, 200
MIB = 1 << 20
OURS = "benchmarks.ours"
PREFIX = "compress "
LLM_COMPRESSOR, IMATRIX = "llm-compressor GPTQ", "llm-compressor GPTQ (imatrix_mse)"
GPTAQ, AUTO_ROUND = "GPTQModel GPTAQ", "auto-round"
DEFAULT = "compress default"
COMPARED = (
    *((DEFAULT, other) for other in ("compress fast", LLM_COMPRESSOR, IMATRIX, GPTAQ, AUTO_ROUND)),
    ("compress best", AUTO_ROUND),
)


@dataclass(frozen=True)
class Subject:
    """A method: which script solves with it, under which Python, and what its jobs say."""

    name: str
    script: str
    python: str
    method: str
    observer: str | None = None

    def job(self, scheme: Scheme, calib: Path, out: Path) -> Job:
        return Job(self.method, scheme.bits, scheme.group_size, self.observer, str(calib), BATCH, str(out))


def subjects(peer: str | None, gptqmodel: str | None, autoround: str | None) -> list[Subject]:
    """Our efforts, and the peers whose environments are given."""
    found = [Subject(f"{PREFIX}{how}", OURS, sys.executable, how) for how in ("rtn", *get_args(Effort))]
    if peer:
        found.append(Subject(LLM_COMPRESSOR, workload.PEER, peer, "gptq"))
        found.append(Subject(IMATRIX, workload.PEER, peer, "gptq", "imatrix_mse"))
    if gptqmodel:
        found.append(Subject(GPTAQ, "benchmarks.peer_gptqmodel", gptqmodel, "gptaq"))
    if autoround:
        found.append(Subject(AUTO_ROUND, "benchmarks.peer_autoround", autoround, str(ITERATIONS)))
    return found


class Bench:
    """A model with its judge and calibration texts, and what was measured on it."""

    def __init__(self, model: Path, work: Path) -> None:
        self.name = type(models.load(model)).__name__.removesuffix("ForCausalLM")
        self.work = work / self.name
        self.base = self.work / "base"
        if not self.base.is_dir():
            float32_copy(model, self.base)
        self.tokenizer = models.tokenizer(self.base)
        held_out = data.held_out_text(None, self.tokenizer, seq_len=SEQ_LEN).inputs["input_ids"]
        dense = models.load(self.base)
        self.judge = Judge(dense, held_out)
        self.dense = self.judge(dense).loss
        print(f"{self.name}: held-out loss {self.dense:.4f} over {held_out.numel():,} tokens", flush=True)

    def measured(self, subject: Subject, seed: int) -> dict[str, Any]:
        """Losses, KLs and seconds by scheme, and MiB: from the notes where they are."""
        commit = record.commit() if subject.script == OURS else ""
        note = self.work / f"{subject.name} {commit} {seed}.json"
        if not note.is_file() or commit.endswith("+"):
            note.write_text(json.dumps(self._measure(subject, seed)), encoding="utf-8")
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        for scheme in map(str, SCHEMES):
            shown = f"increase {found[LOSS][scheme]:.5f}, KL {found[KL][scheme]:.5f}, {found[TIME][scheme]:.1f} s"
            print(f"{self.name:6} seed {seed}  {subject.name:36} {scheme:10} {shown}, {found[MEMORY]:.0f} MiB", flush=True)
        return found

    def _measure(self, subject: Subject, seed: int) -> dict[str, Any]:
        drawn = data.text(None, self.tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs["input_ids"]
        calib = workload.write_tokens(self.work / f"calibration-{seed}.jsonl", drawn)
        solved = self.work / "solved"
        shutil.rmtree(solved, ignore_errors=True)
        folders = {str(scheme): solved / str(scheme).replace(" ", "-") for scheme in SCHEMES}
        jobs = [subject.job(scheme, calib, folders[str(scheme)]) for scheme in SCHEMES]
        process = workload.run(workload.peers(subject.python, self.base, jobs, self.work, subject.script))
        judged = {scheme: self.judge(compress.load(folder, "cpu", torch.float32)) for scheme, folder in folders.items()}
        shutil.rmtree(solved)
        return {
            LOSS: {scheme: one.loss - self.dense for scheme, one in judged.items()},
            KL: {scheme: one.kl for scheme, one in judged.items()},
            TIME: dict(zip(folders, workload.last_line(process), strict=True)),
            MEMORY: process.anonymous / MIB,
        }


Found = dict[tuple[str, str, str], list[float]]  # by metric, subject and setting, one value per seed


def measure(folders: Sequence[Path], asked: Sequence[Subject], seeds: int, work: Path) -> Found:
    """All values, the seeds of one model after another."""
    found: Found = {}
    for folder in folders:
        bench = Bench(folder, work)
        for seed in range(seeds):
            for subject in asked:
                if subject.method == "rtn" and seed:
                    continue  # needs no calibration
                values = bench.measured(subject, seed)
                found.setdefault((MEMORY, subject.name, bench.name), []).append(values[MEMORY])
                for metric in (LOSS, KL, TIME):
                    for scheme, value in values[metric].items():
                        found.setdefault((metric, subject.name, f"{bench.name} {scheme}"), []).append(value)
    return found


def measurements(found: Found) -> list[Measurement]:
    """Means over seeds with their ranges, least times, and what ours are over the peers'."""
    units = {LOSS: "nats/token", KL: "nats/token", TIME: "s", MEMORY: "MiB"}
    means = [
        Measurement.of(subject, setting, metric, units[metric], values, _average(metric))
        for (metric, subject, setting), values in found.items()
    ]
    over = {LOSS: RATIO, KL: KL_RATIO, TIME: TIME_RATIO}
    return means + [ratio for metric, name in over.items() for ratio in _ratios(found, name, metric)]


def _average(metric: str) -> Average:
    """How seeds are summed up; of times it is the least, for what else a machine does only adds to them."""
    return min if metric == TIME else statistics.fmean


def _ratios(found: Found, name: str, metric: str) -> Iterator[Measurement]:
    """Ours over theirs, averages over averages, with the range of the seeds' own ratios; and the mean of that over models."""
    settings = {subject: [setting for kind, own, setting in found if (kind, own) == (metric, subject)] for _, subject, _ in found}
    for ours, theirs in [both for both in COMPARED if settings.keys() >= set(both)]:
        pair, by_scheme = f"{ours.removeprefix(PREFIX)} / {theirs}", dict[str, list[float]]()
        for setting in settings[ours]:
            mine, other = found[metric, ours, setting], found[metric, theirs, setting]
            each = [a / b for a, b in zip(mine, other, strict=True)]
            average = _average(metric)
            ratio = average(mine) / average(other)
            by_scheme.setdefault(setting.split(" ", 1)[1], []).append(ratio)
            yield Measurement(pair, setting, name, ratio, "", max(each) - min(each), len(each))
        for scheme, ratios in by_scheme.items():
            yield Measurement(pair, f"{EVERY}, {scheme}", name, statistics.fmean(ratios), "")


def versions(peer: str | None, gptqmodel: str | None, autoround: str | None) -> str:
    """The peers' versions, as far as they were run."""
    asked = {
        peer: workload.PEER_PACKAGES,
        gptqmodel: ("gptqmodel", "torch", "transformers"),
        autoround: ("auto-round", "torch", "transformers"),
    }
    return "; ".join(workload.peer_versions(python, packages) for python, packages in asked.items() if python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", default=[models.REFERENCE])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of subjects")
    parser.add_argument("--peer-python")
    parser.add_argument("--gptqmodel-python")
    parser.add_argument("--autoround-python")
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    pythons = args.peer_python, args.gptqmodel_python, args.autoround_python
    asked = [subject for subject in subjects(*pythons) if args.only is None or subject.name in args.only]
    measured = measurements(measure(args.models, asked, args.seeds, args.work.resolve()))
    if args.append:
        record.append("efforts", measured, versions(*pythons))


if __name__ == "__main__":
    main()
