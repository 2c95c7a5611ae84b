"""Time and memory of a whole 4-bit quantization, from the command to the checkpoint, ours and llm-compressor's in turn.

    python -m benchmarks.end_to_end --peer-python PYTHON

A Llama of random bfloat16 weights: 12 layers, hidden size 1024, 64 x 512 tokens. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
from collections import defaultdict

from benchmarks import record, workload
from benchmarks.peer import Job
from benchmarks.record import Measurement

SAMPLES, SEQ_LEN, VOCABULARY = 64, 512, 32000
SETTING = "12 layers, hidden 1024, 64 x 512 tokens, int4 g128"
MIB = 1 << 20


def measure(peer_python: str, runs: int, batch: int, layers: int = 12) -> list[Measurement]:
    """Seconds and peak anonymous memory, medians over `runs` of each side; `batch` is how many samples the peer runs at once."""
    seconds: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    with workload.folder() as scratch:
        model = workload.random_llama(
            scratch / "model", hidden=1024, intermediate=2816, layers=layers, heads=16, vocabulary=VOCABULARY
        )
        calib = workload.random_tokens(scratch / "tokens.jsonl", samples=SAMPLES, seq_len=SEQ_LEN, vocabulary=VOCABULARY)
        for run in range(runs):
            for subject, command in {
                "compress": workload.quantize(model, calib, scratch / f"ours-{run}", samples=SAMPLES, seq_len=SEQ_LEN),
                "compress --effort fast": workload.quantize(
                    model, calib, scratch / f"fast-{run}", samples=SAMPLES, seq_len=SEQ_LEN, effort="fast"
                ),
                "llm-compressor": workload.peers(
                    peer_python, model, [Job("gptq", 4, 128, None, str(calib), batch, str(scratch / f"peer-{run}"))], scratch
                ),
            }.items():
                process = workload.run(command)
                seconds[subject].append(process.seconds)
                memory[subject].append(process.anonymous / MIB)
                inside = workload.last_line(process)[0] if subject == "llm-compressor" else None
                print(f"run {run} {subject}: {process.seconds:.1f} s ({inside=}), {process.anonymous / MIB:.0f} MiB", flush=True)
    return [
        *(Measurement.of(subject, SETTING, "wall time", "s", values) for subject, values in seconds.items()),
        *(Measurement.of(subject, SETTING, "peak anonymous memory", "MiB", values) for subject, values in memory.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="samples that llm-compressor runs at once")
    args = parser.parse_args()
    measured = measure(args.peer_python, args.runs, args.batch)
    record.append("end to end", measured, workload.peer_versions(args.peer_python))


if __name__ == "__main__":
    main()
