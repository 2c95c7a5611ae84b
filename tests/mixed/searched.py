"""Tiny models opened as a search opens them, with a library that has all that is asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import checkpoint, models
from compress.formats import FORMATS
from compress.mixed.budget import Target
from compress.mixed.library import Library, fill
from compress.mixed.limits import Budget
from compress.mixed.measure import Swaps
from compress.mixed.search import Found, Request, Source, search
from compress.mixed.units import Space, space
from compress.models import Anatomy
from compress.progress import silent
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme
from tests import tiny

OPTIONS = tuple(LayerSpec(Scheme(bits, 32)) for bits in (2, 3, 4, 8))
CPU = torch.device("cpu")


def settings(dtype: torch.dtype = torch.float32, **options) -> Settings:
    return Settings("gptq", "alps", Options(**options), CPU, dtype, torch.float32)


@dataclass
class Opened:
    """A model, inputs to solve with and to judge on, and a library in a folder."""

    model: PreTrainedModel
    anatomy: Anatomy
    inputs: Mapping[str, Tensor]
    judged: Mapping[str, Tensor]
    library: Library
    settings: Settings
    stored: Mapping[str, checkpoint.TensorInfo]

    def space(self, options: Sequence[LayerSpec] = OPTIONS, pins: Sequence[str] = ()) -> Space:
        found = space(self.anatomy, options, pins)
        for _ in fill(self.library, self.model, self.anatomy, self.inputs, found.wanted, self.settings):
            pass
        return found

    def swaps(self, judged: Mapping[str, Tensor] | None = None) -> Swaps:
        return Swaps(self.model, self.anatomy, self.judged if judged is None else judged, self.library, self.settings)

    def search(
        self, folder: Path, options: Sequence[LayerSpec] = OPTIONS, form="compressed-tensors", limits=None, **given
    ) -> Found:
        names = models.weight_names(self.model, self.anatomy.in_features, self.stored)
        target = Target(self.stored, names, form, FORMATS[form].scale_dtype(self.model.dtype))
        source = Source(self.model, self.anatomy, self.inputs, self.judged, target)
        budget = Budget(**({"avg_bits": 4.0} if limits is None else limits))
        request = Request(budget, tuple(options), folder / "library", folder / "plan.json", **given)
        return search(source, self.settings, request, silent)


def opened(family: str, folder: Path, samples: int = 8, length: int = 16) -> Opened:
    """Inputs are drawn at random: the first half is to solve layers with, the second to judge on."""
    source = tiny.save(family, folder / "model")
    model = models.load(source)
    both = tiny.inputs(family, 2 * samples, length)
    inputs = {name: value[:samples] for name, value in both.items()}
    judged = {name: value[samples:] for name, value in both.items()}
    return Opened(model, models.anatomy(model), inputs, judged, Library(folder / "solved"), settings(), checkpoint.index(source))
