"""compressed-tensors' `pack-quantized` and, for grids of floating-point numbers, the layouts of `ct_floats`.

Only the subset that stock transformers and vLLM read exactly.

A 3-bit row is one dense bit stream, which is what readers expect since compressed-tensors 0.18; older ones used another layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import ct_floats, names
from compress.kernels import packing
from compress.qtensor import QTensor
from compress.spec import BITS, FIXED, PER_ROW, Grid, Plan, Scheme

if TYPE_CHECKING:
    from compress.models import Kind, Layer

METHOD = "compressed-tensors"
PACK_QUANTIZED = "pack-quantized"
VERSION = "0.18.0"  # the first that reads 3 bits as one stream; readers of the other widths do not look
MIXED = "mixed-precision"  # the global format where groups have different ones
MODULE_TYPES: Mapping[Kind, str] = {"conv1d": "Conv1D", "conv2d": "Conv2d"}
CONFIG_KEYS = ("transform_config", "kv_cache_scheme")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are stored in the model's dtype; readers compute in it."""
    return model_dtype


def encode(q: QTensor, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:  # noqa: ARG001 - tells nothing here
    """`weight_packed [N, W]`, `weight_scale [N, G]`, `weight_shape` and, when asymmetric, `weight_zero_point` packed along N."""
    if q.g_idx is not None:
        raise CompressError("A layer with reordered groups (g_idx) cannot be written as compressed-tensors; use the gptq format.")
    if q.scheme.form != "int":
        return ct_floats.encode(q)
    bits = q.scheme.bits
    tensors = {
        "weight_packed": packing.pack(q.codes, bits),
        "weight_scale": q.scales.clone(),
        "weight_shape": torch.tensor(q.shape),
    }
    if not q.scheme.symmetric:
        tensors["weight_zero_point"] = packing.pack(q.zeros.T.contiguous(), bits).T.contiguous()
    return tensors


def layout(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if scheme.form != "int":
        return ct_floats.layout(scheme, shape, scale_dtype)
    N, K = shape
    G = scheme.groups(K)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (N, packing.words_per_row(K, scheme.bits))),
        "weight_scale": (scale_dtype, (N, G)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (packing.words_per_row(N, scheme.bits), G))
    return tensors


def decode(
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    config: Mapping[str, Any] | None = None,  # noqa: ARG001 - the tensors tell everything here
) -> QTensor:
    """The QTensor that `encode` wrote; raises when the tensors do not have the shapes that `scheme` asks for."""
    N, K = shape
    if K % scheme.group(K):
        raise CompressError(f"group size {scheme.group_size} does not divide {K} inputs; no reader takes such a layer.")
    for key, (_, expected) in layout(scheme, shape, tensors["weight_scale"].dtype).items():
        if key not in tensors or tuple(tensors[key].shape) != expected:
            found = list(tensors[key].shape) if key in tensors else "absent"
            old = " Before compressed-tensors 0.18 it was packed in another way: quantize again." if scheme.bits == 3 else ""
            raise CompressError(f"{key} of an {scheme} layer [{N}, {K}] should be {list(expected)}, but is {found}.{old}")
    if scheme.form != "int":
        return ct_floats.decode(tensors, scheme, shape)
    scales = tensors["weight_scale"].clone()
    if scheme.symmetric:
        zeros = torch.full_like(scales, scheme.zero, dtype=torch.uint8)
    else:
        zeros = packing.unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, N).T.contiguous()
    return QTensor(packing.unpack(tensors["weight_packed"], scheme.bits, K), scales, zeros, scheme)


def config(plan: Plan, layers: Sequence[Layer], dense_modules: Sequence[str]) -> dict[str, Any]:
    """One group per scheme, with targets that exclude each other, and `ignore` for the linears left dense.

    Layers that are not `nn.Linear` get groups with a key `module_type`, which stock loaders reject: they cannot read such
    layers and would otherwise leave them with random weights.
    """
    groups: dict[tuple[str, Scheme], list[str]] = {}
    ignored = list(dense_modules)
    for layer in layers:
        spec = plan.layers[layer.name]
        if spec.scheme is not None:
            groups.setdefault((MODULE_TYPES.get(layer.kind, "Linear"), spec.scheme), []).append(layer.name)
        elif layer.kind == "linear":
            ignored.append(layer.name)
    if not groups:
        raise CompressError("The plan leaves every layer dense; use the dense format.")
    everyone = [*plan.layers, *ignored]
    root = names.shared_root(everyone)
    one_scheme = sum(kind == "Linear" for kind, _ in groups) == 1
    entries = []
    for (kind, scheme), members in groups.items():
        targets = ["Linear"] if kind == "Linear" and one_scheme else _regexes(members, everyone, root)
        entries.append(_group(scheme, targets) | ({} if kind == "Linear" else {"module_type": kind}))
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": formats.pop() if len(formats := {entry["format"] for entry in entries}) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": entry for i, entry in enumerate(entries)},
        "ignore": [name for name in ignored if "." not in name]
        + _regexes((name for name in ignored if "." in name), everyone, root),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _regexes(members: Iterable[str], everyone: Iterable[str], root: str) -> list[str]:
    return ["re:" + pattern for pattern in names.patterns(names.with_whole_experts(members, everyone), root)]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    per_row = scheme.group_size == PER_ROW
    weights = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.form == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": ct_floats.STRATEGIES.get(scheme.grid) or ("channel" if per_row else "group"),
        "group_size": None if per_row else scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": ct_floats.FORMATS.get(scheme.grid, PACK_QUANTIZED),
    }


def scheme_of(config: Mapping[str, Any], name: str, class_name: str) -> Scheme | None:
    """The scheme of a module: exact names win over expressions, those over class names, as in compressed-tensors itself."""
    check_config(config)
    group = group_of(config, name, class_name)
    return None if group is None else scheme_of_group(group, config)


def group_of(config: Mapping[str, Any], name: str, class_name: str) -> Mapping[str, Any] | None:
    """The config group whose targets match a module best; None when none does or it is ignored."""
    if any(_matches(target, name) or target == class_name for target in config.get("ignore") or ()):
        return None
    known = groups(config)
    targets = sorted(
        (target == class_name, target.startswith("re:"), target, key)
        for key, group in known.items()
        for target in group["targets"]
        if _matches(target, name) or target == class_name
    )
    return known[targets[0][-1]] if targets else None


def groups(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The config groups; one that only names a preset, with a list of targets, gets weights that say so."""
    return {
        key: group if isinstance(group, Mapping) else {"targets": group, "weights": {"preset": key}}
        for key, group in (config.get("config_groups") or {}).items()
    }


def _matches(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def check_config(config: Mapping[str, Any]) -> None:
    """Raise for what changes a whole checkpoint and is not supported here."""
    if (status := config.get("quantization_status")) != "compressed":
        raise CompressError(f"The checkpoint's quantization_status is {status!r}; save it compressed to read it here.")
    if present := [key for key in CONFIG_KEYS if config.get(key)]:
        raise CompressError(
            f"The checkpoint has a {present[0]}, which is not supported: leaving it out would change the results."
        )
    if (config.get("sparsity_config") or {}).get("targets"):
        raise CompressError(
            "The checkpoint has a sparsity_config with targets, a format that its own readers dropped; save it dense."
        )


def scheme_of_group(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config group spells out, None for one without weights; raises for one beyond us, saying which part."""
    weights = group.get("weights")
    if weights is None:
        return None
    if unreadable := [reason for reason in _beyond_us(group, weights, config) if reason]:
        raise CompressError(
            f"The config group of {', '.join(group['targets'][:3])} has {unreadable[0]}, which cannot be read here."
        )
    grid = _grid(group, config)
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") == PER_ROW else "group")
    size = PER_ROW if strategy == "channel" else weights["group_size"]
    return Scheme(weights.get("num_bits", 8), size, weights.get("symmetric", True), grid or "int")


def _grid(group: Mapping[str, Any], config: Mapping[str, Any]) -> Grid | None:
    """The grid that a group's format holds; None for a format beyond us."""
    written = str(group.get("format") or config.get("format"))
    return "int" if written == PACK_QUANTIZED else ct_floats.GRIDS.get(written)


def _beyond_us(group: Mapping[str, Any], weights: Mapping[str, Any], config: Mapping[str, Any]) -> list[str | None]:
    written = group.get("format") or config.get("format")
    kind, bits, order = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("actorder")
    strategy, grid = weights.get("strategy"), _grid(group, config)
    grouped = strategy in ("group", "channel") or (strategy is None and weights.get("group_size") is not None)
    known = kind == "int" and bits in BITS
    if grid and grid != "int":
        known, grouped = kind == "float" and bits == FIXED[grid].bits, strategy == ct_floats.STRATEGIES[grid]
    return [
        f"the preset {weights['preset']}, which does not spell out its scheme" if "preset" in weights else None,
        f"format {written}" if grid is None else None,
        "quantized activations" if group.get("input_activations") or group.get("output_activations") else None,
        f"{bits}-bit {kind} weights in format {written}" if not known else None,
        f"scales per {strategy}" if not grouped else None,
        f"actorder {order}" if order in (True, "group", "dynamic") else None,
        "dynamic weight quantization" if weights.get("dynamic") else None,
    ]
