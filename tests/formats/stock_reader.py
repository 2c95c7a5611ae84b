"""Loads checkpoints with transformers and compressed-tensors alone: `stock_reader.py TODO.json DONE.pt`.

DONE has, for every case and way of loading, the output for the token ids 0..15 or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from pydantic import ValidationError
from transformers import AutoModel, CompressedTensorsConfig

REFUSALS = (ValidationError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


def output(model_class: type, folder: str, **extra: object) -> torch.Tensor | str:
    torch.manual_seed(1)  # what a loader leaves unset is random, but the same every time
    try:
        model = model_class.from_pretrained(folder, dtype="auto", **extra).eval()
        with torch.no_grad():
            return model(torch.arange(16)[None])[0]
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    todo = json.loads(Path(sys.argv[1]).read_text())
    done = {}
    for name, folder in todo.items():
        model_class = getattr(transformers, json.loads((Path(folder) / "config.json").read_text())["architectures"][0])
        done[name] = {
            "default": output(model_class, folder),
            "dequantize": output(model_class, folder, quantization_config=CompressedTensorsConfig(dequantize=True)),
            "base": output(AutoModel, folder),
        }
    assert "compress" not in sys.modules
    torch.save(done, sys.argv[2])


main()
