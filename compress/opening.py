"""From a job to what is worked on: the dense model, its layers, its calibration data, and how layers are solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import checkpoint, integrity, models
from compress.calib import data
from compress.calib.data import Calibration
from compress.checkpoint import TensorInfo
from compress.errors import CompressError
from compress.formats import Format
from compress.job import Job
from compress.mixed.weighing import Weighing
from compress.models import Anatomy
from compress.sequential import Settings

LONGEST_DEFAULT = 2048  # tokens per calibration sample where the model takes more
JUDGED_TOKENS, JUDGED_IMAGES = 16384, 256  # at least, of a search


@dataclass(frozen=True)
class Dense:
    """The model to compress, opened: its folder's config and tensors, and what can be compressed.

    `weighing` is there where errors are to be weighed by its loss.
    """

    config: dict[str, Any]
    stored: Mapping[str, TensorInfo]
    model: PreTrainedModel
    anatomy: Anatomy
    calibration: Calibration | None
    judged: Mapping[str, Tensor]
    weighing: Weighing | None = None

    @property
    def inputs(self) -> Mapping[str, Tensor] | None:
        return self.calibration.inputs if self.calibration else None


def opened(job: Job) -> Dense:
    config, stored = models.check_source(job.source), checkpoint.index(job.source)
    integrity.check_names(job.source, stored)
    model = models.load(job.source)
    anatomy = models.anatomy(model, job.skip)
    if not job.calibrated:
        return Dense(config, stored, model, anatomy, None, {})
    return Dense(config, stored, model, anatomy, *_calibration(job, model))


def settings_of(job: Job, model: PreTrainedModel, encoder: Format) -> Settings:
    device, stored = models.device(job.device), model.dtype
    dtype = models.dtype(job.dtype, stored, device)
    narrow = job.dtype is None  # who asks for a dtype gets that
    return Settings(job.quantizer, job.pruner, job.options, device, dtype, encoder.scale_dtype(stored), narrow)


def _calibration(job: Job, model: PreTrainedModel) -> tuple[Calibration, Mapping[str, Tensor]]:
    """What layers are solved with, and further samples of the same source where a search judges plans."""
    if model.main_input_name == "pixel_values":
        extra = JUDGED_IMAGES if job.judged else 0
        return _divided(job, extra, lambda samples: _images(job, samples))
    tokenizer, length = models.tokenizer(job.source), seq_len(job)
    if job.labelled and job.calib is not None:
        found = data.labelled_text(job.calib, tokenizer, samples=job.samples, seq_len=length, seed=job.seed)
        if found is not None:
            integrity.check_ids(model, found.inputs["input_ids"], len(tokenizer))
            models.set_padding(model, tokenizer.pad_token_id or 0)  # the one that shorter texts were padded with
            return found, {}
    extra = -(-JUDGED_TOKENS // length) if job.judged else 0
    encoder = not models.is_causal(model)

    def draw(samples: int) -> Calibration:
        drawn = data.text(job.calib, tokenizer, samples=samples, seq_len=length, seed=job.seed, special_tokens=encoder)
        integrity.check_ids(model, drawn.inputs["input_ids"], len(tokenizer))
        return drawn

    return _divided(job, extra, draw)


def _images(job: Job, samples: int) -> Calibration:
    """Drawn images; to be divided, in a random order, as they come in that of the source, which may be by class."""
    drawn = data.images(job.calib, job.source, samples=samples, seed=job.seed)
    if not job.judged:
        return drawn
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(job.seed))
    return replace(drawn, inputs={name: tensor[order] for name, tensor in drawn.inputs.items()})


def _divided(job: Job, extra: int, draw: Callable[[int], Calibration]) -> tuple[Calibration, Mapping[str, Tensor]]:
    """The samples that were asked for, and the extra ones."""
    try:
        drawn = draw(job.samples + extra)
    except CompressError as error:
        if not extra:
            raise
        raise CompressError(f"{error} Beyond --samples, a search takes {extra} more to judge plans on.") from error
    asked = {name: tensor[: job.samples] for name, tensor in drawn.inputs.items()}
    source = f"{drawn.source}, {extra} of them to judge plans on" if extra else drawn.source
    return replace(drawn, inputs=asked, source=source), {name: value[job.samples :] for name, value in drawn.inputs.items()}


def seq_len(job: Job) -> int:
    longest = models.max_positions(job.source)
    if job.seq_len is None:
        return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)
    if longest and job.seq_len > longest:
        raise CompressError(f"--seq-len is {job.seq_len}, but the model was built for at most {longest} positions.")
    return job.seq_len
