"""A small classifier pruned layer by layer and on its loss: accuracy on held-out text by method and number of steps.

    python -m benchmarks.classifier [--model FOLDER] [--append]

FOLDER is what train_classifier.py made; without it one is trained first. `--defaults` compares the options of pruning on the
loss instead, on training examples that neither the gradients nor the table see. All methods get the same samples.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import record, train_classifier, workload
from benchmarks.record import Measurement
from benchmarks.train_classifier import Examples, accuracy, examples
from compress import models, sequential
from compress.fisher import prune
from compress.fisher.prune import Options
from compress.qtensor import dense
from compress.sequential import Settings, SolvedBlock
from compress.solvers.options import Options as SolverOptions
from compress.spec import Plan, Sparsity

SPARSITIES = [Sparsity(0.7), Sparsity(0.8), Sparsity(0.9)]
SAMPLES = 512
CHOSEN_ON = 2000  # training examples that --defaults judges by
ACCURACY, LOSS, KL = "held-out accuracy", "held-out loss", "held-out KL to dense"
LAYER_WISE = {"magnitude": ("magnitude", False), "SparseGPT": ("sparsegpt", False), "ALPS, refitted": ("alps", True)}
ON_THE_LOSS = {  # name: options, and numbers of steps; oBERT as published takes costs at once, and needs more damping for it
    "oBERT as published": (Options(method="obert", greedy=False, damping=0.01), (1, 4, 16)),
    "oBERT, one by one": (Options(method="obert"), (1, 4)),
    "M-FAC": (Options(method="mfac"), (1, 4, 16)),
}
DEFAULTS: dict[str, list[dict[str, Any]]] = {  # one change at a time
    "obert": [
        {"greedy": False},
        {"greedy": False, "damping": 0.01},
        *({"damping": d} for d in (1e-5, 1e-4, 0.01, 0.1)),
        *({"block": b} for b in (16, 128)),
    ],
    "mfac": [*({"damping": d} for d in (1e-5, 1e-4, 0.01, 0.1)), *({"block": b} for b in (256, 0))],
}
EITHER: list[dict[str, Any]] = [{"gradients": 32}, {"gradients": 512}, {"batch": 4}, {"threshold": "layer"}, {"loss": "kl"}]


@dataclass(frozen=True)
class Subject:
    """The trained model, the training examples in a fixed random order, and the held-out ones."""

    model: PreTrainedModel
    train: Examples
    held_out: Examples

    @staticmethod
    def load(folder: Path) -> Subject:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = examples(tokenizer, "train")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        shuffled = Examples(train.ids[order], train.mask[order], train.labels[order])
        return Subject(models.load(folder), shuffled, examples(tokenizer, "eval"))

    def inputs(self, seed: int) -> dict[str, Tensor]:
        """Samples to calibrate on, never those that options are chosen by."""
        drawn = torch.randperm(len(self.train) - CHOSEN_ON, generator=torch.Generator().manual_seed(seed))
        return self.train[CHOSEN_ON + drawn[:SAMPLES]]

    def with_weights(self, blocks: Iterable[SolvedBlock]) -> PreTrainedModel:
        model = copy.deepcopy(self.model)
        for one in (one for block in blocks for one in block.layers):
            weight = models.weight_of(model.get_submodule(one.layer.name))
            weight.data = models.from_matrix(dense(one.solved), one.layer.kind, weight.shape).contiguous()
        return model

    def layer_wise(self, sparsity: Sparsity, method: str, refit: bool, seed: int) -> PreTrainedModel:
        anatomy = models.anatomy(self.model)
        plan, inputs = Plan.uniform(anatomy.in_features, None, sparsity), self.inputs(seed)
        del inputs["labels"]
        return self.with_weights(sequential.run(self.model, anatomy, plan, inputs, _settings(method, refit)))

    def on_the_loss(self, sparsity: Sparsity, options: Options) -> PreTrainedModel:
        anatomy = models.anatomy(self.model)
        plan = Plan.uniform(anatomy.in_features, None, sparsity)
        inputs = self.inputs(options.seed)
        return self.with_weights(prune.run(self.model, anatomy, plan, inputs, _settings(), options))


def _settings(method: str = "magnitude", refit: bool = False) -> Settings:
    return Settings("gptq", method, SolverOptions(refit=refit), torch.device("cpu"), torch.float32, torch.float32)


@torch.inference_mode()
def loss(model: PreTrainedModel, data: Examples) -> float:
    batches = [data[start : start + 256] for start in range(0, len(data), 256)]
    total: float = sum(model(**batch).loss.item() * len(batch["labels"]) for batch in batches)
    return total / len(data)


def pruned(subject: Subject, sparsity: Sparsity, seed: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model as every method leaves it."""
    for name, (method, refit) in LAYER_WISE.items():
        yield name, subject.layer_wise(sparsity, method, refit, seed)
    for name, (options, numbers) in ON_THE_LOSS.items():
        for steps in numbers:
            options = replace(options, recompute=steps, seed=seed)
            yield f"{name}, {steps} step{'s' if steps > 1 else ''}", subject.on_the_loss(sparsity, options)


@torch.inference_mode()
def divergence(model: PreTrainedModel, base: PreTrainedModel, data: Examples) -> float:
    """KL(base || model) of the predicted package, in nats per example: damage apart from what the base gets wrong itself."""
    total = 0.0
    for start in range(0, len(data), 256):
        batch = data[start : start + 256]
        log_q, log_p = (one(**batch).logits.log_softmax(-1) for one in (model, base))
        total += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total / len(data)


def measure(subject: Subject, seeds: int) -> list[Measurement]:
    found: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    found["dense", record.ALL, ACCURACY, ""].append(accuracy(subject.model, subject.held_out))
    found["dense", record.ALL, LOSS, "nats"].append(loss(subject.model, subject.held_out))
    for seed in range(seeds):
        for sparsity in SPARSITIES:
            start = time.perf_counter()
            for name, model in pruned(subject, sparsity, seed):
                took = time.perf_counter() - start
                right, nats = accuracy(model, subject.held_out), loss(model, subject.held_out)
                kl = divergence(model, subject.model, subject.held_out)
                shown = f"accuracy {right:.4f}, loss {nats:.4f}, KL {kl:.5f}, {took:.0f} s"
                print(f"{name:30} {sparsity!s:17} seed {seed}: {shown}", flush=True)
                found[name, str(sparsity), ACCURACY, ""].append(right)
                found[name, str(sparsity), LOSS, "nats"].append(nats)
                found[name, str(sparsity), KL, "nats"].append(kl)
                found[name, str(sparsity), "time", "s"].append(took)
                start = time.perf_counter()
    return [Measurement.of(*key, values) for key, values in found.items()]


def compare_defaults(subject: Subject, sparsity: Sparsity = SPARSITIES[-1]) -> list[Measurement]:
    """The loss on training examples that were not calibrated on, with one option changed, in one step."""
    chosen_on, found = Examples(*(part[:CHOSEN_ON] for part in vars(subject.train).values())), []
    for method, changes in DEFAULTS.items():
        for change in [{}, *changes, *EITHER]:
            options = replace(Options(method=method, recompute=1), **change)
            nats = loss(subject.on_the_loss(sparsity, options), chosen_on)
            name = ", ".join(f"{key} {value}" for key, value in change.items()) or "as it is"
            print(f"{method} {name:20} {nats:.4f}", flush=True)
            found.append(
                Measurement(f"{method}: {name}", f"classifier, {sparsity}, 1 step", "loss on training text", nats, "nats")
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    with workload.folder() as scratch:
        if args.model is None:
            print(train_classifier.train(scratch))
        subject = Subject.load(args.model or scratch)
        measured = compare_defaults(subject) if args.defaults else measure(subject, args.seeds)
    if args.append:
        record.append("defaults" if args.defaults else "classifier", measured)


if __name__ == "__main__":
    main()
