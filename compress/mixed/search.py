"""From a budget to a plan, on one page: options, what they cost, solved layers, what each loses, and the best choice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from compress import evaluate
from compress.latency import LatencyTable
from compress.mixed import choose, library, methods
from compress.mixed.activations import macs
from compress.mixed.budget import Cost, Operations, Target, costs
from compress.mixed.choose import Measured, Model
from compress.mixed.kept import Kept, kept
from compress.mixed.knapsack import frontier
from compress.mixed.library import Library
from compress.mixed.limits import Budget
from compress.mixed.measure import Swaps, tokens_of
from compress.mixed.methods import SWAPPED, Method, Predict, Subject, Table
from compress.mixed.units import Space, space
from compress.models import Anatomy
from compress.progress import Track
from compress.sequential import Settings
from compress.spec import LayerSpec, Plan

TABLE_TOKENS = 1024  # on which each option is measured: of the reference model, 16384 find plans that lose at most 1 % less
FRONTIER_POINTS = 12  # measured for the plot


@dataclass(frozen=True)
class Request:
    """What is wanted: a budget, the options of every layer, how to predict losses, where solved layers and the plan are kept."""

    budget: Budget
    options: tuple[LayerSpec, ...]
    library: Path
    out: Path
    method: Method = "kl"
    predict: Predict | None = None  # for method emq
    pins: Sequence[str] = ()
    refine: int = 0
    verify: bool = False
    all_pairs: bool = False
    times: LatencyTable | None = None
    activation_bits: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """The dense model, opened; `judged` are samples like those in `inputs`, which layers are solved with, but others."""

    model: PreTrainedModel
    anatomy: Anatomy
    inputs: Mapping[str, Tensor]
    judged: Mapping[str, Tensor]
    target: Target
    mask_token: int | None = None


@dataclass(frozen=True)
class Point:
    """A plan among others: its name, its weight files' bytes, what it is predicted to lose, and what it loses if measured."""

    name: str
    size: int
    predicted: float
    measured: float | None


@dataclass(frozen=True)
class Found:
    """A plan with what led to it; `scores[unit][option]` are the predicted losses, `errors` their standard errors by layer."""

    plan: Plan
    path: Path
    blocks: tuple[str, ...]
    space: Space
    scores: Table
    errors: Mapping[str, float]
    point: Point
    uniform: tuple[Point, ...]
    frontier: tuple[Point, ...]
    spent: Mapping[str, str]
    budgets: tuple[Kept, ...]
    library: Library
    forwards: float
    seconds: float


def search(source: Source, settings: Settings, request: Request, track: Track) -> Found:
    """The plan that loses least within the budget, or for a target of quality the smallest.

    Nothing is measured that the library or an earlier error can answer: bad budgets are refused before any work starts.
    """
    start = time.perf_counter()
    if request.budget.max_ppl_increase is not None:
        evaluate.check_causal(source.model)
    choices = space(source.anatomy, request.options, request.pins)
    for index in range(max(len(options) for options in choices.options)):
        choices.plan([min(index, len(options) - 1) for options in choices.options]).check(source.anatomy.shapes)
    given = (request.budget, source.target, request.times, _operations(source, request))
    currencies = costs(choices, *given)
    free = costs(space(source.anatomy, request.options), *given) if request.pins else ()
    for i, cost in enumerate(currencies):
        if cost.name in request.budget.given:
            cost.check(request.pins, free[i] if free else None)

    solved = Library(request.library / library.key(source.target.stored, source.inputs, settings))
    steps = library.fill(solved, source.model, source.anatomy, source.inputs, choices.wanted, settings)
    for _ in track(steps, len(source.anatomy.blocks), "solving options"):
        pass

    copied = partial(Swaps, source.model, source.anatomy, source.judged, solved, settings, request.activation_bits)
    measured = Measured(copied, choices)
    model, errors = _predict(source, measured, solved, settings, request, track)
    choice = choose.choose(model, currencies, request.budget, measured)
    if request.refine:
        limited = [cost for cost in currencies if cost.name in request.budget.given]
        choice = choose.refined(choice, limited, measured, request.refine, request.seed, track)

    uniform = tuple(_uniform(choices, request, model, currencies[0], measured))
    edge = tuple(_frontier(model, currencies[0], measured, track)) if request.verify else ()
    loss = measured(choice) if request.verify or request.refine or request.budget.measured else None
    return Found(
        plan=choices.plan(choice),
        path=request.out,
        blocks=source.anatomy.blocks,
        space=choices,
        scores=[list(row) for row in model.losses],
        errors=errors,
        point=Point("found", currencies[0].of(choice), model.predict(choice), loss),
        uniform=uniform,
        frontier=edge,
        spent={cost.name: cost.shown(cost.of(choice)) for cost in currencies},
        budgets=kept(request.budget, currencies, choice, measured),
        library=solved,
        forwards=measured.forwards,
        seconds=time.perf_counter() - start,
    )


def _operations(source: Source, request: Request) -> Operations | None:
    if request.budget.bops is None:
        return None
    sample = {name: tensor[:1] for name, tensor in source.inputs.items()}
    return Operations(macs(source.model, source.anatomy.layers, sample), request.activation_bits)


def _predict(
    source: Source, measured: Measured, solved: Library, settings: Settings, request: Request, track: Track
) -> tuple[Model, dict[str, float]]:
    """What every option is predicted to lose by the method that was asked for, and standard errors where it has any."""
    choices, samples = measured.space, max(1, TABLE_TOKENS // tokens_of(source.judged))
    if request.method not in SWAPPED:
        few = {name: tensor[:samples] for name, tensor in source.judged.items()}
        subject = Subject(source.model, source.anatomy, choices, solved, few, settings, source.mask_token, request.seed)
        if request.predict is not None:
            return Model(request.predict(subject)), {}
        table, errors = methods.derived(request.method, subject)
        return Model(table), errors
    table = methods.swapped(measured.swaps, choices, samples, track)
    if request.method == "kl":
        return Model(table), {}
    pairs = methods.interactions(measured.swaps, choices, table, samples, track, None if request.all_pairs else 1)
    return choose.interacting(table, pairs), {}


def _uniform(choices: Space, request: Request, model: Model, size: Cost, measured: Measured) -> Iterator[Point]:
    """The plans that give every unit one and the same option, but for units that are pinned to others."""
    for option in request.options:
        choice = [options.index(option) if option in options else 0 for options in choices.options]
        yield Point(str(option), size.of(choice), model.predict(choice), measured(choice) if request.verify else None)


def _frontier(model: Model, size: Cost, measured: Measured, track: Track) -> Iterator[Point]:
    """Plans from the smallest to the largest, each the best of its size by prediction, and measured."""
    plans = frontier(model.losses, size.table, FRONTIER_POINTS)
    for _, _, choice in track(plans, len(plans), "measuring the frontier"):
        yield Point("frontier", size.of(choice), model.predict(choice), measured(choice))
