"""Tiny random checkpoints, written with the formats alone, and what their readers must compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from compress import solvers
from compress.formats import FORMATS
from compress.models import Layer
from compress.qtensor import QTensor, codes_of, dequantize, round_to_grid
from compress.solvers.options import Options
from compress.spec import FIXED, LayerSpec, Plan, Scheme


def rtn(w: Tensor, scheme: Scheme, dtype: torch.dtype) -> QTensor:
    """Round to nearest with scales of either sign; grids that are not uniform by the solver."""
    N, K = w.shape
    grouped = w.float().view(N, scheme.groups(K), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    half = scheme.levels // 2
    if scheme.grid != "int":
        return solvers.rtn.solve(w, None, scheme, dtype, Options())
    if scheme.symmetric:
        extreme = torch.where(high > -low, high, low)
        scales, zeros = (-extreme / half).to(dtype), torch.full_like(low, half)
    else:
        scales = ((high - low) / (scheme.levels - 1)).to(dtype)
        zeros = (-low / scales.float()).round()
    values = round_to_grid(grouped, scales.float()[..., None], zeros[..., None], scheme)
    codes = codes_of(values, zeros[..., None], scheme)
    return QTensor(codes.view(N, K), scales, zeros.to(torch.uint8), scheme)


def llama(dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM._from_config(LlamaConfig(**shape, **overrides), dtype=dtype).eval()


def bert() -> PreTrainedModel:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**shape, num_labels=3)).eval()


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The linears and Conv1Ds inside numbered blocks."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdecimal() for part in name.split(".")):
            kind = "linear" if isinstance(module, nn.Linear) else "conv1d"
            shape = tuple(module.weight.shape) if kind == "linear" else tuple(module.weight.shape)[::-1]
            found.append(Layer(name, kind, *shape))
    return found


def dense_of(model: PreTrainedModel) -> list[str]:
    inside = {layer.name for layer in layers_of(model)}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside]


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and what its readers must compute for the token ids 0..15: logits, and the base model's hidden states."""

    folder: Path
    logits: Tensor
    hidden: Tensor


def write(folder: Path, model: PreTrainedModel, choose: Callable[[str], Scheme | None], format_name: str) -> Checkpoint:
    """Quantize `model` in place with round to nearest and write it."""
    layers = layers_of(model)
    plan = Plan({layer.name: LayerSpec(scheme.fit(layer.K) if (scheme := choose(layer.name)) else None) for layer in layers})
    chosen = FORMATS[format_name]
    packed: dict[str, Tensor] = {}
    for layer in layers:
        if scheme := plan.layers[layer.name].scheme:
            weight = model.get_submodule(layer.name).weight
            w = weight.detach().T if layer.kind == "conv1d" else weight.detach()
            q = rtn(w, scheme, chosen.scale_dtype(weight.dtype))
            packed |= {f"{layer.name}.{suffix}": tensor for suffix, tensor in chosen.encode(q).items()}
            Q = dequantize(q, weight.dtype)
            weight.data.copy_(Q.T if layer.kind == "conv1d" else Q)
    replaced = {f"{layer.name}.weight" for layer in layers if plan.layers[layer.name].scheme}
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in replaced | tied}
    folder.mkdir(parents=True)
    save_file(tensors | packed, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = chosen.config(plan, layers, dense_of(model))
    (folder / "config.json").write_text(json.dumps(config, default=str))
    with torch.no_grad():
        ids = torch.arange(16)[None]
        return Checkpoint(folder, model(ids).logits, model.base_model(ids)[0])


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a checkpoint's quantization_config in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def by_name(table: Mapping[str, Scheme | None], otherwise: Scheme) -> Callable[[str], Scheme | None]:
    """Choose by the first key that a name contains."""
    return lambda name: next((scheme for key, scheme in table.items() if key in name), otherwise)


def cases(root: Path) -> dict[str, Checkpoint]:
    """Every kind of checkpoint that is written by default, and those that stock readers are known to refuse."""
    torch.manual_seed(0)
    ct = "compressed-tensors"
    made = {}
    for bits in (2, 3, 4, 8):
        for size in (32, -1):
            made[f"int{bits} {size}"] = write(root / f"{bits}_{size}", llama(), lambda _, b=bits, g=size: Scheme(b, g), ct)
    for grid, fixed in FIXED.items():
        for dtype in ("float16", "bfloat16", "float32") if fixed.form != "int" else ("bfloat16",):
            folder, model = root / f"{grid}_{dtype}", llama(getattr(torch, dtype))
            made[f"{grid} {dtype}"] = write(folder, model, lambda _, g=grid: Scheme.of(g), ct)
    g32 = Scheme(4, 32)
    mixed = by_name({"0.mlp": Scheme(3, 32), "q_proj": Scheme(8, 32), "k_proj": Scheme(8, 32), "v_proj": Scheme(8, 32)}, g32)
    made |= {
        "int and fp8": write(root / "int_fp8", llama(torch.bfloat16), by_name({"mlp": Scheme.of("fp8")}, g32), ct),
        "fitted": write(root / "fitted", llama(), lambda _: Scheme(4, 64), ct),
        "bfloat16": write(root / "bfloat16", llama(torch.bfloat16), lambda _: g32, ct),
        "tied": write(root / "tied", llama(tie_word_embeddings=True), lambda _: g32, ct),
        "some dense": write(root / "some_dense", llama(), by_name({"o_proj": None}, g32), ct),
        "mixed": write(root / "mixed", llama(), mixed, ct),
        "mixed, some dense": write(root / "mixed_dense", llama(), by_name({"o_proj": None, "mlp": Scheme(8, -1)}, g32), ct),
        "bert": write(root / "bert", bert(), lambda _: g32, ct),
        "dense": write(root / "dense", llama(), lambda _: g32, "dense"),
        "conv1d": write(root / "conv1d", gpt2(), lambda _: g32, ct),
        "asymmetric": write(root / "asymmetric", llama(), lambda _: Scheme(4, 32, symmetric=False), ct),
        "asymmetric, mixed": write(root / "asym_mixed", llama(), by_name({"mlp": g32}, Scheme(4, 32, symmetric=False)), ct),
        "actorder": write(root / "actorder", llama(), lambda _: g32, ct),
        "unknown method": write(root / "unknown", llama(), lambda _: g32, ct),
        "ignored": write(root / "ignored", llama(), lambda _: g32, ct),
        "unknown format": write(root / "unknown_format", llama(), lambda _: g32, ct),
        "no group format": write(root / "no_group_format", llama(), lambda _: g32, ct),
        "tied head": write(root / "tied_head", llama(tie_word_embeddings=True), lambda _: g32, ct),
    }
    edit_config(made["actorder"].folder, lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"))
    edit_config(made["unknown method"].folder, lambda q: q.update(quant_method="private"))
    edit_config(made["ignored"].folder, lambda q: q["ignore"].append("re:.*down_proj"))
    edit_config(made["unknown format"].folder, lambda q: q["config_groups"]["group_0"].update(format="packed-by-hand"))
    edit_config(made["tied head"].folder, lambda q: q.update(ignore=[]))
    edit_config(made["no group format"].folder, lambda q: q["config_groups"]["group_0"].pop("format"))
    return made
