"""A Llama of 8B's shape with random weights on a GPU: tokens per second, packed and in bfloat16, and seconds to solve a block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.record import Measurement
from compress.calib.stats import HessianSum
from compress.kernels import dispatch
from compress.nn import QuantLinear, stack
from compress.solvers import QUANTIZERS
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
SHAPED = "8B-shaped"

Cache = list[tuple[Tensor, Tensor]]  # keys and values [batch, heads, tokens, head] of every layer


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


@torch.inference_mode()
def step(model: LlamaForCausalLM, ids: Tensor, cache: Cache) -> Tensor:
    """Logits of one token per sequence after `CONTEXT` others, whose keys and values the cache holds and this one's joins."""
    hidden: Tensor = model.model.embed_tokens(ids)
    position = torch.full_like(ids, CONTEXT)
    angles: tuple[Tensor, Tensor] = model.model.rotary_emb(hidden, position)
    for layer, (keys, values) in zip(model.model.layers, cache, strict=True):
        hidden = hidden + _attend(layer, layer.input_layernorm(hidden), angles, keys, values)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


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
    """Tokens per second in both forms; with passing tests also their ratio."""
    device, seconds = torch.device("cuda"), {}
    for subject, packed in (("bfloat16", False), ("packed", True)):
        model = random_llama(CONFIG, device, packed)
        for batch in BATCHES:
            ids, cache = torch.zeros(batch, 1, dtype=torch.long, device=device), empty_cache(CONFIG, batch, device)
            taken = graph_seconds([lambda model=model, ids=ids, cache=cache: step(model, ids, cache)])  # type: ignore[misc]
            setting = f"{SHAPED} Llama, batch {batch}"
            yield Measurement.of(subject, setting, "decoding", "tokens/s", [batch / each for each in taken])
            seconds[subject, batch] = sorted(taken)[len(taken) // 2]
            if green and packed:
                ratio = seconds["bfloat16", batch] / seconds["packed", batch]
                yield Measurement(subject, setting, "speed / bfloat16's", ratio, "x")
            del cache
        del model
        torch.cuda.empty_cache()


def solving() -> Iterator[Measurement]:
    """Seconds for the statistics and the solves of a block; what runs the model to get at its inputs is not in them."""
    hidden, wide, heads = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.hidden_size // CONFIG.num_attention_heads
    groups = {  # layers with one input, stacked
        hidden: [hidden + 2 * CONFIG.num_key_value_heads * heads, hidden, 2 * wide],
        wide: [hidden],
    }
    taken = []
    for _ in range(BLOCKS):
        torch.cuda.synchronize()
        seconds = 0.0
        for K, layers in groups.items():
            x = torch.randn(LENGTH, K, device="cuda", dtype=torch.bfloat16)
            for N in layers:
                W = torch.randn(N, K, device="cuda") * 0.02
                torch.cuda.synchronize()
                start = time.perf_counter()
                total = HessianSum(K, W.device)
                for _ in range(SAMPLES):
                    total.add(x)
                QUANTIZERS["gptq"](W, total.stats(), SCHEME, torch.bfloat16, Options())
                torch.cuda.synchronize()
                seconds += time.perf_counter() - start
        taken.append(seconds)
    setting = f"{SHAPED} block, {SAMPLES} x {LENGTH} tokens"
    yield Measurement.of("compress", setting, "GPTQ of a block", "s", taken[1:])
