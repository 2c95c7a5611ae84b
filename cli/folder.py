"""A checkpoint folder as `check` and `inspect` see it: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.checkpoint import TensorInfo
    from compress.formats.facts import Facts

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read(path: str) -> tuple[Facts, dict[str, TensorInfo]]:
    """Facts and tensor index of a folder; raises CompressError for one that is missing, incomplete, damaged or pickled."""
    from compress import checkpoint
    from compress.errors import CompressError
    from compress.formats import facts

    folder = Path(path)
    if not folder.is_dir():
        raise CompressError(f"There is no folder {path}; give one that holds config.json and .safetensors files.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CompressError(f"{folder} has no config.json; it is not a saved transformers model.") from error
    except (OSError, ValueError) as error:
        raise CompressError(f"{folder / 'config.json'} is damaged: {error}. Copy or make it again.") from error
    if not isinstance(config, dict):
        raise CompressError(f"{folder / 'config.json'} holds no JSON object; it is not a model's configuration.")
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles and not list(folder.glob("*.safetensors")):
        raise CompressError(
            f"{folder} has only pickled weights ({pickles[0]}), which are never read: they can run code. Load the model with a "
            "library you trust and save it with save_pretrained, which writes safetensors."
        )
    tensors = checkpoint.index(folder)
    return facts.gather(config, tensors), tensors
