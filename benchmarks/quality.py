"""Held-out perplexity of the reference model at 4, 3 and 2 bits, against llm-compressor on the same calibration tokens.

    python -m benchmarks.quality --peer-python PYTHON

Both sides compress the same float32 copy of the model (the peer would run float16 as it is, and a CPU is slow at that), write
symmetric pack-quantized checkpoints, and are judged by the same code, which expands both to float32. Each seed draws its own
calibration text.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from benchmarks import record, workload
from benchmarks.peer import Job
from benchmarks.record import Measurement
from compress import checkpoint, evaluate, models
from compress.calib import data
from compress.evaluate import Comparison
from compress.formats import compressed_tensors
from compress.qtensor import dequantize
from compress.spec import Scheme

SAMPLES, SEQ_LEN = 128, 256
PERPLEXITY, KL = "held-out perplexity", "held-out KL to dense"
SCHEMES = [Scheme(bits, group) for bits in (4, 3, 2) for group in (128, 32)]
OBSERVERS = {"rtn": (None, "mse"), "gptq": (None, "mse", "imatrix_mse")}  # what chooses llm-compressor's scales


def measure(model: Path, peer_python: str, seeds: int) -> list[Measurement]:
    """Perplexity, and KL to the dense model, over the whole held-out text; medians over `seeds` draws of calibration text."""
    found: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    with workload.folder() as scratch:
        base = float32_copy(model, scratch / "base")
        tokenizer = models.tokenizer(base)
        held_out = data.held_out_text(None, tokenizer, seq_len=SEQ_LEN).inputs["input_ids"]
        judge = _Judge(base, held_out)
        found["dense", record.ALL].append(judge.compare(judge.dense))
        for seed in range(seeds):
            drawn = data.text(None, tokenizer, samples=SAMPLES, seq_len=SEQ_LEN, seed=seed).inputs["input_ids"]
            calib = workload.write_tokens(scratch / f"calibration-{seed}.jsonl", drawn)
            for subject, scheme, folder in [*_ours(base, calib, scratch, seed), *_peers(base, calib, scratch, seed, peer_python)]:
                found[subject, str(scheme)].append(judge.compressed(folder, scheme))
                last = found[subject, str(scheme)][-1]
                print(f"{subject:38} {scheme!s:10} seed {seed}: {last.perplexity:.4f}, KL {last.kl:.5f}", flush=True)
        stock = AutoModelForCausalLM.from_pretrained(scratch / f"gptq-{SCHEMES[0]}-0", dtype=torch.float32)
        found["compress GPTQ, seed 0, read by transformers", str(SCHEMES[0])].append(judge.compare(stock))
    return [
        *(Measurement.of(*key, PERPLEXITY, "", [one.perplexity for one in each]) for key, each in found.items()),
        *(Measurement.of(*key, KL, "nats/token", [one.kl for one in each]) for key, each in found.items()),
    ]


class _Judge:
    """The dense model, and a copy whose weights are replaced by those of compressed folders."""

    def __init__(self, base: Path, held_out: Tensor) -> None:
        self.dense, self.model, self.held_out = models.load(base), models.load(base), held_out
        self.layers = models.anatomy(self.model).layers

    @torch.no_grad()
    def compressed(self, folder: Path, scheme: Scheme) -> Comparison:
        stored = checkpoint.index(folder)
        for layer in self.layers:
            tensors = {}
            for key in ("weight_packed", "weight_scale", "weight_shape"):
                with safe_open(stored[f"{layer.name}.{key}"].file, "pt") as file:
                    tensors[key] = file.get_tensor(f"{layer.name}.{key}")
            q = compressed_tensors.decode(tensors, scheme, (layer.N, layer.K))
            self.model.get_submodule(layer.name).get_parameter("weight").copy_(dequantize(q))
        return self.compare(self.model)

    def compare(self, model: PreTrainedModel) -> Comparison:
        return evaluate.compare(model, self.dense, self.held_out)


def float32_copy(model: Path, copy: Path) -> Path:
    """The model in float32, which both sides run in, with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(copy)
    checkpoint.copy_side_files(model, copy)
    return copy


def _ours(base: Path, calib: Path, scratch: Path, seed: int) -> Iterator[tuple[str, Scheme, Path]]:
    for method, scheme in [(method, scheme) for method in ("rtn", "gptq") for scheme in SCHEMES]:
        if method == "rtn" and seed:
            continue  # needs no calibration
        out = scratch / f"{method}-{scheme}-{seed}"
        options = {"bits": scheme.bits, "group_size": scheme.group_size, "method": method}
        compress.quantize(base, out=out, calib=calib, samples=SAMPLES, seq_len=SEQ_LEN, **options)
        yield f"compress {method.upper()}", scheme, out


def _peers(base: Path, calib: Path, scratch: Path, seed: int, python: str) -> Iterator[tuple[str, Scheme, Path]]:
    jobs = {}
    for method, observers in OBSERVERS.items():
        if method == "rtn" and seed:
            continue
        for observer, scheme in [(observer, scheme) for observer in observers for scheme in SCHEMES]:
            out = scratch / f"peer-{method}-{observer}-{scheme}-{seed}"
            name = f"llm-compressor {method.upper()}" + (f" ({observer})" if observer else "")
            jobs[name, scheme] = Job(method, scheme.bits, scheme.group_size, observer, str(calib), 8, str(out))
    workload.run(workload.peers(python, base, list(jobs.values()), scratch))
    for (name, scheme), job in jobs.items():
        yield name, scheme, Path(job.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--model", type=Path, default=models.REFERENCE)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    measured = measure(args.model, args.peer_python, args.seeds)
    record.append("quality", measured, workload.peer_versions(args.peer_python))


if __name__ == "__main__":
    main()
