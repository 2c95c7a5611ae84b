"""The GPTQ format: the words of `compress.kernels.packing`, transposed, with float16 scales.

Zero points come in two conventions: v1 (`checkpoint_format: gptq`) stores each less one, v2 (`gptq_v2`) as it is. Symmetric
layers are written in v1, which every reader knows, asymmetric ones in v2, because v1 cannot hold a zero point of 0. Reading
asks the checkpoint's config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import names
from compress.kernels import packing
from compress.qtensor import QTensor
from compress.spec import BITS, Plan, Scheme

if TYPE_CHECKING:
    from compress.models import Layer

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
DAMPING = 0.01  # readers insist on a value; nothing reads it back


def check_grid(scheme: Scheme) -> None:
    """Raise for what is not whole numbers."""
    if scheme.form != "int":
        raise CompressError(f"The gptq format cannot hold grid {scheme.grid}; use --format compressed-tensors or dense.")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG001 - the format has one answer
    """Scales are float16 whatever the model's dtype."""
    return torch.float16


def encode(q: QTensor, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """`qweight [W, N]`, `qzeros [G, .]` packed along N, `scales [G, N]` and `g_idx [K]`.

    `config` is the checkpoint's that `q` was read from and goes back to, with whatever scales that has; None means ours, and
    ValueError unless scales are float16.
    """
    if config is None and q.scales.dtype != torch.float16:
        raise ValueError(f"GPTQ stores float16 scales, got {q.scales.dtype}; solve with scale_dtype(model dtype)")
    bits, (_, K) = q.scheme.bits, q.shape
    stored = (q.zeros - _offset(q.scheme, config)) & (q.scheme.levels - 1)
    return {
        "qweight": packing.pack(q.codes, bits).T.contiguous(),
        "qzeros": packing.pack(stored.T.contiguous(), bits),
        "scales": q.scales.T.contiguous(),
        "g_idx": _contiguous_groups(K, q.scheme, q.codes.device) if q.g_idx is None else q.g_idx.int(),
    }


def layout(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    N, K = shape
    G = math.ceil(K / scheme.group(K))  # others' checkpoints may end in a short group
    return {
        "qweight": (torch.int32, (packing.words_per_row(K, scheme.bits), N)),
        "qzeros": (torch.int32, (G, packing.words_per_row(N, scheme.bits))),
        "scales": (scale_dtype, (G, N)),
        "g_idx": (torch.int32, (K,)),
    }


def decode(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], config: Mapping[str, Any] | None = None
) -> QTensor:
    """The QTensor that `encode` wrote, or that another tool did with the convention its `config` names."""
    N, K = shape
    for key, (_, expected) in layout(scheme, shape, tensors["scales"].dtype).items():
        if key not in tensors or tuple(tensors[key].shape) != expected:
            found = list(tensors[key].shape) if key in tensors else "absent"
            raise CompressError(f"{key} of an {scheme} layer [{N}, {K}] should be {list(expected)}, but is {found}.")
    stored = packing.unpack(tensors["qzeros"], scheme.bits, N).T.contiguous()
    zeros = (stored + _offset(scheme, config)) & (scheme.levels - 1)
    codes = packing.unpack(tensors["qweight"].T.contiguous(), scheme.bits, K)
    plain = K % scheme.group(K) == 0 and torch.equal(tensors["g_idx"], _contiguous_groups(K, scheme, codes.device))
    return QTensor(codes, tensors["scales"].T.contiguous(), zeros, scheme, None if plain else tensors["g_idx"].clone())


def _contiguous_groups(K: int, scheme: Scheme, device: torch.device) -> Tensor:
    return (torch.arange(K, device=device) // scheme.group(K)).int()


def _offset(scheme: Scheme, config: Mapping[str, Any] | None) -> int:
    """What is subtracted from a zero point before it is stored."""
    version = (V1 if scheme.symmetric else V2) if config is None else checkpoint_format(config)
    return 1 if version == V1 else 0


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """The convention that a config names; v1 when it names none, as readers assume."""
    version = str(config.get("checkpoint_format") or config.get("format") or V1)
    if version not in (V1, V2):
        raise CompressError(f"The checkpoint has the GPTQ layout {version!r}; only {V1} and {V2} can be read.")
    return version


def config(plan: Plan, layers: Sequence[Layer], dense_modules: Sequence[str]) -> dict[str, Any]:
    """The most common scheme at the top, and a `dynamic` rule for every other and for linears left dense inside blocks.

    Raises for convolutions and for plans that mix symmetric and asymmetric layers: the format has one zero point convention.
    """
    from compress import __version__

    if convolutions := [layer.name for layer in layers if layer.kind == "conv2d" and plan.layers[layer.name].scheme]:
        raise CompressError(
            f"{convolutions[0]} is a convolution, which the gptq format cannot hold; use compressed-tensors or dense."
        )
    by_scheme: dict[Scheme | None, list[str]] = {}
    for layer in layers:
        by_scheme.setdefault(plan.layers[layer.name].scheme, []).append(layer.name)
    dense = [*by_scheme.pop(None, []), *(name for name in dense_modules if names.block_number(name) is not None)]
    schemes = {scheme: members for scheme, members in by_scheme.items() if scheme is not None}
    if not schemes:
        raise CompressError("The plan leaves every layer dense; use the dense format.")
    for scheme in schemes:
        check_grid(scheme)
    if len({scheme.symmetric for scheme in schemes}) > 1:
        raise CompressError("The plan mixes symmetric and asymmetric layers, which the gptq format cannot hold; choose one.")
    common = max(schemes, key=lambda scheme: len(schemes[scheme]))
    version = V1 if common.symmetric else V2
    lists = {names.block_list(name) for members in schemes.values() for name in members}
    rules = _dynamic(schemes, common, dense, names.shared_root([*plan.layers, *dense_modules]))
    return {
        "quant_method": METHOD,
        "method": METHOD,
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": common.symmetric,
        "desc_act": False,
        "lm_head": False,
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "damp_percent": DAMPING,
        **({"block_name_to_quantize": lists.pop()} if len(lists) == 1 else {}),
        **({"dynamic": rules} if rules else {}),
        "meta": {"quantizer": [f"compress-toolkit:{__version__}"]},
    }


def _dynamic(
    schemes: Mapping[Scheme, Sequence[str]], common: Scheme, dense: Sequence[str], root: str
) -> dict[str, dict[str, Any]]:
    """Ordered rules, first match wins. vLLM asks them about the layers it fuses, so those names are listed too."""
    rules: dict[str, dict[str, Any]] = {}
    for pattern in names.patterns([*dense, *names.fused_sets(dense)], root):
        rules["-:" + pattern] = {}
    for scheme, members in schemes.items():
        if scheme != common:
            values = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            for pattern in names.patterns([*members, *names.fused_sets(members)], root):
                rules["+:" + pattern] = values
    for pattern in names.patterns((name for name in schemes[common] if names.block_number(name) is None), root):
        rules["+:" + pattern] = {}
    return rules


def scheme_of(config: Mapping[str, Any], name: str, class_name: str) -> Scheme | None:
    """The scheme of a linear that the config covers: one inside a list of blocks, or that a rule names, or a quantized head.

    The config does not list modules: a linear without `qweight` in the file is dense, whatever this says.
    """
    if class_name not in ("Linear", "Conv1D"):
        return None
    checkpoint_format(config)
    if not covers(config, name):
        return None
    values = {**config, **(rule_of(config, name) or {})}
    if missing := [key for key in ("bits", "group_size") if key not in values]:
        raise CompressError(f"The checkpoint's quantization_config lacks {' and '.join(missing)}.")
    if values["bits"] not in BITS:
        raise CompressError(f"{name} has {values['bits']} bits; only {', '.join(map(str, BITS))} can be read.")
    return Scheme(values["bits"], values["group_size"], bool(values.get("sym", True)))


def rule_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | Literal[False] | None:
    """The `dynamic` rule for a module: its overrides, False for one left dense, None when no rule matches."""
    rules: Mapping[str, Mapping[str, Any]] = config.get("dynamic") or {}
    for pattern, values in rules.items():
        skip = pattern.startswith("-:")
        if re.match(pattern[2:] if skip or pattern.startswith("+:") else pattern, name):
            return False if skip else values
    return None


def covers(config: Mapping[str, Any], name: str) -> bool:
    """Whether the config, as its readers take it, calls a linear quantized."""
    if (rule := rule_of(config, name)) is not None:
        return rule is not False
    if name.rpartition(".")[2] == "lm_head":
        return bool(config.get("lm_head"))
    listed = [
        part
        for parts in config.get("modules_in_block_to_quantize") or []
        for part in ([parts] if isinstance(parts, str) else parts)
    ]
    return names.block_number(name) is not None and (not listed or name.endswith(tuple(listed)))
