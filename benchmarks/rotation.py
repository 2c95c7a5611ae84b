"""What a rotation gains: the reference Llama as it was trained, and with outliers, rotated and not.

    python -m benchmarks.rotation

Its embeddings are untied first. For outliers every 32nd channel is made 30 times as large by the norm before each block's layers
and its weights in these 30 times as small, which keeps the model's function. KL(dense || compressed) per token on the documents
that benchmarks/defaults.py judges on.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import record
from benchmarks.defaults import CPU, JUDGED, SAMPLES, _kl, _windows
from benchmarks.record import Measurement
from compress import models, qtensor, sequential
from compress.rotate.choose import judge
from compress.rotate.folding import folds
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import Plan, Scheme

SCHEMES = (Scheme(4, 128), Scheme(3, 128), Scheme(2, 32))
EVERY, LARGER = 32, 30.0
READERS = {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", ("gate", "up"))}


def untied() -> Any:
    """The reference model in float32, with an output layer of its own."""
    model = models.load(models.REFERENCE).float()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@torch.no_grad()
def with_outliers(model: Any) -> Any:
    """A copy with large inputs and small weights in every 32nd channel."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for norm, (part, layers) in READERS.items():
            block.get_submodule(norm).weight[::EVERY] *= LARGER
            for layer in layers:
                block.get_submodule(f"{part}.{layer}_proj").weight[:, ::EVERY] /= LARGER
    return model


@torch.no_grad()
def rotated(model: Any, seed: int) -> Any:
    """A copy with a rotation folded in."""
    turned = copy.deepcopy(model)
    for name, change in folds(model, models.anatomy(model).blocks, seed).items():
        turned.get_parameter(name).copy_(change(model.get_parameter(name)))
    return turned


def measure(seeds: int) -> Iterator[Measurement]:
    """KL of solved models, medians over draws of calibration text and rotations; and of rounding alone, which decides."""
    trained, tokenizer = untied(), models.tokenizer(models.REFERENCE)
    judged = _windows(tokenizer, True, 0, JUDGED)
    with torch.no_grad():
        logits = torch.cat([trained(windows).logits.log_softmax(-1) for windows in judged.split(16)])
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for seed in range(seeds):
        inputs = {"input_ids": _windows(tokenizer, False, seed, SAMPLES)}
        for kind, model in (("as trained", trained), ("with outliers", with_outliers(trained))):
            turned, anatomy = rotated(model, seed), models.anatomy(model)
            for scheme in SCHEMES:
                settings = Settings("gptq", "alps", Options.of("default"), CPU, torch.float32, torch.float16)
                plan = Plan.uniform(anatomy.in_features, scheme)
                judgement = judge(model, turned, anatomy, plan, inputs, settings)
                found[kind, str(scheme), "KL when rounded to nearest"].append(judgement.plain)
                found[f"{kind}, rotated", str(scheme), "KL when rounded to nearest"].append(judgement.rotated)
                for subject, dense in ((kind, model), (f"{kind}, rotated", turned)):
                    kl = _kl(_solved(dense, plan, inputs, settings), judged, logits)
                    found[subject, str(scheme), "KL to dense"].append(kl)
                    print(f"seed {seed}  {subject:24}{scheme}  {kl:.5f}", flush=True)
    yield from (Measurement.of(*key, "nats/token", values) for key, values in found.items())


@torch.no_grad()
def _solved(dense: Any, plan: Plan, inputs: dict[str, torch.Tensor], settings: Settings) -> Any:
    solved = copy.deepcopy(dense)
    for block in sequential.run(dense, models.anatomy(dense), plan, inputs, settings):
        for one in block.layers:
            solved.get_submodule(one.layer.name).weight.copy_(qtensor.dense(one.solved))
    return solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    record.append("rotation", measure(parser.parse_args().seeds))


if __name__ == "__main__":
    main()
