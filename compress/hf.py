"""Packed checkpoints in transformers: `load`, and `enable_transformers`, after which `from_pretrained` keeps weights packed.

transformers chooses how to read a quantized checkpoint from two mappings keyed by `quant_method`. `enable_transformers` puts a
config class and a quantizer of ours into both for the two formats, for checkpoints that we can serve; the others still go to
the stock classes, where the packages these need are installed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config

from compress import checkpoint, experts, models, turns
from compress.checkpoint import PLAN
from compress.errors import CompressError
from compress.formats import PackedFormat, compressed_tensors, gptq, packed_format, sparse
from compress.formats.rules import EXPERT, PACKED_SUFFIXES
from compress.nn import (
    PackedWeight,
    Restored,
    Stack,
    StackedExperts,
    StackedLinear,
    stack,
    use_sparse_kernels,
)
from compress.placeholder import Layout, Placeholder, matrix_shape
from compress.qtensor import QTensor
from compress.spec import BITS, Plan, Scheme
from compress.turns import LOADING

CLASS_NAMES = {"linear": "Linear", "conv1d": "Conv1D", "conv2d": "Conv2d"}
PLACE: ContextVar[torch.device | None] = ContextVar("PLACE", default=None)  # where weights are packed; None for where they are
STOCK_NEEDS = {compressed_tensors.METHOD: ["compressed_tensors"], gptq.METHOD: ["optimum", "gptqmodel"]}


def load(path: str | Path | None, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A compressed (or dense) checkpoint, its weights packed, ready to run on `device`: CUDA where there is one, else the CPU.

    On CUDA, layers pruned to two of four weights go through torch's kernels for those where they fit.
    `dtype` is the activations': "auto" is the stored one. On a CPU bfloat16 is the fast one, and float32 the exact one.
    """
    folder = models.resolve(path)
    checkpoint.verify(folder)
    architecture: Any = models.model_class(_config(folder))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with LOADING, enable_transformers(), _packed_on(place):
        try:
            if (weights := _sparse(folder)) is None:
                model, info = architecture.from_pretrained(folder, **options)
            else:
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                model, info = architecture.from_pretrained(None, config=config, state_dict=weights, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise CompressError(f"transformers cannot load {folder}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise CompressError(
            f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more tensors' if missing[1:] else ''}, which "
            f"{architecture.__name__} needs. Copy or make it again; from_pretrained would fill it with random numbers."
        )
    loaded: PreTrainedModel = model.to(place)
    if loaded.device.type == "cuda":
        use_sparse_kernels(loaded, _two_of_four(folder))
        stack(loaded)
    return loaded


@contextmanager
def _packed_on(place: torch.device) -> Iterator[None]:
    """Lay weights out on a device while they are loaded, wherever transformers loads the stored tensors to."""
    token = PLACE.set(place)
    try:
        yield
    finally:
        PLACE.reset(token)


def _two_of_four(folder: Path) -> list[str]:
    """The layers without a grid that a folder's plan prunes to two of four, where it has a plan."""
    if not (folder / PLAN).is_file():
        return []
    layers = Plan.load(folder / PLAN).layers
    return [name for name, spec in layers.items() if spec.scheme is None and spec.sparsity and spec.sparsity.nm == (2, 4)]


def _sparse(folder: Path) -> dict[str, Tensor] | None:
    """All tensors of a folder whose zeros were left out, with them again; None for any other folder."""
    stored = checkpoint.index(folder)
    if not sparse.is_packed(stored):
        return None
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in stored.values()}):
        tensors |= load_file(file)
    for prefix in [name.removesuffix(sparse.SUFFIXES[0]) for name in stored if name.endswith(sparse.SUFFIXES[0])]:
        parts = {suffix: tensors.pop(prefix + suffix) for suffix in sparse.SUFFIXES}
        tensors[prefix + "weight"] = sparse.unpack(parts)
    return tensors


@dataclass(frozen=True)
class Undo:
    """Puts transformers' own classes back: call it, or leave the `with` block. A second time does nothing."""

    configs: Mapping[str, Any]
    quantizers: Mapping[str, Any]
    from_pretrained: Any = None  # transformers' own, which is replaced by one that takes turns

    def __call__(self) -> None:
        with LOADING:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(self.configs)
            auto.AUTO_QUANTIZER_MAPPING.update(self.quantizers)
            if self.from_pretrained is not None:
                turns.set_from_pretrained(self.from_pretrained)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self()


def enable_transformers() -> Undo:
    """Make `from_pretrained` keep packed what `kernels.dispatch` can serve, until the returned undo is called.

    Where it is already so, nothing changes and the undo does nothing: the outermost one counts. Loads then take turns, as
    those of transformers are not safe in threads.
    """
    with LOADING:
        turns.check_unbroken()
        return _enabled()


def _enabled() -> Undo:
    if all(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] is ours for method, ours in CONFIGS.items()):
        return Undo({}, {})
    undo = Undo(
        {method: auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] for method in CONFIGS},
        {method: auto.AUTO_QUANTIZER_MAPPING[method] for method in CONFIGS},
        vars(PreTrainedModel)["from_pretrained"],
    )
    turns.set_from_pretrained(turns.in_turns(undo.from_pretrained))
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(CONFIGS)
    quantizers: Mapping[str, Any] = {method: _quantizer(before) for method, before in undo.quantizers.items()}
    auto.AUTO_QUANTIZER_MAPPING.update(quantizers)
    return undo


class _AsWritten:
    """A `quantization_config` that stays what the checkpoint says, key for key, through loading and saving."""

    stock_class: ClassVar[Any]
    dequantize = False

    def __init__(self, **document: Any) -> None:
        self.document = document
        self.quant_method = quantization_config.QuantizationMethod(document["quant_method"])

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Any:
        """Ours for a checkpoint that we can serve, else transformers' own; raises where that one's packages are missing."""
        try:
            _check_servable(document)
        except CompressError as error:
            needed = STOCK_NEEDS[document["quant_method"]]
            if absent := [package for package in needed if importlib.util.find_spec(package) is None]:
                raise CompressError(
                    f"{error} Installing {' and '.join(absent)} may let transformers load it unpacked."
                ) from error
            return cls.stock_class.from_dict(document)
        return cls(**document)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.document)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


# These two have their bases' names because transformers compares the name of a checkpoint's class with that of the class a
# user passes as `quantization_config`, whose loading attributes it then sets on the former.


class CompressedTensorsConfig(_AsWritten, quantization_config.CompressedTensorsConfig):  # type: ignore[misc]
    stock_class = quantization_config.CompressedTensorsConfig


class GPTQConfig(_AsWritten, quantization_config.GPTQConfig):  # type: ignore[misc]
    stock_class = quantization_config.GPTQConfig


def _check_servable(document: Mapping[str, Any]) -> None:
    """Raise for a `quantization_config` that holds a scheme without a kernel, naming it."""
    if document["quant_method"] == gptq.METHOD:
        gptq.checkpoint_format(document)
        if (word := document.get("pack_dtype", "int32")) != "int32":
            raise CompressError(f"The checkpoint packs its codes into {word}; only int32 can be read.")
        for rule in ({}, *(document.get("dynamic") or {}).values()):
            if (bits := {**document, **rule}["bits"]) not in BITS:
                raise CompressError(
                    f"The checkpoint has {bits}-bit layers; only {', '.join(map(str, BITS))} can be served packed."
                )
        return
    compressed_tensors.check_config(document)
    for group in compressed_tensors.groups(document).values():
        compressed_tensors.scheme_of_group(group, document)


def _quantizer(before: Callable[..., HfQuantizer]) -> Callable[..., HfQuantizer]:
    """What takes the place of transformers' quantizer `before`: ours for our configs, unless a dense model was asked for."""

    def choose(config: Any, **options: Any) -> HfQuantizer:
        if not isinstance(config, (CompressedTensorsConfig, GPTQConfig)):
            return before(config, **options)
        if config.dequantize:
            stock: Any = config.stock_class
            return before(stock.from_dict({**config.document, "dequantize": True}), **options)
        return PackedQuantizer(config, **options)

    return choose


class PackedQuantizer(HfQuantizer):
    """Swaps layers for placeholders that transformers loads the stored tensors into, and those for packed layers."""

    requires_calibration = True
    is_trainable = False

    def __init__(self, config: CompressedTensorsConfig | GPTQConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.document: dict[str, Any] = config.document
        self.splits = False  # experts that are packed one by one, which transformers would merge

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise CompressError("Packed weights cannot be offloaded; choose a device_map of GPUs alone, or of the CPU alone.")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        form = packed_format(self.document)
        if self.document["quant_method"] == compressed_tensors.METHOD and _has_packed_experts(checkpoint_files):
            experts.split(model, every=False)
            self.splits = experts.is_split(model)
        planned = {
            name: Placeholder(module, scheme, form.layout(scheme, matrix_shape(module), torch.float16))
            for name, module, scheme in _quantized_layers(model, self.document)
        }
        names = [f"{name}.{key}" for name, placeholder in planned.items() for key in placeholder.layout]
        stored = _stored(model, checkpoint_files, names)
        for name, placeholder in planned.items():
            if self.document["quant_method"] == gptq.METHOD and f"{name}.qweight" not in stored and f"{name}.weight" in stored:
                continue  # its config does not list modules: what is stored dense is dense
            placeholder.expect(name, stored)
            model.set_submodule(name, placeholder)
        _check_all_used(model, stored, form.layout(Scheme(symmetric=False), (1, Scheme().group_size), torch.float16))

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Called by transformers, before 5.23 without the model."""
        known: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call]
        return experts.conversions(known) if self.splits else known

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        form, place = packed_format(self.document), PLACE.get()
        for name, module in list(model.named_modules()):
            if isinstance(module, Placeholder):
                tensors = {key: tensor.to(place or tensor.device) for key, tensor in module.named_buffers()}
                try:
                    q = form.decode(tensors, module.scheme, matrix_shape(module.dense), self.document)
                except CompressError as error:
                    raise CompressError(f"{name}: {error}") from error
                model.set_submodule(name, module.packed(q))
        if model.device.type == "cuda":
            stack(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the tensors that were loaded, made from the packed layers."""
        form = packed_format(self.document)
        state: dict[str, Tensor] = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, PackedWeight):
                for key in module.packed.tensors:
                    del state[f"{name}.{key}"]
            if isinstance(module, Stack):
                state.pop(f"{name}.bias", None)
            elif isinstance(module, (PackedWeight, StackedLinear)):
                shared = module.packed.global_scale if isinstance(module, PackedWeight) else 1.0
                tensors = _encoded(form, module.restore(), module.scheme, self.document, shared)
                tensors |= {} if module.bias is None else {"bias": module.bias.data}
                state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
            elif isinstance(module, StackedExperts):
                for key in list(module.state_dict()):
                    del state[f"{name}.{key}"]
                for part, scheme, restored in module.parts():
                    tensors = _encoded(form, restored, scheme, self.document)
                    state |= {f"{name}.{part}.{key}": tensor for key, tensor in tensors.items()}
        return state, {}


def _encoded(
    form: PackedFormat, restored: Restored, scheme: Scheme, document: Mapping[str, Any], global_scale: float = 1.0
) -> dict[str, Tensor]:
    codes, scales, zeros, g_idx = restored
    return form.encode(QTensor(codes, scales, zeros, scheme, g_idx, global_scale=global_scale), document)


def _quantized_layers(model: PreTrainedModel, document: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module, Scheme]]:
    """Layers that the config calls quantized; a tied one never is, whatever its class."""
    form = packed_format(document)
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    for name, module in model.named_modules():
        kind = models.kind_of(module)
        if kind is not None and name not in tied:
            scheme = form.scheme_of(document, name, CLASS_NAMES[kind])
            if scheme is not None:
                yield name, module, scheme


def _has_packed_experts(files: Sequence[str] | None) -> bool:
    for file in files or ():
        with safe_open(file, framework="pt") as tensors:
            if any(EXPERT.search(key) and key.endswith(PACKED_SUFFIXES) for key in tensors.keys()):  # noqa: SIM118 - no mapping
                return True
    return False


def _stored(model: PreTrainedModel, files: Sequence[str] | None, names: Iterable[str]) -> Layout:
    """Dtype and shape of every stored tensor under the name that transformers loads it to; `names` the model will also have."""
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for file in files or ():
        if not file.endswith(".safetensors"):
            raise CompressError(f"{file} is not a safetensors file; packed weights are read from no other.")
        with safe_open(file, framework="pt") as tensors:
            for key, name in models.loaded_names(model, tensors.keys(), names).items():
                entry = tensors.get_slice(key)
                stored[name] = (checkpoint.DTYPES.get(entry.get_dtype(), torch.uint8), tuple(entry.get_shape()))
    return stored


def _check_all_used(model: PreTrainedModel, stored: Layout, suffixes: Iterable[str]) -> None:
    """Raise for packed tensors inside the model that nothing will load: their layer would get random weights.

    A head that this class does not have, and what the class itself says to ignore, is no loss.
    """
    endings = tuple("." + suffix for suffix in suffixes)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    known = set(model.state_dict())
    children = {name for parent in (model, model.base_model) for name, _ in parent.named_children()}
    for name in stored:
        inside = name.removeprefix(model.base_model_prefix + ".").split(".")[0] in children and name.endswith(endings)
        if inside and name not in known and not any(pattern.search(name) for pattern in ignored):
            raise CompressError(
                f"The checkpoint has {name}, but {type(model).__name__} has no layer there that can be served packed: "
                "embeddings, layers that the config calls dense, and experts in the gptq format or of a kind that is not known "
                "are not supported."
            )


def _config(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressError(f"{folder} has no readable config.json: {error}.") from error
    return document


CONFIGS = MappingProxyType({compressed_tensors.METHOD: CompressedTensorsConfig, gptq.METHOD: GPTQConfig})
