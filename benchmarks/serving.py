"""Decoding on a CPU: tokens/s and memory of a 4-bit Llama against the same model in bfloat16, and where the kernels stop paying.

    python -m benchmarks.serving [--append]

Both models run in one process, in turns, one token at a time through `model.forward` with a cache, so that what `generate`
adds is in neither. Threads wait for each other as they do in a user's process, by spinning, so the machine has to be idle:
with OMP_WAIT_POLICY=PASSIVE the many small products of one token wait for a wake-up each (2.3 times bfloat16's speed instead
of 2.8 on two cores of an AMD EPYC, 2026-11-21).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks import record
from benchmarks.record import Measurement
from compress import hf
from compress.formats import FORMATS
from compress.kernels import dispatch
from compress.models import Layer
from compress.nn import QuantLinear
from compress.qtensor import QTensor
from compress.spec import Plan, Scheme

ROOT = Path(__file__).resolve().parents[1]
CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, dtype="bfloat16"
)
SCHEME = Scheme(4, 128)
ROUNDS, STEPS, PROMPT = 9, 8, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIDE = 4096  # of the matrices in the table by rows
COPIES = 4  # of each, used in turn: more than the last cache holds
REPEATS = 5
MODEL = "Llama, hidden 2048, 8 layers, CPU, batch 1"

Row = dict[str, str | float]


def measure() -> list[Row]:
    """Every number as {subject, setting, metric, value, unit, spread, runs}."""
    return [*_decoding(), *_crossover()]


def _row(subject: str, setting: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    middle, spread = statistics.median(values), max(values) - min(values)
    return {
        "subject": subject,
        "setting": setting,
        "metric": metric,
        "value": middle,
        "unit": unit,
        "spread": spread,
        "runs": len(values),
    }


def _decoding() -> Iterator[Row]:
    packed = packed_llama()
    with tempfile.TemporaryDirectory(prefix="compress-benchmark-") as folder:
        write(packed, Path(folder))
        command = [sys.executable, "-m", "benchmarks.serving", folder]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        yield _row("packed", MODEL, "anonymous memory while serving / file size", "x", [float(output.split()[-1])])

    dense = dense_twin(packed)
    seconds: dict[str, list[float]] = {"packed": [], "bfloat16": []}
    for turn in range(ROUNDS + 1):
        for name, model in (("packed", packed), ("bfloat16", dense)):
            taken = seconds_per_token(model)
            if turn:  # the first round warms up
                seconds[name].append(taken)
    for name, values in seconds.items():
        yield _row(name, MODEL, "single-token decode", "tokens/s", [1 / each for each in values])
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    yield _row("packed", MODEL, "decode speed / bfloat16's", "x", ratios)


def serving_memory(folder: Path) -> float:
    """Anonymous memory that loading a checkpoint and producing a token adds to this process, over the weights' file size."""
    before = anonymous_memory()
    model = hf.load(folder, device="cpu")
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long))
    gc.collect()
    return (anonymous_memory() - before) / (folder / "model.safetensors").stat().st_size


def write(model: LlamaForCausalLM, folder: Path) -> None:
    """A checkpoint of `packed_llama`."""
    form, layers = FORMATS["compressed-tensors"], []
    tensors: dict[str, Tensor] = {**dict(model.named_parameters())}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            codes, scales, zeros, _ = dispatch.restore(module.packed)
            encoded = form.encode(QTensor(codes, scales, zeros, SCHEME))
            tensors |= {f"{name}.{key}": tensor for key, tensor in encoded.items()}
            layers.append(Layer(name, "linear", *module.packed.shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = Plan.uniform({layer.name: layer.K for layer in layers}, SCHEME)
    config = {**CONFIG.to_dict(), "quantization_config": form.config(plan, layers, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}), encoding="utf-8")


def packed_llama() -> LlamaForCausalLM:
    """Random weights, rounded to nearest in 4 bits as they are made, one layer at a time; embeddings and head in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(CONFIG).eval()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            w = torch.randn(module.weight.shape, generator=generator) * CONFIG.initializer_range
            model.model.layers.set_submodule(name, QuantLinear(_round(w), SCHEME))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16)
            value = value.fill_(1) if parameter.dim() == 1 else value.normal_(0, CONFIG.initializer_range, generator=generator)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(CONFIG)
    return model


def _round(w: Tensor) -> dispatch.Packed:
    N, K = w.shape
    grouped = w.view(N, SCHEME.groups(K), -1)
    scales = (grouped.abs().amax(-1) / (SCHEME.levels // 2)).to(torch.bfloat16)
    codes = (grouped / scales[..., None].float()).round().add(SCHEME.levels // 2).clamp(0, SCHEME.levels - 1)
    return dispatch.prepare(codes.view(N, K).to(torch.uint8), scales, None, bits=SCHEME.bits)


def dense_twin(packed: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with its packed weights dequantized; everything else is shared."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(CONFIG).eval()
    model.load_state_dict(packed.state_dict(), strict=False, assign=True)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            weight = dispatch.dequantize(module.packed).to(torch.bfloat16)
            model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(CONFIG)
    return model


@torch.inference_mode()
def seconds_per_token(model: LlamaForCausalLM) -> float:
    """Seconds for one token after a short prompt, averaged over a few."""
    cache = DynamicCache(config=CONFIG)
    model(torch.arange(PROMPT)[None], past_key_values=cache, use_cache=True)
    token = torch.zeros(1, 1, dtype=torch.long)
    start = time.perf_counter()
    for _ in range(STEPS):
        model(token, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / STEPS


def anonymous_memory() -> int:
    """This process's RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _crossover() -> Iterator[Row]:
    """Milliseconds of each layout's kernel and of its dequantized tiles, by rows of activations."""
    generator = torch.Generator().manual_seed(0)
    for bits, group in ((4, 128), (8, 128), (8, SIDE)):
        scales = torch.full((SIDE, SIDE // group), 0.01, dtype=torch.bfloat16)
        codes = [torch.randint(0, 2**bits, (SIDE, SIDE), generator=generator, dtype=torch.uint8) for _ in range(COPIES)]
        weights = [dispatch.prepare(u, scales, None, bits=bits) for u in codes]
        for M in ROWS:
            x = torch.randn(M, SIDE, generator=generator).to(torch.bfloat16)
            for way, product in (("kernel", dispatch.cpu_kernel), ("tiles", dispatch.cpu_tiles)):
                setting = f"int{bits} {'row' if group == SIDE else f'g{group}'}, {SIDE} x {SIDE}, {M} rows"
                yield _row(way, setting, "product", "ms", _milliseconds([_bind(product, x, weight) for weight in weights]))


def _bind(product: Callable[[Tensor, dispatch.Packed], Tensor], x: Tensor, weight: dispatch.Packed) -> Callable[[], Tensor]:
    return lambda: product(x, weight)


def _milliseconds(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    taken = []
    for i in range(REPEATS + 1):
        start = time.perf_counter()
        calls[i % len(calls)]()
        taken.append((time.perf_counter() - start) * 1000)
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="print only what `serving_memory` says of this checkpoint")
    parser.add_argument("--append", action="store_true", help="to results.csv")
    args = parser.parse_args()
    if args.folder:
        print(serving_memory(args.folder))
        return
    rows = measure()
    if args.append:
        record.append("serving", [Measurement(**row) for row in rows], "")
    for row in rows:
        print(
            f"{row['subject']:9} {row['setting']:44} {row['metric']:43} {row['value']:9.3f} {row['unit']:8} +-{row['spread']:.3f}"
        )


if __name__ == "__main__":
    main()
