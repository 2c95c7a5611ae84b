"""What lies beside the weights of a model: tokenizer, processor, templates, code, and folders of other modules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from compress.errors import CompressError

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite"}
WEIGHT_LISTS = (".safetensors.index.json", ".bin.index.json")
OTHER_PROGRAMS = frozenset({"onnx", "openvino", "coreml", "original"})  # folders of the same weights, as other programs read them
ADAPTER = "adapter_config.json"


def copy(source: Path, target: Path, but: tuple[str, ...] = ()) -> None:
    """Copy everything byte for byte but the model's own weights, hidden files, and the names in `but`.

    Weights in folders stay with them: those are other modules', such as the dense layers of sentence-transformers.
    """
    for relative in _files(source):
        path = source / relative
        if len(relative.parts) == 1 and (_is_weights(path) or path.name in but):
            continue
        if len(relative.parts) > 1 and relative.parts[0] in OTHER_PROGRAMS:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)


def check(source: Path) -> None:
    """Raise where an adapter's config lies beside the model: with PEFT installed, transformers then loads an adapter, too."""
    if (source / ADAPTER).is_file():
        raise CompressError(
            f"{source} has an {ADAPTER} beside the model, because of which loaders look for an adapter there. Merge the adapter "
            f"with PEFT's merge_and_unload and save the model, or move {ADAPTER} away to compress the model without it."
        )


def left_behind(source: Path) -> tuple[str, ...]:
    """Say which folders are not copied although they are no files of weights."""
    others = sorted({relative.parts[0] for relative in _files(source) if len(relative.parts) > 1} & OTHER_PROGRAMS)
    return (f"Left behind, as they hold the dense weights for other programs: {', '.join(others)}.",) if others else ()


def _files(source: Path) -> Iterator[Path]:
    """All files of a folder that are not hidden, by their paths in it."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            yield relative


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES or path.name.endswith(WEIGHT_LISTS)
