"""The only place that knows model anatomy: loading, the chain of blocks, and the layers that can be compressed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from compress import experts, folders, integrity, machine, side_files, skips, turns
from compress.errors import CompressError
from compress.turns import LOADING
from compress.weight_reads import read_by_parents

Kind = Literal["linear", "conv1d", "conv2d"]
KINDS: dict[type[nn.Module], Kind] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Conv2d: "conv2d"}
REFERENCE = folders.REFERENCE
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]
ABSURD_POSITIONS = 10_000_000  # tokenizers without a limit say 1e30
NO_TOKEN = -1  # as padding: equal to no token, so that the last token of every window is judged
SKIPPED = "skipped by request"  # why a layer is dense that a pattern of --skip matches
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Layer:
    """A layer that can be compressed, seen as a matrix: N out features, K in features (a convolution is unfolded)."""

    name: str
    kind: Kind
    N: int
    K: int


@dataclass(frozen=True)
class Anatomy:
    """Where a model can be compressed: the chain of blocks by name, their layers in order, and why others stay dense.

    A model without a chain is one block, named "".
    """

    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]
    dense: dict[str, str]

    def of_block(self, block: str) -> list[Layer]:
        return [layer for layer in self.layers if block == "" or layer.name.startswith(block + ".")]

    @property
    def in_features(self) -> dict[str, int]:
        return {layer.name: layer.K for layer in self.layers}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {layer.name: (layer.N, layer.K) for layer in self.layers}


def short_name(model: str | Path | None) -> str:
    """What results are named after: the name of the model's folder or hub repository."""
    folder = Path(REFERENCE if model is None else model)
    if not folder.is_dir():
        return folder.name
    folder = folder.resolve()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")  # named after a commit
    return folder.parent.parent.name.rpartition("--")[2] if cached else folder.name


def resolve(model: str | Path | None) -> Path:
    """The folder of a model: the embedded reference for None, a local folder, or a download of a hub id."""
    folder = folders.local(model)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise CompressError(f"There is no folder {model}, and it is not a hub id either.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CompressError(
            f"There is no folder {model}, and the hub did not give a model of that name "
            f"({type(error).__name__}). Check the spelling, the network, or HF_HUB_OFFLINE."
        ) from error


def check_source(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder that can be compressed; raises for one that cannot."""
    side_files.check(folder)
    config_file = folders.config_file(folder)
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{config_file} is not valid JSON: {error}.") from error
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise CompressError(
                f"{folder} has only pickled weights ({pickles[0]}), which are never read: they can run code. Load the model "
                "with a library you trust and save it with save_pretrained, which writes safetensors."
            )
        raise CompressError(f"{folder} has no .safetensors files; the download or the save is incomplete.")
    integrity.check_list(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise CompressError(f"{folder} is already quantized ({method}). Start from the original model.")
    return config


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The transformers class that config.json names, or AutoModel."""
    for name in config.get("architectures") or []:
        if isinstance(found := vars(transformers).get(name) or getattr(transformers, name, None), type):
            return found
    if "auto_map" in config:
        raise CompressError("The model runs its own code (auto_map in config.json), which is not supported.")
    return AutoModel  # type: ignore[return-value]


def load(folder: Path) -> PreTrainedModel:
    """The dense model in its stored dtype, in evaluation mode, its experts split, its weights memory-mapped.

    Not those of experts, which transformers stacks: they take their size in memory. Raises CompressError where weights are
    missing, which transformers would draw at random.
    """
    config = check_source(folder)
    try:
        with LOADING:
            turns.check_unbroken()
            loaded: Any = model_class(config).from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise CompressError(f"transformers cannot load {folder}: {error}") from error
    model: PreTrainedModel = loaded[0]
    integrity.check_complete(folder, model, loaded[1]["missing_keys"])
    if model.config.is_encoder_decoder:
        raise CompressError(f"{type(model).__name__} is an encoder-decoder; only models with one chain of blocks are supported.")
    _use_no_cache(model.config)
    set_padding(model, NO_TOKEN)
    model.eval()
    if model.main_input_name == "pixel_values":
        model.register_forward_pre_hook(_cast_images, with_kwargs=True)
    experts.split(model, every=True)
    return model


def _cast_images(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a model its images in the dtype that its weights have by then; calibration draws them in float32."""
    return args, {name: value.to(model.dtype) if name == "pixel_values" else value for name, value in kwargs.items()}


def _use_no_cache(config: PreTrainedConfig) -> None:
    """Have a model make no cache: its own setting, and those of the models within, as in vision-language models."""
    config.use_cache = False
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PreTrainedConfig):
            _use_no_cache(inner)


def set_padding(model: PreTrainedModel, token: int) -> None:
    """Give a text model that is no language model a padding token in memory, where its config has none.

    Classifiers of decoders judge the last token that is not padding, and refuse batches without knowing padding.
    """
    config = model.config.get_text_config()
    unknown = getattr(config, "pad_token_id", token) in (None, NO_TOKEN)
    if unknown and model.main_input_name == "input_ids" and not is_causal(model):
        config.pad_token_id = token


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CompressError(f"{folder} has no tokenizer that transformers can load: {error}") from error
    return loaded


def mask_token(folder: Path) -> int | None:
    """The id of the token that stands for a masked one, where the folder's tokenizer has one."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found: int | None = tokenizer(folder).mask_token_id
    return found


def max_positions(folder: Path) -> int | None:
    """The longest sequence the model was built for, in tokens; None where its config says none, -1, or some absurd number."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, (int, float)) and 2 <= found < ABSURD_POSITIONS else None


def device(name: str | None) -> torch.device:
    """The device to work on: the one asked for, else CUDA where there is one, else the CPU."""
    try:
        chosen = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CompressError(f"There is no device {name!r}; use cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CompressError(f"The device is {name}, but torch sees no CUDA GPU here; use --device cpu.")
    return chosen


def dtype(name: str | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run a model in: the one asked for, else `compute_dtype`."""
    if name is None:
        return compute_dtype(stored, device)
    if name not in DTYPES:
        raise CompressError(f"The dtype is {name!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The stored dtype, but on a CPU float32 for 16-bit ones that it multiplies no faster.

    float16 runs at 0.3 GFLOP/s there, and bfloat16 at 4.0 against float32's 20.3 without instructions for it (AMD EPYC, AVX2,
    one core, 2026-11-30).
    """
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not machine.bfloat16_pays())
    return torch.float32 if device.type == "cpu" and slow else stored


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token, rather than encoding its whole input."""
    return model.can_generate()


def anatomy(model: PreTrainedModel, skip: Sequence[str] = ()) -> Anatomy:
    """Find the blocks and their compressible layers.

    `skip` are regular expressions searched in layer names; raises for one that matches no layer.
    """
    patterns = skips.patterns(skip)
    candidates = {name: module for name, module in model.named_modules() if kind_of(module)}
    chain = _chain(model, candidates)
    head = list(candidates)[-1] if chain == [""] and candidates else None
    uses: dict[int, int] = {}
    for module in candidates.values():
        uses[id(weight_of(module))] = uses.get(id(weight_of(module)), 0) + 1
    embeddings = {id(weight_of(m)) for m in model.modules() if isinstance(m, nn.Embedding)}

    read = set(read_by_parents(model, candidates))
    layers, dense = [], dict.fromkeys(experts.unsplit(model), "experts in one tensor, of a kind that is not known")
    dense |= dict.fromkeys(routers := list(experts.routers(model)), "chooses experts")
    for name, module in candidates.items():
        inside = any(block == "" or name.startswith(block + ".") for block in chain)
        if not inside:
            dense[name] = "outside the blocks"
        elif name == head:
            dense[name] = "output layer"
        elif name in routers:
            continue
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            dense[name] = "grouped convolution"
        elif isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
            dense[name] = "convolution that does not pad with a fixed number of zeros"
        elif uses[id(weight_of(module))] > 1 or id(weight_of(module)) in embeddings:
            dense[name] = "tied weight"
        elif any(pattern.search(name) for pattern in patterns):
            dense[name] = SKIPPED
        elif name in read:
            dense[name] = "its weight is read by the module around it"
        else:
            N, K = matrix(module).shape
            layers.append(Layer(name, KINDS[_base(module)], N, K))
    skips.check(patterns, [*candidates, *(name for name in dense if name not in candidates)])
    if not layers:
        reasons = sorted(set(dense.values())) or ["it has no linear or convolution layers"]
        raise CompressError(f"{type(model).__name__} has nothing left to compress: {', '.join(reasons)}.")
    return Anatomy(tuple(chain), tuple(layers), dense)


def kind_of(module: nn.Module) -> Kind | None:
    """How a module multiplies, or None when it cannot be compressed."""
    base = _base(module)
    return KINDS[base] if base else None


def _base(module: nn.Module) -> Any:
    return next((base for base in KINDS if isinstance(module, base)), None)


def _chain(model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
    """Names of the blocks: the outermost ModuleList that holds most of the linear weights. [""] for a convolutional model."""
    weights = dict.fromkeys(KINDS.values(), 0)
    for module in candidates.values():
        weights[KINDS[_base(module)]] += weight_of(module).numel()
    if weights["conv2d"] > weights["linear"] + weights["conv1d"]:
        return [""]
    best, most = [""], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(weight_of(m).numel() for n, m in candidates.items() if n.startswith(name + "."))
            if inside > most:  # an outer list comes first and holds at least as much
                best, most = [f"{name}.{i}" for i in range(len(module))], inside
    return best


def loaded_names(model: PreTrainedModel, stored: Iterable[str], also: Iterable[str] = ()) -> dict[str, str]:
    """The name under which transformers loads every stored tensor; on disk, names may be older or lack the base prefix.

    `also` are names that the model will have once its layers are packed.
    """
    conversions = get_model_conversion_mapping(model)
    if experts.is_split(model):
        conversions = experts.conversions(conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    known = dict.fromkeys([*model.state_dict(), *also], True)
    names = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, known)[0] for key in stored}
    return {key: key if name not in known and key in known else name for key, name in names.items()}


def unloaded(model: PreTrainedModel, stored: Mapping[str, Sequence[int]]) -> list[str]:
    """Name the modules of stored matrices, given by shape, that transformers does not load, as heads for further tokens."""
    known = model.state_dict()
    names = loaded_names(model, stored)
    return [key.removesuffix(".weight") for key in stored if _is_matrix(key, stored[key]) and names[key] not in known]


def _is_matrix(key: str, shape: Sequence[int]) -> bool:
    return key.endswith(".weight") and len(shape) == 2


def weight_names(model: PreTrainedModel, layers: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The stored tensor that holds each layer's weight; raises for a layer whose weight is merged from several."""
    sources: dict[str, list[str]] = {}
    for key, name in loaded_names(model, stored).items():
        sources.setdefault(name, []).append(key)
    found = {layer: sources.get(f"{layer}.weight", []) for layer in layers}
    if missing := [layer for layer, keys in found.items() if len(keys) != 1]:
        raise CompressError(
            f"The checkpoint stores {missing[0]} under a name that cannot be found, or in parts ({len(missing)} such layers), "
            f"which is not supported. Leave it dense with --skip '{missing[0]}'."
        )
    return {layer: keys[0] for layer, keys in found.items()}


def weight_of(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def matrix(module: nn.Module) -> Float[Tensor, "N K"]:
    """The weight of a layer as W [N, K]; a view where possible."""
    return to_matrix(weight_of(module), "conv1d" if isinstance(module, Conv1D) else "linear")


def to_matrix(weight: Float[Tensor, "..."], kind: Kind) -> Float[Tensor, "N K"]:
    """A weight as the checkpoint stores it as W [N, K]; a view where possible."""
    return weight.t() if kind == "conv1d" else weight.flatten(1)


def from_matrix(W: Float[Tensor, "N K"], kind: Kind, shape: Sequence[int]) -> Float[Tensor, "..."]:
    """W back in the shape that the checkpoint stores. Inverse of `to_matrix`."""
    return (W.t() if kind == "conv1d" else W).reshape(*shape)
