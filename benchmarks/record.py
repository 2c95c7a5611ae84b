"""One CSV for every measurement: rows are only ever appended, each with what it takes to judge and repeat it."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results.csv"
PACKAGES = ("torch", "transformers")
ALL = "all"  # the setting of a number that holds for every setting
SOURCES = ("compress", "kernels", "calib", "cli", "benchmarks")


Average = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Measurement:
    """A number: the median, or another average, over `runs` and, as `spread`, the largest minus the smallest of them."""

    subject: str
    setting: str
    metric: str
    value: float
    unit: str
    spread: float = 0.0
    runs: int = 1

    @staticmethod
    def of(
        subject: str, setting: str, metric: str, unit: str, values: Sequence[float], average: Average = statistics.median
    ) -> Measurement:
        spread = max(values) - min(values)
        return Measurement(subject, setting, metric, average(values), unit, spread, len(values))


@dataclass(frozen=True)
class Row:
    """A line of results.csv, as text. A `commit` that ends in + had uncommitted changes."""

    commit: str
    date: str
    benchmark: str
    subject: str
    setting: str
    metric: str
    value: str
    unit: str
    spread: str
    runs: str
    hardware: str
    versions: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.benchmark, self.subject, self.setting, self.metric


COLUMNS = tuple(field.name for field in fields(Row))


def append(
    benchmark: str, measurements: Iterable[Measurement], peer: str = "", results: Path = RESULTS, accelerator: str = ""
) -> list[Row]:
    """Add measurements of this commit, made now on this machine; `peer` are the versions of what else was measured."""
    now, date = commit(), datetime.now(timezone.utc).strftime("%Y-%m-%d")
    where = f"{accelerator}, {hardware()}" if accelerator else hardware()
    used = "; ".join([", ".join(f"{name} {version(name)}" for name in PACKAGES), *([peer] if peer else [])])
    rows = [
        Row(
            now,
            date,
            benchmark,
            m.subject,
            m.setting,
            m.metric,
            _text(m.value),
            m.unit,
            _text(m.spread),
            str(m.runs),
            where,
            used,
        )
        for m in measurements
    ]
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in rows)
    return rows


def read(results: Path = RESULTS) -> list[Row]:
    """All rows, oldest first; raises ValueError for a file with other columns."""
    with results.open(newline="", encoding="utf-8") as stream:
        header, *lines = csv.reader(stream)
    if tuple(header) != COLUMNS:
        raise ValueError(f"{results.name} has the columns {header}; expected {list(COLUMNS)}")
    return [Row(*line) for line in lines]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every (benchmark, subject, setting, metric), in the order in which these first appeared."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        found[row.key] = row
    return list(found.values())


def hardware() -> str:
    """CPU model and the cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The short hash of HEAD, with a + where the measured sources differ from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changes = [line for line in _git("status", "--porcelain", "--", *SOURCES).splitlines() if not line.endswith(RESULTS.name)]
    return head + ("+" if changes else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _text(value: float) -> str:
    return f"{value:.6g}"
