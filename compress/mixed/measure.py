"""The dense model with any of its layers exchanged for solved ones, and how far that takes its predictions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import evaluate
from compress.calib import capture
from compress.errors import CompressError
from compress.fisher.losses import IGNORED
from compress.machine import free_memory
from compress.mixed.activations import Range, observe, simulate
from compress.mixed.library import Library
from compress.models import Anatomy, Layer, from_matrix, matrix, weight_of
from compress.qtensor import dense
from compress.sequential import Settings, batches_of
from compress.spec import LayerSpec

Specs = Mapping[str, LayerSpec]
Batch = Mapping[str, Tensor]
Distance = Callable[[Tensor, Tensor, Batch], tuple[float, float]]  # predicted, dense, inputs: a sum, and what to divide it by
DENSE = LayerSpec()


def tokens_of(inputs: Batch) -> int:
    """Of a sample; 1 for an image."""
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else 1


class Swaps:
    """A copy of the model in the dtype and on the device of `settings`, whose layers come from a library.

    The loss of an exchange is the mean KL(dense || changed) of the model's predictions in nats: per token, or per sample for a
    classifier. A model without logits is judged by the squared change of its output relative to the output's square.
    `activation_bits` rounds what enters every layer of the changed model, weights exchanged or not, as simulated integers.
    Memory is the model once more, the dense predictions, and the input of every block for every sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        inputs: Mapping[str, Tensor],
        library: Library,
        settings: Settings,
        activation_bits: int | None = None,
    ) -> None:
        self.dense, self.anatomy, self.library = model, anatomy, library
        self.layers = {layer.name: layer for layer in anatomy.layers}
        self.block_of = {layer.name: i for i, block in enumerate(anatomy.blocks) for layer in anatomy.of_block(block)}
        self.now: dict[str, LayerSpec] = dict.fromkeys(self.layers, DENSE)
        copied = copy.deepcopy(model)
        nn.Module.to(copied, settings.device, settings.dtype)
        self.model = copied.eval()
        self.batches = [
            {
                name: value.to(settings.device, settings.dtype if value.is_floating_point() else value.dtype)
                for name, value in batch.items()
                if name != "labels"
            }
            for batch in batches_of(inputs)
        ]
        self.tokens = tokens_of(inputs)
        self.samples = [len(next(iter(batch.values()))) for batch in self.batches]
        self.entering: list[list[Tensor]] = []  # [batch][block]
        self.as_tuple = False
        self.predicts = False  # whether there are logits
        ranges: dict[str, Range] = {}
        with capture.hooks(observe(self.model, anatomy.layers, ranges) if activation_bits else []):
            self.base = [self._first(batch) for batch in self.batches]
        if activation_bits:
            simulate(self.model, ranges, activation_bits)
            self.entering = []
            for batch in self.batches:
                self._first(batch)
        self.cache: dict[tuple[str, LayerSpec], Tensor] = {}
        self.cached_bytes = free_memory(settings.device) // 4
        self.forwards = 0.0  # passes of all samples through the whole model

    def loss(self, specs: Specs, samples: int | None = None) -> float:
        """The loss of the model with these layers exchanged, all others dense, on the first `samples`, or all."""
        return self._mean(specs, samples, self._divergence)

    def nll(self, specs: Specs, samples: int | None = None) -> float:
        """The mean loss of the next token, in nats; for causal models."""
        evaluate.check_causal(self.dense)
        return self._mean(specs, samples, _next_token)

    def _mean(self, specs: Specs, samples: int | None, distance: Distance) -> float:
        first = self._exchange(specs)
        total, count = 0.0, 0.0
        with torch.no_grad():
            for i, (batch, base) in enumerate(self._taken(samples)):
                with self._from_block(first, i, len(base)) if first else nullcontext():
                    predicted = _predicted(self.model(**batch))
                off, rows = distance(predicted, base, batch)
                total, count = total + off, count + rows
                self.forwards += len(base) / sum(self.samples) * (1 - first / len(self.anatomy.blocks))
        return total / count if math.isfinite(total) else math.inf

    def _divergence(self, predicted: Tensor, base: Tensor, batch: Batch) -> tuple[float, float]:
        rows, base_rows = _rows(predicted, batch, self.model), _rows(base, batch, self.model)
        if self.predicts:
            kl, _ = evaluate.distance(rows, base_rows)
            return kl * len(rows), float(len(rows))
        return (rows - base_rows).float().square().sum().item(), base_rows.float().square().sum().item()

    def _taken(self, samples: int | None) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        left = sum(self.samples) if samples is None else samples
        for batch, base, size in zip(self.batches, self.base, self.samples, strict=True):
            if left <= 0:
                return
            taken = min(left, size)
            yield {name: value[:taken] for name, value in batch.items()}, base[:taken]
            left -= taken

    def _exchange(self, specs: Specs) -> int:
        """Put these layers in and all others back; the first block that is not dense then."""
        for name, was in self.now.items():
            spec = specs.get(name, DENSE)
            if spec != was:
                layer = self.layers[name]
                weight = weight_of(self.model.get_submodule(name))
                with torch.no_grad():
                    weight.copy_(from_matrix(self._weight(layer, spec), layer.kind, weight.shape))
                self.now[name] = spec
        return min((self.block_of[name] for name, spec in self.now.items() if not spec.dense), default=0)

    def _weight(self, layer: Layer, spec: LayerSpec) -> Float[Tensor, "N K"]:
        if spec.dense:
            return matrix(self.dense.get_submodule(layer.name)).detach()
        key = layer.name, spec
        if key not in self.cache:
            weight = weight_of(self.model.get_submodule(layer.name))
            made = dense(self.library.solved(layer, spec), weight.dtype).to(weight.device)
            if made.nbytes > self.cached_bytes:
                return made
            self.cached_bytes -= made.nbytes
            self.cache[key] = made
        return self.cache[key]

    def _first(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The dense predictions, noting what enters every block."""
        entering: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.as_tuple = isinstance(output, tuple)
            entering.append(capture.split(args, kwargs)[0])

        blocks = self.anatomy.blocks if len(self.anatomy.blocks) > 1 else ()
        handles = [self.model.get_submodule(name).register_forward_hook(note, with_kwargs=True) for name in blocks]
        with capture.hooks(handles), torch.no_grad():
            outputs = self.model(**batch)
        self.predicts = outputs.get("logits") is not None
        predicted = _predicted(outputs)
        self.entering.append(entering)
        if not torch.isfinite(predicted).all():
            raise CompressError(
                f"{type(self.model).__name__} predicts NaN or infinite values. Check its weights, or use --dtype float32."
            )
        return predicted

    def _from_block(self, first: int, batch: int, samples: int) -> Any:
        """Passes that begin at a block: those before it hand on what the dense model feeds it."""
        hidden = self.entering[batch][first][:samples]

        def stand_in(_name: str) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: (hidden,) if self.as_tuple else hidden

        return capture.replaced_forwards(self.model, self.anatomy.blocks[:first], stand_in)


def _predicted(outputs: Any) -> Tensor:
    logits = outputs.get("logits")
    found: Tensor = outputs[0] if logits is None else logits
    return found


def _rows(predicted: Tensor, batch: Batch, model: PreTrainedModel) -> Float[Tensor, "M V"]:
    """One row per prediction; padding makes none."""
    mask = batch.get("attention_mask")
    if mask is not None and predicted.shape[:-1] == mask.shape and model.main_input_name == "input_ids":
        return predicted[mask.bool()]
    return predicted.flatten(0, -2)


def _next_token(predicted: Tensor, _base: Tensor, batch: Batch) -> tuple[float, float]:
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    logits, labels = predicted[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = sum(
        nn.functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="sum").item()
        for rows, wanted in zip(logits.split(evaluate.ROWS_AT_A_TIME), labels.split(evaluate.ROWS_AT_A_TIME), strict=True)
    )
    return float(total), float((labels != IGNORED).sum())
