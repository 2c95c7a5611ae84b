"""Run every benchmark, append to results.csv and bring the README's tables up to date. Takes an hour on two quiet cores.

    python benchmarks/run.py --peer-python PYTHON

PYTHON is the interpreter of an environment of its own with llm-compressor (pip install llmcompressor). `defaults` is not among
them: it chooses options, and is run by itself when a solver changes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import end_to_end, memory, quality, record, serving, table, workload
from benchmarks.record import Measurement
from compress import models

NAMES = ("quality", "end to end", "memory", "serving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    peer = workload.peer_versions(args.peer_python)
    measures = {
        "quality": lambda: quality.measure(models.REFERENCE, args.peer_python, seeds=5),
        "end to end": lambda: end_to_end.measure(args.peer_python, runs=3, batch=8),
        "memory": lambda: memory.measure(args.peer_python),
        "serving": lambda: [Measurement(**row) for row in serving.measure()],
    }
    for name in args.only:
        record.append(name, measures[name](), "" if name == "serving" else peer)
    table.write()


if __name__ == "__main__":
    main()
