"""Run every benchmark, append to results.csv and bring the README's tables up to date. Takes two hours on two idle cores.

    python -m benchmarks.run --peer-python PYTHON

PYTHON is the interpreter of an environment of its own with llm-compressor (pip install llmcompressor). `defaults` and `efforts`
are not among them: one chooses options, the other needs environments of more peers and trained models, and takes over an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    peer = ["--peer-python", parser.parse_args().peer_python]
    for command in (
        ["benchmarks.serving", "--append"],
        ["benchmarks.solver", "--append"],
        ["benchmarks.end_to_end", *peer],
        ["benchmarks.memory", *peer],
        ["benchmarks.pruning", *peer],
        ["benchmarks.pruning", *peer, "--cost"],
        ["benchmarks.classifier", "--append"],
        ["benchmarks.table"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
