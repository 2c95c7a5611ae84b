"""Small random allocation problems, and every choice of them."""

from __future__ import annotations

import itertools
import random

from compress.mixed.tables import cost_of, loss_of

Table = list[list[float]]
Whole = list[list[int]]


def problem(seed: int, tables: int = 1, units: int = 6) -> tuple[Table, list[Whole]]:
    """Up to `units` units of up to 5 options. Two of three seeds have ties: losses in eighths, so that sums are exact."""
    draw = random.Random(seed)
    widths = [draw.randint(1, 5) for _ in range(draw.randint(1, units))]
    if seed % 3 == 0:
        losses = [[draw.gauss(0, 1) for _ in range(width)] for width in widths]
        return losses, [[[draw.randint(0, 1000) for _ in range(width)] for width in widths] for _ in range(tables)]
    losses = [[draw.randint(-8, 8) / 8 for _ in range(width)] for width in widths]
    step = draw.choice([1, 3])
    return losses, [[[draw.randint(0, 6) * step for _ in range(width)] for width in widths] for _ in range(tables)]


def limits_between(costs: list[Whole], seed: int) -> list[int]:
    """From the cheapest choice's cost to more than the dearest one's."""
    draw = random.Random(seed)
    return [draw.randint(sum(map(min, table)), sum(map(max, table)) + 1) for table in costs]


def choices(losses: Table) -> list[list[int]]:
    return [list(choice) for choice in itertools.product(*(range(len(row)) for row in losses))]


def within(costs: list[Whole], limits: list[int], choice: list[int]) -> bool:
    return all(cost_of(table, choice) <= limit for table, limit in zip(costs, limits, strict=True))


def least(losses: Table, costs: list[Whole], limits: list[int]) -> tuple[float, int] | None:
    """The least loss within the limits and, among the choices that reach it, the least cost by the first table."""
    found = [choice for choice in choices(losses) if within(costs, limits, choice)]
    return min(((loss_of(losses, choice), cost_of(costs[0], choice)) for choice in found), default=None)
