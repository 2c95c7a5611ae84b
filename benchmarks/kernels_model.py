"""A Llama of 8B's shape with random weights on a GPU: tokens per second, packed and in bfloat16, and seconds to solve a block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.record import Measurement
from compress.calib.stats import HessianSum, LayerStats
from compress.kernels import dispatch
from compress.nn import QuantLinear, stack
from compress.solvers import gptq
from compress.solvers.options import Options
from compress.spec import Scheme

CONFIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    dtype="bfloat16",
)
SCHEME = Scheme(4, 128)
CONTEXT = 512  # tokens that every new one attends to
BATCHES = (1, 16)
ROUNDS = 15
BLOCKS = 3  # solved, of which the first warms up
SAMPLES, LENGTH = 128, 2048  # calibration
EXPERTS, EXPERT = 32, (1536, 2048)  # gates and ups of Qwen3-30B-A3B, of which a block has 128
SHAPED, EXPERTS_SETTING = "8B-shaped", f"{EXPERTS} experts"

Cache = list[tuple[Tensor, Tensor]]  # keys and values [batch, heads, tokens, head] of every layer
Layer = Callable[[LlamaDecoderLayer, Tensor, tuple[Tensor, Tensor], Tensor, Tensor], Tensor]


def graph_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of a call, several times over: all of them in one captured graph, so that no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever compiles or chooses does so before the capture
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = []
    for _ in range(ROUNDS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1000 / len(calls))
    return taken[2:]


def random_llama(config: LlamaConfig, device: torch.device, packed: bool) -> LlamaForCausalLM:
    """Random weights, made on the device a layer at a time; packed ones in 4 bits, layers with one input stacked."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    for name, module in list(model.model.layers.named_modules()):
        if packed and isinstance(module, nn.Linear):
            N, K = module.weight.shape
            codes = torch.randint(0, SCHEME.levels, (N, K), dtype=torch.uint8, device=device)
            scales = torch.full((N, SCHEME.groups(K)), 0.004, dtype=torch.bfloat16, device=device)
            held = dispatch.prepare(codes, scales, None, bits=SCHEME.bits)
            model.model.layers.set_submodule(name, QuantLinear(held, SCHEME))
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        value = value.fill_(1) if parameter.dim() == 1 else value.normal_(0, 0.02)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    if packed:
        stack(model)
    return model


def empty_cache(config: LlamaConfig, batch: int, device: torch.device) -> Cache:
    """Random keys and values for `CONTEXT` tokens, and zeros for the next."""
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    shape = (batch, heads, CONTEXT + 1, size)
    random = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2 * config.num_hidden_layers))
    return list(zip(random, random, strict=True))


@torch.no_grad()
def step(model: LlamaForCausalLM, ids: Tensor, cache: Cache, through: Layer) -> Tensor:
    """Logits of one token per sequence after `CONTEXT` others, whose keys and values the cache holds and this one's joins."""
    hidden: Tensor = model.model.embed_tokens(ids)
    position = torch.full_like(ids, CONTEXT)
    angles: tuple[Tensor, Tensor] = model.model.rotary_emb(hidden, position)
    for layer, (keys, values) in zip(model.model.layers, cache, strict=True):
        hidden = through(layer, hidden, angles, keys, values)
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def through_layer(layer: LlamaDecoderLayer, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """What a layer makes of the residual stream."""
    x = x + _attend(layer, layer.input_layernorm(x), angles, keys, values)
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _attend(layer: LlamaDecoderLayer, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    attention = layer.self_attn
    batch, heads, size = x.shape[0], keys.shape[1], keys.shape[3]
    q, k, v = (project(x) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = (each.view(batch, 1, -1, size).transpose(1, 2) for each in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *angles)
    keys[:, :, CONTEXT:].copy_(k)
    values[:, :, CONTEXT:].copy_(v)
    q = q.reshape(batch, heads, -1, size)  # the queries that share a head of keys side by side: one pass over the cache
    out = functional.scaled_dot_product_attention(q, keys, values).reshape(batch, 1, -1)
    projected: Tensor = attention.o_proj(out)
    return projected


def decoding(green: bool) -> Iterator[Measurement]:
    """Tokens per second in both forms, as the layers are and compiled; with passing tests also the forms' ratio."""
    device, seconds = torch.device("cuda"), {}
    compiled: Layer = torch.compile(through_layer, fullgraph=True, dynamic=False)
    for subject, packed in (("bfloat16", False), ("packed", True)):
        model = random_llama(CONFIG, device, packed)
        for batch, (how, through) in product(BATCHES, (("", through_layer), (", compiled", compiled))):
            ids, cache = torch.zeros(batch, 1, dtype=torch.long, device=device), empty_cache(CONFIG, batch, device)
            taken = graph_seconds([partial(step, model, ids, cache, through)])
            setting = f"{SHAPED} Llama, batch {batch}{how}"
            yield Measurement.of(subject, setting, "decoding", "tokens/s", [batch / each for each in taken])
            seconds[subject, setting] = median(taken)
            if green and packed:
                ratio = seconds["bfloat16", setting] / seconds["packed", setting]
                yield Measurement(subject, setting, "speed / bfloat16's", ratio, "x")
            del cache
        del model
        torch.cuda.empty_cache()


def solving() -> Iterator[Measurement]:
    """Seconds for the statistics and the solves of a block, and for experts; what runs the model is not in them."""
    setting = f"{SHAPED} block, {SAMPLES} x {LENGTH} tokens"
    for name, options in (("GPTQ of a block", Options()), ("GPTQ and two sweeps of a block", Options(sweeps=2))):
        yield Measurement.of("compress", setting, name, "s", [_block_seconds(options) for _ in range(BLOCKS)][1:])
    N, K = EXPERT
    x = torch.randn(EXPERTS, 2 * K, K, device="cuda")
    stats = [LayerStats(one.t() @ one / len(one), len(one)) for one in x]
    weights = list(torch.randn(EXPERTS, N, K, device="cuda") * 0.02)
    for name, at_once in (("one by one", 1), ("at once", EXPERTS)):
        parts = [slice(start, start + at_once) for start in range(0, EXPERTS, at_once)]

        def solve(parts: Sequence[slice] = parts) -> None:
            for part in parts:
                gptq.solve_alike(weights[part], stats[part], SCHEME, torch.bfloat16, Options(sweeps=2))

        taken = [_seconds(solve) for _ in range(BLOCKS)][1:]
        yield Measurement.of("compress", f"{EXPERTS_SETTING}, {N} x {K}", f"GPTQ and two sweeps, {name}", "s", taken)


def _block_seconds(options: Options) -> float:
    hidden, wide, heads = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.hidden_size // CONFIG.num_attention_heads
    groups = {  # layers with one input, stacked
        hidden: [hidden + 2 * CONFIG.num_key_value_heads * heads, hidden, 2 * wide],
        wide: [hidden],
    }
    seconds = 0.0
    for K, layers in groups.items():
        x = torch.randn(LENGTH, K, device="cuda", dtype=torch.bfloat16)
        for N in layers:
            W = torch.randn(N, K, device="cuda") * 0.02

            def solve(W: Tensor = W, x: Tensor = x) -> None:
                total = HessianSum(W.shape[1], W.device)
                for _ in range(SAMPLES):
                    total.add(x)
                gptq.solve(W, total.stats(), SCHEME, torch.bfloat16, options)

            seconds += _seconds(solve)
    return seconds


def _seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
