"""What a folder must hold to be the model that it says it is: transformers fills in what is missing, with random numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from compress.errors import CompressError

OPTIONAL = re.compile(r"(^|\.)pooler\.")  # of encoders, which are often saved without: nothing in their blocks depends on it
WRAPPERS = {  # what begins the names of all tensors, who put it there, and what to save instead
    "module.": ("DataParallel", "model.module.state_dict() or model.module.save_pretrained"),
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained"),
    "base_model.model.": ("PEFT", "model.merge_and_unload().save_pretrained"),
}


def check_list(folder: Path) -> None:
    """Raise for a list of shards that transformers would read and cannot."""
    listing = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not listing.is_file():
        return
    try:
        document = json.loads(listing.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{listing} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(document, dict) or not document.keys() >= {"metadata", "weight_map"}:
        raise CompressError(
            f'{listing} needs "metadata" and "weight_map", or transformers cannot load the shards. Save the model again, or add '
            '"metadata": {} where only that is missing.'
        )


def check_names(folder: Path, stored: Iterable[str]) -> None:
    """Raise where all tensors are named as in a wrapped model, under which names no loader looks for them."""
    names = list(stored)
    for prefix, (wrapper, remedy) in WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            raise CompressError(
                f"All weights of {folder} are named {prefix}..., as {wrapper} names them, so transformers finds none. Load them "
                f"where they were saved, and save {remedy}."
            )


def check_complete(folder: Path, model: PreTrainedModel, missing_keys: Iterable[str]) -> None:
    """Raise where a folder lacks weights of its model; `missing_keys` are those that transformers reports."""
    if missing := sorted(name for name in missing_keys if not OPTIONAL.search(name)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CompressError(
            f"{folder} lacks {', '.join(missing[:3])}{more}, which {type(model).__name__} needs: the model would run with random "
            "values there. Save it again as a whole, or correct its config.json (architectures, tie_word_embeddings)."
        )


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """Say where the file and config.json of a model disagree, and what was taken."""
    head = model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None
    if head is None or head.get_parameter("weight") is model.get_input_embeddings().get_parameter("weight"):
        return ()
    return (
        "config.json says that the head is tied to the embeddings, but the file has another tensor for it: both are used as they "
        "are stored, as transformers does.",
    )


def check_ids(model: PreTrainedModel, ids: Int64[Tensor, "samples T"], tokens: int) -> None:
    """Raise where a tokenizer, of so many `tokens`, gives ids that the model has no embedding for."""
    rows, highest = len(model.get_input_embeddings().get_parameter("weight")), int(ids.max())
    if highest >= rows:
        raise CompressError(
            f"The tokenizer gives token {highest} (it has {tokens:,} tokens), but the model's embedding has {rows:,} rows. Use "
            "the tokenizer that the model was trained with, or resize the embeddings and train the new rows."
        )
