"""The choice of least loss within one limit, exactly, and all choices that none beats: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from compress.mixed.several import several
from compress.mixed.tables import Costs, Losses, check, cost_of, loss_of, smallest_cost

# Partial choices kept in each round. Where the last is not enough, HiGHS takes over. 400 units of 6 options take 0.02 s with a
# model's sizes and losses, 0.02 s with random ones, 0.04 s with random sizes and at worst 0.9 s with random costs to which losses
# are nearly proportional; HiGHS alone 0.8, 0.8, 0.2 and 8.9 s at worst (2 cores of an AMD EPYC, 2026-11).
WIDTHS = (1 << 9, 1 << 13, 1 << 17)
ENUMERATED = 1 << 14  # partial choices up to which the frontier is listed rather than solved for budget by budget
ROUNDING = 1e-12  # of the sum of all |loss|: bounds that differ by less are taken as equal


@dataclass(frozen=True)
class _Unit:
    """Options that no other option beats, cheapest first: their indices, costs above the cheapest, and falling losses."""

    options: tuple[int, ...]
    cost: Int64[np.ndarray, "O"]
    loss: Float64[np.ndarray, "O"]


@dataclass(frozen=True)
class _Move:
    """A unit's step to the position `to` for more `cost`, and the loss it saves per cost."""

    slope: float
    unit: int
    to: int
    cost: int


@dataclass(frozen=True)
class _States:
    """Partial choices that no other beats, cheapest first, and how the units so far led to them."""

    cost: Int64[np.ndarray, "S"]
    loss: Float64[np.ndarray, "S"]
    trail: tuple[tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]], ...] = ()

    def choice(self, state: int) -> list[int]:
        """Which of its options each unit takes."""
        found = []
        for parent, option in reversed(self.trail):
            found.append(int(option[state]))
            state = int(parent[state])
        return found[::-1]


def knapsack(losses: Losses, costs: Costs, limit: int) -> list[int]:
    """The choice of least total loss among those that cost at most `limit`, and of these the cheapest; exact.

    Dynamic programming over the partial choices that none beats in cost and loss (Nemhauser and Ullmann 1969), where those go
    that the Lagrangian bound at the linear relaxation's multiplier shows to end above the best known choice. Losses may be
    negative. ValueError where even the cheapest choice costs more.
    """
    check(losses, costs)
    slack = limit - smallest_cost(costs)
    if slack < 0:
        raise ValueError(f"the cheapest choice costs {smallest_cost(costs)}, more than the limit {limit}")
    units, step = _units(losses, costs)
    taken = _solve(units, _moves(units), slack // step)
    return several(losses, [costs], [limit]) if taken is None else _options(units, taken)


def frontier(losses: Losses, costs: Costs, points: int = 256) -> list[tuple[int, float, list[int]]]:
    """(cost, loss, choice) of choices that no other beats in both, cheapest first (the Pareto frontier of HAWQ-v2,
    arXiv 1911.03852): all of them up to `points`; of more, the best within each of `points` evenly spaced costs.
    """
    check(losses, costs)
    units, step = _units(losses, costs)
    base = smallest_cost(costs)
    most = sum(int(unit.cost[-1]) for unit in units)
    budgets = [most * point // max(points - 1, 1) for point in range(points)]
    states = _every(units)
    if states is None:
        moves = _moves(units)
        solved = [(_solve(units, moves, budget), base + step * budget) for budget in budgets]
        found = [several(losses, [costs], [limit]) if taken is None else _options(units, taken) for taken, limit in solved]
    else:
        last = states.cost if len(states.cost) <= points else np.array(budgets)
        at = sorted({int(i) - 1 for i in np.searchsorted(states.cost, last, side="right")})
        found = [_options(units, states.choice(state)) for state in at]
    return _unbeaten([(cost_of(costs, choice), loss_of(losses, choice), choice) for choice in found])


def _unbeaten(plans: list[tuple[int, float, list[int]]]) -> list[tuple[int, float, list[int]]]:
    kept: list[tuple[int, float, list[int]]] = []
    for plan in sorted(plans):
        if not kept or plan[1] < kept[-1][1]:
            kept.append(plan)
    return kept


def _units(losses: Losses, costs: Costs) -> tuple[list[_Unit], int]:
    """The units, with costs divided by the greatest number that divides all their differences."""
    kept = [_unbeaten_options(*rows) for rows in zip(losses, costs, strict=True)]
    above = [[row[option] - row[options[0]] for option in options] for row, options in zip(costs, kept, strict=True)]
    step = math.gcd(*(cost for row in above for cost in row)) or 1
    units = [
        _Unit(tuple(options), np.array(row, np.int64) // step, np.array([loss[option] for option in options], np.float64))
        for options, row, loss in zip(kept, above, losses, strict=True)
    ]
    return units, step


def _unbeaten_options(losses: Sequence[float], costs: Sequence[int]) -> list[int]:
    kept: list[int] = []
    for option in sorted(range(len(costs)), key=lambda option: (costs[option], losses[option], option)):
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(option)
    return kept


def _options(units: Sequence[_Unit], taken: Sequence[int]) -> list[int]:
    return [unit.options[position] for unit, position in zip(units, taken, strict=True)]


def _solve(units: Sequence[_Unit], moves: Sequence[_Move], slack: int) -> list[int] | None:
    """Positions in the units' options; None where more partial choices than the largest of `WIDTHS` cannot be excluded."""
    slope, best = _greedy(len(units), moves, slack)
    if slope == 0:
        return best
    for width in WIDTHS:
        found, complete = _search(units, slack, slope, _loss(units, best), width)
        if found is not None and (complete or _loss(units, found) < _loss(units, best)):
            best = found
        if complete:
            return best
    return None


def _loss(units: Sequence[_Unit], taken: Sequence[int]) -> float:
    return math.fsum(float(unit.loss[position]) for unit, position in zip(units, taken, strict=True))


def _greedy(count: int, moves: Sequence[_Move], slack: int) -> tuple[float, list[int]]:
    """The loss saved per cost where the linear relaxation ends, 0 where all units get their best, and a choice that fits."""
    taken, stuck, end = [0] * count, set[int](), 0.0
    for move in moves:
        if move.unit in stuck:
            continue
        if move.cost <= slack:
            taken[move.unit], slack = move.to, slack - move.cost
        else:
            end = end or move.slope
            stuck.add(move.unit)
    return end, taken


def _moves(units: Sequence[_Unit]) -> list[_Move]:
    """The edges of all units' lower convex hulls of (cost, loss), steepest first."""
    found = []
    for u, unit in enumerate(units):
        at = 0
        while at < len(unit.cost) - 1:
            cost = unit.cost[at + 1 :] - unit.cost[at]
            slopes = (unit.loss[at] - unit.loss[at + 1 :]) / cost
            last = len(slopes) - 1 - int(slopes[::-1].argmax())
            at += 1 + last
            found.append(_Move(float(slopes[last]), u, at, int(cost[last])))
    return sorted(found, key=lambda move: (-move.slope, move.unit, move.to))


def _search(units: Sequence[_Unit], slack: int, slope: float, known: float, width: int) -> tuple[list[int] | None, bool]:
    """The best choice found, and whether it is the best there is: whether no more than `width` partial ones had to be kept.

    With excess e = loss + slope * cost - its minimum over the unit's options, a choice loses `bound` + its units' excesses +
    slope * what it leaves of the slack, and all these are non-negative: what passes the gap to `known` cannot end below it.
    """
    excesses = [unit.loss + slope * unit.cost for unit in units]
    bound = math.fsum(float(excess.min()) for excess in excesses) - slope * slack
    gap = known - bound + ROUNDING * sum(float(np.abs(unit.loss).max()) for unit in units)
    excesses = [excess - excess.min() for excess in excesses]
    open_ = [np.flatnonzero(excess <= gap) for excess in excesses]
    taken = [int(positions[0]) for positions in open_]
    order = [u for u, positions in enumerate(open_) if len(positions) > 1]
    order.sort(key=lambda u: -float(np.sort(excesses[u])[1]))  # those that decide most first: fewer partial choices
    low = sum(int(unit.cost[position]) for unit, position in zip(units, taken, strict=True))
    high = low + sum(int(units[u].cost[open_[u][-1]] - units[u].cost[open_[u][0]]) for u in order)
    states, excess, complete = _States(np.zeros(1, np.int64), np.zeros(1)), np.zeros(1), True
    for u in order:
        positions = open_[u]
        cost = units[u].cost[positions] - units[u].cost[positions[0]]
        high -= int(cost[-1])
        total = (excess[:, None] + excesses[u][positions]).ravel()
        reached = (states.cost[:, None] + cost).ravel()
        hopeful = (total + slope * np.maximum(slack - high - reached, 0) <= gap) & (reached <= slack - low)
        states, kept = _grown(states, cost, units[u].loss[positions], hopeful)
        excess = total[kept]
        if len(excess) > width:
            complete = False
            nearest = np.sort(np.argsort(excess, kind="stable")[:width])
            states, excess = _part(states, nearest), excess[nearest]
    if len(states.cost) == 0:
        return None, complete
    for u, position in zip(order, states.choice(len(states.cost) - 1), strict=True):
        taken[u] = int(open_[u][position])
    return taken, complete


def _every(units: Sequence[_Unit]) -> _States | None:
    """All choices that none beats; None where that needs more than `ENUMERATED` partial ones."""
    states = _States(np.zeros(1, np.int64), np.zeros(1))
    for unit in units:
        states, _ = _grown(states, unit.cost, unit.loss, np.ones(len(states.cost) * len(unit.cost), np.bool_))
        if len(states.cost) > ENUMERATED:
            return None
    return states


def _grown(
    states: _States, cost: Int64[np.ndarray, "O"], loss: Float64[np.ndarray, "O"], hopeful: np.ndarray
) -> tuple[_States, Int64[np.ndarray, "_"]]:
    """Every hopeful state with every option of one more unit, less those that another beats; and which of these were kept."""
    costs = (states.cost[:, None] + cost).ravel()
    losses = (states.loss[:, None] + loss).ravel()
    kept = np.flatnonzero(hopeful)
    kept = kept[np.lexsort((losses[kept], costs[kept]))]
    falling = np.minimum.accumulate(losses[kept])
    kept = kept[np.concatenate([np.ones(1, np.bool_), falling[1:] < falling[:-1]])[: len(kept)]]
    parent, option = np.divmod(kept, len(cost))
    return _States(costs[kept], losses[kept], (*states.trail, (parent, option))), kept


def _part(states: _States, kept: Int64[np.ndarray, "_"]) -> _States:
    *before, (parent, option) = states.trail
    return _States(states.cost[kept], states.loss[kept], (*before, (parent[kept], option[kept])))
