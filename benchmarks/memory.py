"""Peak anonymous memory of a 4-bit quantization for 8 and for 32 layers of one width: it should not grow with depth.

    python -m benchmarks.memory [--peer-python PYTHON]

Weights are memory-mapped, so anonymous memory (RssAnon) is what a run needs for itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse

from benchmarks import record, workload
from benchmarks.peer import Job
from benchmarks.record import Measurement

DEPTHS = (8, 32)
HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 1024, 2816, 16, 8000
SAMPLES, SEQ_LEN = 16, 256
MIB = 1 << 20


def measure(peer_python: str | None, depths: tuple[int, ...] = DEPTHS) -> list[Measurement]:
    """Peak RssAnon by depth; one run each, since memory hardly varies."""
    found = []
    for layers in depths:
        with workload.folder() as scratch:
            model = workload.random_llama(
                scratch / "model", hidden=HIDDEN, intermediate=INTERMEDIATE, layers=layers, heads=HEADS, vocabulary=VOCABULARY
            )
            calib = workload.random_tokens(scratch / "tokens.jsonl", samples=SAMPLES, seq_len=SEQ_LEN, vocabulary=VOCABULARY)
            commands = {"compress": workload.quantize(model, calib, scratch / "ours", samples=SAMPLES, seq_len=SEQ_LEN)}
            if peer_python:
                job = Job("gptq", 4, 128, None, str(calib), 8, str(scratch / "peer"))
                commands["llm-compressor"] = workload.peers(peer_python, model, [job], scratch)
            for subject, command in commands.items():
                peak = workload.run(command).anonymous / MIB
                found.append(Measurement(subject, f"{layers} layers, hidden {HIDDEN}", "peak anonymous memory", peak, "MiB"))
                print(f"{layers} layers, {subject}: {peak:.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python")
    args = parser.parse_args()
    peer = workload.peer_versions(args.peer_python) if args.peer_python else ""
    record.append("memory", measure(args.peer_python), peer)


if __name__ == "__main__":
    main()
