"""What the grids lose on the reference model, at the bits per weight that they really take.

    python -m benchmarks.grids

KL(dense || compressed) per token over held-out text, rounded to nearest and by the default effort. Bits per weight are
those of the quantized layers alone, with their scales in 16 bits where a grid does not say otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import Measurement
from compress import evaluate, models, qtensor, sequential
from compress.calib import data
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import Plan, Scheme

SAMPLES, JUDGED, SEQ_LEN, SCALE_BITS = 128, 128, 256, 16
SCHEMES = [
    *(Scheme(8, -1), Scheme.of("fp8")),
    *(Scheme(4, 128), Scheme(4, 32), Scheme(4, 16), Scheme.of("mxfp4"), Scheme.of("nvfp4")),
    *(Scheme(2, 128), Scheme.of("ternary")),
]
METHODS = {"RTN": "rtn", "default effort": "gptq"}


def measure(model: Path, seeds: int) -> list[Measurement]:
    """KL to the dense model and bits per weight of every grid; medians over `seeds` draws of calibration text."""
    dense = models.load(model).float()
    anatomy = models.anatomy(dense)
    tokenizer = models.tokenizer(model)
    held_out = data.held_out_text(None, tokenizer, seq_len=SEQ_LEN, samples=JUDGED).inputs["input_ids"]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(seeds):
        inputs = data.text(None, tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs
        for (subject, method), scheme in ((pair, scheme) for pair in METHODS.items() for scheme in SCHEMES):
            if method == "rtn" and seed:
                continue  # needs no calibration
            settings = Settings(method, "alps", Options.of("default"), torch.device("cpu"), torch.float32, torch.float16)
            plan, solved = Plan.uniform(anatomy.in_features, scheme), copy.deepcopy(dense)
            with torch.no_grad():
                for block in sequential.run(dense, anatomy, plan, None if method == "rtn" else inputs, settings):
                    for one in block.layers:
                        solved.get_submodule(one.layer.name).get_parameter("weight").copy_(qtensor.dense(one.solved))
            found[subject, str(scheme)].append(evaluate.compare(solved, dense, held_out).kl)
            print(f"{subject:16}{scheme!s:14} seed {seed}: KL {found[subject, str(scheme)][-1]:.6f}", flush=True)
    weights = sum(layer.N * layer.K for layer in anatomy.layers)
    bits = {
        str(scheme): sum(
            fits.stored_bits(layer.N, layer.K, SCALE_BITS) for layer in anatomy.layers if (fits := scheme.fit(layer.K))
        )
        for scheme in SCHEMES
    }
    return [
        *(Measurement.of(*key, "held-out KL to dense", "nats/token", values) for key, values in found.items()),
        *(Measurement(record.ALL, name, "bits per weight", total / weights, "") for name, total in bits.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=models.REFERENCE)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    record.append("grids", measure(args.model, args.seeds))


if __name__ == "__main__":
    main()
