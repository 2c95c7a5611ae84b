"""A model folder with its rotation folded in: every file as it was, but for the bytes of the weights that change."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import uint8
from transformers import PreTrainedModel

from compress import checkpoint, models, side_files
from compress.checkpoint import TensorInfo
from compress.errors import CompressError
from compress.rotate.folding import Change


def write(source: Path, target: Path, model: PreTrainedModel, changes: Mapping[str, Change]) -> Path:
    """Write the changed copy of `source`, whose model is `model`, to the new folder `target`, a tensor at a time; `target`."""
    stored = checkpoint.index(source)
    names = models.loaded_names(model, stored)
    if missing := changes.keys() - names.values():
        raise CompressError(f"{source} stores {min(missing)} in parts or under another name, so it cannot be rotated.")
    size, free = sum(info.nbytes for info in stored.values()), shutil.disk_usage(target.parent).free
    if size > free:
        raise CompressError(
            f"A rotated copy needs {size / 1e9:.2f} GB while the model is compressed; the disk has {free / 1e9:.2f} GB free. "
            "Free some space, choose another -o, or leave out --rotate."
        )
    target.mkdir()
    side_files.copy(source, target)
    for beside in source.glob(checkpoint.INDEX.format("*")):
        shutil.copyfile(beside, target / beside.name)
    files: dict[Path, dict[str, TensorInfo]] = {}
    for name, info in sorted(stored.items(), key=lambda item: item[1].begin):
        files.setdefault(info.file, {})[name] = info
    for file, tensors in files.items():
        _write_file(file, target / file.name, tensors, {name: changes.get(names[name]) for name in tensors})
    return target


def _write_file(source: Path, target: Path, tensors: Mapping[str, TensorInfo], changes: Mapping[str, Change | None]) -> None:
    with safe_open(source, "pt") as file, target.open("wb") as out:
        out.write(checkpoint.header(tensors))
        for name in tensors:
            tensor, change = file.get_tensor(name), changes[name]
            changed = tensor if change is None else change(tensor)
            out.write(changed.contiguous().flatten().view(uint8).numpy().data)
