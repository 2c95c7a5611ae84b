"""What a checkpoint holds, seen from config.json and the headers of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from compress.errors import CompressError
from compress.formats import FORMATS, compressed_tensors, gptq
from compress.kernels import packing
from compress.spec import PER_ROW, Plan, Scheme

if TYPE_CHECKING:
    from compress.models import Layer

DENSE = "dense"  # the method of a checkpoint without quantization_config
EMBEDDING = re.compile(r"embed|^wte$|^wpe$")  # in a module's own name
STORAGE_BITS = {"I32": 32}  # of one element of a packed tensor; 8 in every other format
DTYPE_NAMES = {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
MARKERS = {compressed_tensors.METHOD: ".weight_scale", gptq.METHOD: ".qweight"}  # the tensor that every quantized module has


@runtime_checkable
class Header(Protocol):
    """A tensor's safetensors dtype name and shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Planned:
    """The header of a tensor that is not written yet."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """A quantized module of a checkpoint. `K` of a per-row module may be too large by less than a word's worth of codes.

    `scheme` is None where the config does not cover the module or `problem` says what is beyond us; `group` is its
    compressed-tensors config group.
    """

    name: str
    N: int
    K: int
    scheme: Scheme | None
    problem: str | None
    group: Mapping[str, Any] | None
    tensors: Mapping[str, Header]

    @property
    def settings(self) -> Scheme | str:
        """What must be equal for two modules to count as quantized alike."""
        return self.scheme or str(self.group and self.group.get("weights"))


@dataclass(frozen=True)
class Facts:
    """A checkpoint: config.json, tensor headers by name, quantized modules, and names of dense matrices."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Header]
    modules: Sequence[Module]
    dense: Sequence[str]

    @property
    def quantization(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or {}

    @property
    def method(self) -> str:
        return str(self.quantization.get("quant_method")) if self.quantization else DENSE

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [""])[0])


def gather(config: Mapping[str, Any], tensors: Mapping[str, Header]) -> Facts:
    """The facts of a checkpoint from its parsed config.json and tensor index."""
    modules = sorted(_modules(config.get("quantization_config") or {}, tensors), key=lambda module: _natural(module.name))
    quantized = {module.name for module in modules}
    matrices = (
        name.removesuffix(".weight") for name, header in tensors.items() if name.endswith(".weight") and len(header.shape) == 2
    )
    return Facts(config, tensors, modules, sorted((name for name in matrices if name not in quantized), key=_natural))


def planned(
    plan: Plan, layers: Sequence[Layer], format_name: str, config: Mapping[str, Any], dense_modules: Sequence[str]
) -> Facts:
    """The facts of the checkpoint that a plan will become; `config` is the dense model's config.json."""
    chosen = FORMATS[format_name]
    quantization = chosen.config(plan, layers, dense_modules)
    tensors: dict[str, Header] = {f"{name}.weight": Planned("F16", (1, 1)) for name in dense_modules}
    for layer in layers:
        scheme = plan.layers[layer.name].scheme
        if scheme is None or quantization is None:
            tensors[f"{layer.name}.weight"] = Planned("F16", (layer.N, layer.K))
            continue
        for suffix, (dtype, shape) in chosen.layout(scheme, (layer.N, layer.K), torch.float16).items():
            tensors[f"{layer.name}.{suffix}"] = Planned(DTYPE_NAMES.get(dtype, "F16"), shape)
    return gather({**config, "quantization_config": quantization}, tensors)


def _modules(quantization: Mapping[str, Any], tensors: Mapping[str, Header]) -> Iterator[Module]:
    method = quantization.get("quant_method")
    if method not in MARKERS:
        return
    marker, build = MARKERS[method], _gptq_module if method == gptq.METHOD else _compressed_tensors_module
    owned: dict[str, dict[str, Header]] = {name.removesuffix(marker): {} for name in tensors if name.endswith(marker)}
    for name, header in tensors.items():
        parent, _, suffix = name.rpartition(".")
        if parent in owned:
            owned[parent][suffix] = header
    for name, parts in owned.items():
        yield build(quantization, name, parts)


def _compressed_tensors_module(quantization: Mapping[str, Any], name: str, parts: Mapping[str, Header]) -> Module:
    scheme, problem, group = None, None, None
    try:
        group = compressed_tensors.group_of(quantization, name, class_name(name))
        scheme = compressed_tensors.scheme_of_group(group, quantization) if group else None
    except CompressError as error:
        problem = str(error)
    stored = parts.get("weight_packed") or parts.get("weight") or parts["weight_scale"]
    bits = ((group or {}).get("weights") or {}).get("num_bits", 8)
    return Module(name, stored.shape[0], _columns(parts, stored, scheme, bits), scheme, problem, group, parts)


def _columns(parts: Mapping[str, Header], stored: Header, scheme: Scheme | None, bits: int) -> int:
    if "weight_packed" in parts and scheme is not None and scheme.group_size != PER_ROW:
        return parts["weight_scale"].shape[-1] * scheme.group_size
    return stored.shape[-1] * (STORAGE_BITS.get(stored.dtype, 8) // bits if "weight_packed" in parts else 1)


def _gptq_module(quantization: Mapping[str, Any], name: str, parts: Mapping[str, Header]) -> Module:
    scheme, problem = None, None
    try:
        scheme = gptq.scheme_of(quantization, name, "Linear")
    except CompressError as error:
        problem = str(error)
    W, N = parts["qweight"].shape
    bits = scheme.bits if scheme else int(quantization.get("bits", 4))
    K = parts["g_idx"].shape[0] if "g_idx" in parts else W * packing.WORD // bits
    return Module(name, N, K, scheme, problem, None, parts)


def class_name(name: str) -> str:
    """The class that a module's own name suggests, as far as configs tell classes apart."""
    return "Embedding" if EMBEDDING.search(name.rpartition(".")[2]) else "Linear"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
