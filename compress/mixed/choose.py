"""The best choice for a budget, given what each option loses and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from compress.errors import CompressError
from compress.mixed import bisection
from compress.mixed.bisection import OutOfReach
from compress.mixed.budget import Cost
from compress.mixed.knapsack import frontier, knapsack
from compress.mixed.limits import Budget, flag
from compress.mixed.measure import Swaps
from compress.mixed.quadratic import energy, nearest_psd, quadratic
from compress.mixed.refine import State, refine
from compress.mixed.several import Contradiction, several
from compress.mixed.tables import Losses, loss_of
from compress.mixed.units import Space
from compress.progress import Track

DEPENDENCE = 0.5  # of an interaction, that counts for each of the two units in the order of bisection


@dataclass
class Measured:
    """The measured loss of a choice, remembered: KL to the dense model, in nats. The model is copied when it is first needed."""

    copied: Callable[[], Swaps]
    space: Space
    known: dict[tuple[tuple[int, ...], int | None], float] = field(default_factory=dict)

    @cached_property
    def swaps(self) -> Swaps:
        return self.copied()

    @property
    def forwards(self) -> float:
        """Passes of all judged samples through the model so far."""
        return self.swaps.forwards if "swaps" in vars(self) else 0.0

    def __call__(self, choice: Sequence[int], samples: int | None = None) -> float:
        key = tuple(choice), samples
        if key not in self.known:
            self.known[key] = self.swaps.loss(self.space.specs(choice), samples)
        return self.known[key]


@dataclass(frozen=True)
class Model:
    """What a choice is predicted to lose: the sum of its units' losses, or with interactions x^T G x over all options."""

    losses: Losses
    G: Float64[np.ndarray, "D D"] | None = None

    def predict(self, choice: Sequence[int]) -> float:
        return loss_of(self.losses, choice) if self.G is None else energy(self.G, [len(row) for row in self.losses], choice)


def interacting(losses: Losses, pairs: Mapping[tuple[int, int], float]) -> Model:
    """Losses with the interactions of pairs, each measured at its units' worst options.

    Near the dense model an option's error is a direction times an amplitude, and its loss the square of that: an interaction
    goes with the product of both amplitudes. The matrix over units is projected to a positive semi-definite one first, as
    noise would else promise losses below zero.
    """
    worst = [max(max(row), 0.0) for row in losses]
    G = np.diag(np.array(worst, np.float64))
    for (i, j), beyond in pairs.items():
        G[i, j] = G[j, i] = beyond / 2
    G = nearest_psd(G)
    amplitudes = [
        np.sqrt(np.maximum(np.array(row, np.float64), 0) / most) if most else np.zeros(len(row))
        for row, most in zip(losses, worst, strict=True)
    ]
    spread = np.zeros((len(losses), sum(len(row) for row in losses)))  # of a choice's x over units, by amplitude
    start = 0
    for u, row in enumerate(amplitudes):
        spread[u, start : start + len(row)] = row
        start += len(row)
    return Model(losses, spread.T @ G @ spread)


def choose(model: Model, currencies: Sequence[Cost], budget: Budget, measured: Measured) -> list[int]:
    """The choice of least predicted loss within the limits, or for a target of quality the smallest that keeps it."""
    limited = [cost for cost in currencies if cost.name in budget.given]
    if budget.measured:
        return _for_quality(model, currencies[0], limited, budget, measured)
    tables, limits = [cost.table for cost in limited], [cost.limit - cost.fixed for cost in limited]
    try:
        if model.G is not None:
            return quadratic(model.G, tables, limits)
        if len(limited) == 1:
            return knapsack(model.losses, tables[0], limits[0])
        return several(model.losses, tables, limits)
    except Contradiction as error:
        alone = ", ".join(
            f"{flag(cost.name)} {cost.shown(cost.limit)} (alone {cost.shown(cost.fixed + least)}, together "
            f"{cost.shown(cost.fixed + close)})"
            for cost, least, close in zip(limited, error.smallest, error.closest, strict=True)
        )
        raise CompressError(f"No plan keeps all budgets: {alone} is the nearest. Relax one of them.") from error


def refined(
    choice: Sequence[int], limited: Sequence[Cost], measured: Measured, generations: int, seed: int, track: Track
) -> list[int]:
    """The choice after generations of evolution within the limits, or fewer where these bring nothing; never worse, measured."""
    tokens = measured.swaps.tokens

    def measure(candidate: Sequence[int], count: int) -> float:
        return measured(candidate, max(1, count // tokens))

    limits = [cost.limit - cost.fixed for cost in limited]
    states = refine(choice, [cost.table for cost in limited], limits, measure, generations=generations, seed=seed)
    last: State = list(track(states, generations + 1, "refining"))[-1]
    return last.choice


def _for_quality(model: Model, size: Cost, limited: Sequence[Cost], budget: Budget, measured: Measured) -> list[int]:
    """The smaller of two plans that are measured to keep the target: from the frontier of predicted loss, and by bisection.

    The frontier's is exact where losses add up; lowering the least sensitive units first (the search of Schaefer et al.,
    arXiv 2306.04879, as its abstract has it) trusts their order alone.
    """
    target, measure = _target(budget, measured)
    plans = [choice for _, _, choice in frontier(model.losses, size.table)]
    order = sorted(range(len(model.losses)), key=lambda u: _sensitivity(model, u))
    ladders = [_ladder(model.losses[u], size.table[u]) for u in range(len(model.losses))]
    try:
        found = [bisection.smallest(plans, measure, target), bisection.bisect(order, ladders, measure, target)]
    except OutOfReach as error:
        raise CompressError(
            f"{flag(budget.given[0])} cannot be kept: the most precise plan measures {error.loss:.4g} nats, and {target:.4g} are "
            "allowed. Add more bits to --bits, or allow more."
        ) from error
    best = min((one.choice for one in found), key=size.of)
    for cost in limited:
        if cost.of(best) > cost.limit:
            raise CompressError(
                f"{flag(cost.name)} {cost.shown(cost.limit)} and the target of quality contradict each other: the smallest plan "
                f"that was found to keep the target takes {cost.shown(cost.of(best))}."
            )
    return best


def _target(budget: Budget, measured: Measured) -> tuple[float, bisection.Measure]:
    """The highest allowed loss, and how it is measured."""
    if budget.max_kl is not None:
        return budget.max_kl, measured
    assert budget.max_ppl_increase is not None
    base = measured.swaps.nll({})
    return math.log1p(budget.max_ppl_increase), lambda choice: measured.swaps.nll(measured.space.specs(choice)) - base


def _sensitivity(model: Model, u: int) -> float:
    """A unit's worst loss, with its part of what it loses together with others."""
    worst = max(model.losses[u])
    if model.G is None:
        return worst
    starts = np.cumsum([0, *(len(row) for row in model.losses)])
    at = [int(starts[v]) + int(np.argmax(row)) for v, row in enumerate(model.losses)]
    others = [model.G[at[u], at[v]] for v in range(len(at)) if v != u]
    return worst + DEPENDENCE * 2 * float(np.maximum(others, 0).sum())


def _ladder(losses: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Options from dearest to cheapest, without those that cost as much as another and lose more."""
    best: dict[int, int] = {}
    for option in sorted(range(len(losses)), key=losses.__getitem__, reverse=True):
        best[costs[option]] = option
    return [best[cost] for cost in sorted(best, reverse=True)]
