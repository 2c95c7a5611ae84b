"""Losses and costs by unit and option: a unit is a set of layers that take one option together, a choice one option for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

Losses = Sequence[Sequence[float]]  # [unit][option]; rows may differ in length
Costs = Sequence[Sequence[int]]  # the same, in whole bytes, bits, operations or nanoseconds


def loss_of(losses: Losses, choice: Sequence[int]) -> float:
    """The sum of the chosen losses, rounded once."""
    return math.fsum(row[option] for row, option in zip(losses, choice, strict=True))


def cost_of(costs: Costs, choice: Sequence[int]) -> int:
    """The sum of the chosen costs."""
    return sum(row[option] for row, option in zip(costs, choice, strict=True))


def smallest_cost(costs: Costs) -> int:
    """The cost of the cheapest choice."""
    return sum(min(row) for row in costs)


def check(losses: Losses, *tables: Costs) -> None:
    """Raise ValueError unless there are units, each with options, finite losses and as many costs in every table."""
    if not losses:
        raise ValueError("there are no units")
    for number, costs in enumerate(tables):
        if [len(row) for row in costs] != [len(row) for row in losses]:
            raise ValueError(f"cost table {number} has other units or options than the losses")
    for unit, row in enumerate(losses):
        if not row or not all(math.isfinite(loss) for loss in row):
            raise ValueError(f"unit {unit} has the losses {list(row)}; expected at least one, all finite")
