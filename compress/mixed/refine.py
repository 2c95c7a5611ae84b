"""Better choices by evolution on the measured loss, within the same limits (EvoPress, arXiv 2410.14649)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from compress.mixed.tables import Costs, cost_of

Measure = Callable[[list[int], int], float]  # (choice, tokens) -> loss; comparable at equal numbers of tokens


@dataclass(frozen=True)
class Stage:
    """Measure candidates on `tokens` tokens and keep the best `survivors`."""

    tokens: int
    survivors: int


STAGES = (Stage(2048, 4), Stage(16384, 1))  # EvoPress: 16, 4 and 1 of 128 on 2 048, 16 384 and 131 072 tokens
OFFSPRING = 32


@dataclass(frozen=True)
class State:
    """The best choice so far and its loss at the last stage, after how many generations, of them how many `idle` since the
    last that brought anything, and measurements.
    """

    choice: list[int]
    loss: float
    generation: int = 0
    idle: int = 0
    evaluations: int = 0


def refine(
    start: Sequence[int] | State,
    costs: Sequence[Costs],
    limits: Sequence[int],
    measure: Measure,
    stages: Sequence[Stage] = STAGES,
    offspring: int = OFFSPRING,
    patience: int = 10,
    generations: int = 100,
    seed: int = 0,
) -> Iterator[State]:
    """Yield the state at the start and after every generation; stop after `patience` idle ones, or `generations` in all.

    A generation makes `offspring` from the best choice by `mutated`, measures them on more and more tokens, and takes the last
    survivor if its loss at the last stage is lower: (1 + lambda), which never gets worse. A generation's draws depend on `seed`
    and its number alone: from any state it goes on as if it had not stopped. ValueError where the start breaks a limit.
    """
    spent = [cost_of(table, start.choice if isinstance(start, State) else start) for table in costs]
    if any(cost > limit for cost, limit in zip(spent, limits, strict=True)):
        raise ValueError(f"the choice to refine costs {spent}; the limits are {list(limits)}")
    largest = stages[-1].tokens
    state = start if isinstance(start, State) else State(list(start), measure(list(start), largest), evaluations=1)
    known = {(tuple(state.choice), largest): state.loss}
    yield state
    while state.generation < generations and state.idle < patience:
        draw = np.random.default_rng([seed, state.generation])
        made = {tuple(mutated(state.choice, costs, limits, draw)) for _ in range(offspring)} - {tuple(state.choice)}
        before = len(known)
        candidates = sorted(made)
        for stage in stages:
            candidates = _best(candidates, stage, measure, known)
        state = _next(state, candidates, known, largest, len(known) - before)
        yield state


def mutated(choice: Sequence[int], costs: Sequence[Costs], limits: Sequence[int], draw: np.random.Generator) -> list[int]:
    """One to three swaps, fewer more often: one unit goes up a level, and where that breaks a limit another one goes down.

    Levels are a unit's options by their cost in the first table. The unit that goes down is drawn from those that make up for
    the other in every table: of equal units those at the same level do so exactly, of others those that cost enough more.
    """
    found = list(choice)
    for _ in range(min(draw.integers(1, 4), draw.integers(1, 4))):
        found = _swapped(found, costs, limits, draw)
    return found


def _swapped(choice: list[int], costs: Sequence[Costs], limits: Sequence[int], draw: np.random.Generator) -> list[int]:
    room = [limit - cost_of(table, choice) for table, limit in zip(costs, limits, strict=True)]
    for u in draw.permutation(len(choice)).tolist():
        up = _level(costs, choice, u, 1)
        if up is None:
            continue
        left = [r - table[u][up] + table[u][choice[u]] for r, table in zip(room, costs, strict=True)]
        if min(left) >= 0:
            return [*choice[:u], up, *choice[u + 1 :]]
        downs = [(v, down) for v in range(len(choice)) if v != u and (down := _makes_up(costs, choice, v, left)) is not None]
        if downs:
            v, down = downs[int(draw.integers(len(downs)))]
            return [up if w == u else down if w == v else option for w, option in enumerate(choice)]
    return choice


def _level(costs: Sequence[Costs], choice: Sequence[int], u: int, by: int) -> int | None:
    """The option of unit u one level up (1) or down (-1); None at the end."""
    row = costs[0][u]
    order = sorted(range(len(row)), key=lambda option: (row[option], option))
    at = order.index(choice[u]) + by
    return order[at] if 0 <= at < len(order) else None


def _makes_up(costs: Sequence[Costs], choice: Sequence[int], v: int, left: Sequence[int]) -> int | None:
    """The option of unit v one level down, if that leaves nothing below zero."""
    down = _level(costs, choice, v, -1)
    if down is None or any(r + table[v][choice[v]] - table[v][down] < 0 for r, table in zip(left, costs, strict=True)):
        return None
    return down


def _best(
    candidates: Sequence[tuple[int, ...]], stage: Stage, measure: Measure, known: dict[tuple[tuple[int, ...], int], float]
) -> list[tuple[int, ...]]:
    for candidate in candidates:
        if (candidate, stage.tokens) not in known:
            known[candidate, stage.tokens] = measure(list(candidate), stage.tokens)
    return sorted(candidates, key=lambda candidate: (known[candidate, stage.tokens], candidate))[: stage.survivors]


def _next(
    state: State, survivors: Sequence[tuple[int, ...]], known: dict[tuple[tuple[int, ...], int], float], tokens: int, cost: int
) -> State:
    generation, evaluations = state.generation + 1, state.evaluations + cost
    loss = min((known[survivor, tokens] for survivor in survivors), default=math.inf)
    if loss < state.loss:
        return State(list(survivors[0]), loss, generation, 0, evaluations)
    return State(state.choice, state.loss, generation, state.idle + 1, evaluations)
