"""The choice of least loss within several limits at once, as an integer linear program (HAWQ-v3, arXiv 2011.10680)."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float64
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from compress.mixed.tables import Costs, Losses, check, cost_of, smallest_cost

SCALE = 1e6  # the sum of the units' ranges of loss, as HiGHS sees it: it stops at an absolute gap of 1e-6
LARGEST = 1e5  # coefficient of a limit's row, of which HiGHS tolerates an absolute excess of 1e-6
NEAR = 1e-3  # how near the optimum the nearest choice to contradictory limits is, of a limit
INFEASIBLE = 2  # scipy's status


class Contradiction(ValueError):  # noqa: N818 - it is about the limits
    """No choice keeps all limits: `smallest` is what each cost could be alone, `closest` what all are where the largest excess,
    as a part of its limit, is least."""

    def __init__(self, limits: Sequence[int], smallest: Sequence[int], closest: Sequence[int]) -> None:
        self.limits, self.smallest, self.closest = list(limits), list(smallest), list(closest)
        alone = [f"{low} against the limit {limit}" for low, limit in zip(smallest, limits, strict=True)]
        super().__init__(
            f"no choice keeps all limits: alone, costs can be {', '.join(alone)}; together, {self.closest} is closest"
        )


def several(losses: Losses, costs: Sequence[Costs], limits: Sequence[int]) -> list[int]:
    """The choice of least total loss whose cost by each table is at most its limit; exact (HiGHS, no gap).

    Costs are whole numbers. Raises `Contradiction`, a ValueError, where there is none.
    """
    check(losses, *costs)
    if len(costs) != len(limits):
        raise ValueError(f"{len(costs)} cost tables and {len(limits)} limits")
    spread = math.fsum(max(row) - min(row) for row in losses) or 1.0
    objective = np.concatenate([(np.array(row) - min(row)) * (SCALE / spread) for row in losses])
    rows, slack = _rows(costs, limits)
    widths, excluded = [len(row) for row in losses], list[list[int]]()
    while True:
        found = _solve(objective, widths, rows, slack, 0.0, excluded)
        if found.status == INFEASIBLE:
            raise Contradiction(limits, [smallest_cost(table) for table in costs], _closest(costs, limits))
        choice = _choice(found, widths)
        if all(cost_of(table, choice) <= limit for table, limit in zip(costs, limits, strict=True)):
            return choice
        excluded.append(choice)  # costs too much by less than HiGHS tolerates


def _rows(costs: Sequence[Costs], limits: Sequence[int]) -> tuple[Float64[np.ndarray, "T D"], Float64[np.ndarray, "T"]]:
    """Costs above each unit's cheapest and what the limits leave for them: over their common divisor, or to `LARGEST`."""
    rows, slack = [], []
    for table, limit in zip(costs, limits, strict=True):
        above = [cost - min(row) for row in table for cost in row]
        step = math.gcd(*above) or 1
        scale = min(1.0, LARGEST / (max(above) // step or 1))
        rows.append([cost // step * scale for cost in above])
        slack.append((limit - smallest_cost(table)) // step * scale)
    return np.array(rows, np.float64), np.array(slack, np.float64)


def _solve(
    objective: Float64[np.ndarray, "V"],
    widths: Sequence[int],
    rows: Float64[np.ndarray, "T V"],
    slack: Float64[np.ndarray, "T"],
    gap: float,
    excluded: Sequence[Sequence[int]] = (),
) -> OptimizeResult:
    """One option for every unit, at least `objective`; a variable beyond the options is a non-negative number."""
    U, D, V = len(widths), sum(widths), len(objective)
    one = csr_array((np.ones(D), (np.repeat(np.arange(U), widths), np.arange(D))), shape=(U, V))
    whole = np.arange(V) < D
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(csr_array(rows), -np.inf, slack)]
    for choice in excluded:
        at = np.cumsum([0, *widths[:-1]]) + np.array(choice)
        row = csr_array((np.ones(U), (np.zeros(U, np.int64), at)), shape=(1, V))
        constraints.append(LinearConstraint(row, -np.inf, U - 1))
    with _silence():
        return milp(
            objective,
            integrality=whole.astype(np.int64),
            bounds=Bounds(0, np.where(whole, 1.0, np.inf)),
            constraints=constraints,
            options={"mip_rel_gap": gap},
        )


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS writes a line to the process's standard output now and then, also where asked not to (scipy 1.17)."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _closest(costs: Sequence[Costs], limits: Sequence[int]) -> list[int]:
    """What the choice costs whose largest excess over a limit, as a part of that limit, is least."""
    widths = [len(row) for row in costs[0]]
    scales = np.array([max(abs(limit), 1) for limit in limits], np.float64)
    room = np.array([limit - smallest_cost(table) for table, limit in zip(costs, limits, strict=True)], np.float64)
    above = np.array([[cost - min(row) for row in table for cost in row] for table in costs], np.float64)
    rows = np.concatenate([above / scales[:, None], -np.ones((len(costs), 1))], 1)
    objective = np.zeros(rows.shape[1])
    objective[-1] = 1.0
    choice = _choice(_solve(objective, widths, rows, room / scales, NEAR), widths)
    return [cost_of(table, choice) for table in costs]


def _choice(found: OptimizeResult, widths: Sequence[int]) -> list[int]:
    if found.x is None:
        raise ArithmeticError(f"HiGHS found no choice: {found.message}")
    ends = np.cumsum(widths)
    return [int(part.argmax()) for part in np.split(found.x[: ends[-1]], ends[:-1])]
