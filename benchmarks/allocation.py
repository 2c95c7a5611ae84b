"""Held-out perplexity of the reference model by where its zeros are, and with neurons and heads removed.

    python -m benchmarks.allocation

Every plan is solved by the default method on the same calibration text, in float32. Each seed draws its own text.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import record, workload
from benchmarks.record import Measurement
from compress import allocate, checkpoint, evaluate, models, qtensor, sequential
from compress.calib import data
from compress.checkpoint import Writer
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import Plan, Sparsity
from compress.structured.rows import Method, prune_rows

SAMPLES, SEQ_LEN = 64, 256
METRIC = "held-out perplexity"
FRACTIONS = (0.5, 0.6, 0.7)
ROW_FRACTIONS = (0.125, 0.25, 0.5)
SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)


def measure(source: Path, seeds: int) -> dict[str, list[Measurement]]:
    """Rows of two benchmarks by name: allocation, and rows."""
    tokenizer = models.tokenizer(source)
    held_out = data.held_out_text(None, tokenizer, seq_len=SEQ_LEN).inputs["input_ids"]
    model = models.load(source)
    found: dict[str, dict[tuple[str, str], list[float]]] = {"allocation": defaultdict(list), "rows": defaultdict(list)}
    for seed in range(seeds):
        inputs = data.text(None, tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs
        for fraction in FRACTIONS:
            for name, plan in plans(model, inputs, Sparsity(fraction), seed):
                pruned = solved(model, plan(), inputs)
                note(found["allocation"][name, f"{fraction:.0%}"], evaluate.perplexity(pruned, held_out, batch=8), name, fraction)
        for fraction in ROW_FRACTIONS:
            for method in ("obs", "magnitude"):
                if seed == 0 or method == "obs":  # magnitude needs no calibration
                    name = f"rows by {method}"
                    smaller = removed(source, inputs, fraction, method)
                    note(found["rows"][name, f"{fraction:.1%}"], evaluate.perplexity(smaller, held_out, batch=8), name, fraction)
    return {
        benchmark: [Measurement.of(*key, METRIC, "", values) for key, values in cells.items()]
        for benchmark, cells in found.items()
    }


def note(values: list[float], perplexity: float, name: str, fraction: float) -> None:
    values.append(perplexity)
    print(f"{name:20} {fraction:.3f} run {len(values)}: {perplexity:.3f}", flush=True)


def plans(
    model: PreTrainedModel, inputs: dict[str, Tensor], sparsity: Sparsity, seed: int
) -> Iterator[tuple[str, Callable[[], Plan]]]:
    anatomy = models.anatomy(model)
    yield "uniform", lambda: allocate.uniform(anatomy, sparsity)
    for score in ("magnitude", "wanda", "obs"):
        yield f"global, {score}", lambda score=score: allocate.global_threshold(model, anatomy, inputs, sparsity, SETTINGS, score)
    yield "OWL", lambda: allocate.owl(model, anatomy, inputs, sparsity, SETTINGS)
    yield "ECoFLaP", lambda: allocate.ecoflap(model, anatomy, inputs, sparsity, SETTINGS, seed=seed)


@torch.no_grad()
def solved(model: PreTrainedModel, plan: Plan, inputs: dict[str, Tensor]) -> PreTrainedModel:
    """The model with every layer pruned as planned."""
    pruned = copy.deepcopy(model).float()
    for block in sequential.run(model, models.anatomy(model), plan, inputs, SETTINGS):
        for one in block.layers:
            weight = models.weight_of(pruned.get_submodule(one.layer.name))
            weight.copy_(models.from_matrix(qtensor.dense(one.solved), one.layer.kind, weight.shape))
    return pruned


def removed(source: Path, inputs: dict[str, Tensor], fraction: float, method: Method) -> PreTrainedModel:
    """The smaller model, written and read back by transformers."""
    model = models.load(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with workload.folder() as scratch, Writer(source, scratch / "out") as writer:
        anatomy, stored = models.anatomy(model), checkpoint.index(source)
        shrunk = prune_rows(writer, model, anatomy, stored, config, inputs, fraction, SETTINGS, method)
        writer.finish(shrunk.replaced, shrunk.config, {})
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(writer.finished, dtype=torch.float32)
        return copy.deepcopy(loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=models.REFERENCE)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for benchmark, measurements in measure(args.model, args.seeds).items():
        record.append(benchmark, measurements)


if __name__ == "__main__":
    main()
