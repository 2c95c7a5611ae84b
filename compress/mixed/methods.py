"""Every way to predict what an option of a unit loses, by name: a table of losses in nats, or what comes close to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.mixed import derivatives, gradients, hessian, sensitivities
from compress.mixed.library import Library
from compress.mixed.measure import Swaps
from compress.mixed.units import Space, fitted
from compress.models import Anatomy, Layer
from compress.progress import Track
from compress.sequential import Settings
from compress.spec import LayerSpec

Method = Literal["kl", "interlayer", "output", "fisher", "hawq-v2", "hawq-v1", "emq"]
EMQ: Method = "emq"  # by a proxy that the caller brings: what makes its table is no part of this package
METHODS: tuple[Method, ...] = tuple(one for one in get_args(Method) if one != EMQ)
SWAPPED = frozenset({"kl", "interlayer"})  # measured, without derivatives
Table = list[list[float]]  # [unit][option]
Pairs = dict[tuple[int, int], float]


@dataclass(frozen=True)
class Subject:
    """The dense model that is searched, its solved layers, and the samples to take derivatives on.

    `mask_token` is what a masked language model's loss puts in the place of tokens.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    space: Space
    library: Library
    inputs: Mapping[str, Tensor]
    settings: Settings
    mask_token: int | None = None
    seed: int = 0


Predict = Callable[[Subject], Table]


def derived(method: Method, subject: Subject) -> tuple[Table, dict[str, float]]:
    """The table of a method that needs derivatives of the loss, and where it is an estimate each layer's standard error.

    The predictions of layers of one unit add up.
    """
    layers, device = subject.anatomy.layers, subject.settings.device
    objective = derivatives.objective(subject.model, subject.inputs, subject.mask_token, seed=subject.seed)
    given = (subject.model, layers, subject.inputs, objective, device)
    errors: dict[str, float] = {}
    if method == "output":
        rows = {layer.name: _row_errors(subject, layer) for layer in layers}
        found = sensitivities.output(gradients.output_gradients(*given), rows)
    elif method == "fisher":
        found = sensitivities.fisher(layers, gradients.fisher_traces(*given), _weight_errors(subject))
    elif method == "hawq-v2":
        traces = hessian.traces(*given, seed=subject.seed)
        errors = {name: trace.standard_error for name, trace in traces.items()}
        found = sensitivities.hawq_v2(layers, traces, _weight_errors(subject))
    else:
        eigenvalues = hessian.top_eigenvalues(*given, seed=subject.seed)
        found = sensitivities.hawq_v1(layers, eigenvalues, _weight_errors(subject))
    return _by_unit(found, subject.space), errors


def swapped(swaps: Swaps, space: Space, samples: int, track: Track) -> Table:
    """KL to the dense model, measured with one unit of it exchanged at a time."""
    jobs = [(u, option) for u, options in enumerate(space.options) for option in options]
    table: Table = [[] for _ in space.units]
    for u, option in track(jobs, len(jobs), "measuring options"):
        loss = swaps.loss(space.with_options({u: option}), samples)
        if not math.isfinite(loss):
            raise CompressError(
                f"With {space.units[u].name} as {option} the model predicts NaN or infinite values. Leave this option out, or "
                "use --dtype float32."
            )
        table[u].append(loss)
    return table


def interactions(
    swaps: Swaps, space: Space, table: Table, samples: int, track: Track, reach: int | None = 1
) -> dict[tuple[int, int], float]:
    """What two units lose together beyond what each loses alone: L(i, j) + L(0) - L(i) - L(j), with L the KL to the dense model.

    For pairs in one block and in blocks up to `reach` apart, None for all pairs, each unit at its worst option. Second-order
    information augmented by inter-layer dependencies is the idea of Schaefer et al. (arXiv 2306.04879), of which only the
    abstract could be read: that the pairs are measured on KL, which pairs, and how they enter the choice is ours, after CLADO
    (arXiv 2307.05657). L(0) is zero.
    """
    worst = [max(range(len(row)), key=row.__getitem__) for row in table]
    near = [
        (i, j)
        for i, j in combinations(range(len(space.units)), 2)
        if reach is None or abs(space.units[i].block - space.units[j].block) <= reach
    ]
    found: Pairs = {}
    for i, j in track(near, len(near), "measuring pairs"):
        options = {u: space.options[u][worst[u]] for u in (i, j)}
        both = swaps.loss(space.with_options(options), samples)
        found[i, j] = both - table[i][worst[i]] - table[j][worst[j]]
    return found


def _row_errors(subject: Subject, layer: Layer) -> dict[LayerSpec, Tensor]:
    found = {}
    for spec in subject.space.wanted[layer.name]:
        rows = None if spec.dense else subject.library.entry(layer.name, spec).row_errors
        found[spec] = torch.zeros(layer.N) if rows is None else rows
    return found


def _weight_errors(subject: Subject) -> dict[str, dict[LayerSpec, float]]:
    wanted = subject.space.wanted
    return {
        name: {spec: 0.0 if spec.dense else subject.library.entry(name, spec).weight_error for spec in specs}
        for name, specs in wanted.items()
    }


def _by_unit(found: Mapping[str, Mapping[LayerSpec, float]], space: Space) -> Table:
    return [
        [sum(found[layer.name][fitted(layer, option)] for layer in unit.layers) for option in options]
        for unit, options in zip(space.units, space.options, strict=True)
    ]
