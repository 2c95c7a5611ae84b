"""The choice of least loss when losses of pairs of units interact: an integer quadratic program, solved by local search.

The program is CLADO's (arXiv 2307.05657), who solve it with Gurobi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from compress.mixed.knapsack import knapsack
from compress.mixed.several import several
from compress.mixed.tables import Costs, Losses, check, cost_of

# Of a unit's range of loss, added to the losses from which restarts begin, in turn: little is best for 100 units (0.03 against
# 0.3: lower in 5 of 6 problems, and twice as fast), much for 5 (of 300 problems 3 missed the optimum with 0.03, none with 1).
NOISES = (0.03, 1.0, 0.03, 0.1)
ROUNDING = 1e-12  # of the largest entry: changes of less do not count

Pairs = Mapping[tuple[int, int], Sequence[Sequence[float]]]


def assemble(losses: Losses, pairs: Pairs) -> Float64[np.ndarray, "D D"]:
    """G, symmetric over all options of all units, with x^T G x the loss of the choice x (one 1 per unit): its units' losses
    plus pairs[u, v][option of u][option of v] of those pairs that interact, each listed once.
    """
    check(losses)
    starts = np.cumsum([0, *(len(row) for row in losses)])
    G = np.diag(np.concatenate([np.array(row, np.float64) for row in losses]))
    for (u, v), table in pairs.items():
        block = np.array(table, np.float64) / 2
        if u == v or block.shape != (len(losses[u]), len(losses[v])):
            raise ValueError(f"the table of units {u} and {v} has the shape {block.shape}")
        G[starts[u] : starts[u + 1], starts[v] : starts[v + 1]] += block
        G[starts[v] : starts[v + 1], starts[u] : starts[u + 1]] += block.T
    return G


def nearest_psd(G: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D D"]:
    """The positive semi-definite matrix nearest to a symmetric one in the Frobenius norm: negative eigenvalues become zero.

    Measured interactions are noisy; left in, directions of negative loss draw the search to where the noise is largest.
    """
    values, vectors = np.linalg.eigh((G + G.T) / 2)
    half = vectors * np.sqrt(np.maximum(values, 0))
    found: Float64[np.ndarray, "D D"] = half @ half.T
    return found


def energy(G: Float64[np.ndarray, "D D"], widths: Sequence[int], choice: Sequence[int]) -> float:
    """x^T G x of a choice among `widths[u]` options of every unit u."""
    at = _at(widths, choice)
    return float(G[np.ix_(at, at)].sum())


def quadratic(
    G: Float64[np.ndarray, "D D"], costs: Sequence[Costs], limits: Sequence[int], restarts: int = 8, seed: int = 0
) -> list[int]:
    """A choice of low x^T G x whose cost by each table is at most its limit; not provably the lowest.

    Descent by the best change of one or two units at a time, from the best choice without interactions and `restarts` times
    from the best for what options cost beside the best choice so far, with noise. ValueError as from `knapsack` and `several`.
    """
    widths = [len(row) for row in costs[0]]
    if len(costs) != len(limits) or any([len(row) for row in table] != widths for table in costs):
        raise ValueError(f"{len(limits)} limits for {len(costs)} cost tables, which must have the same units and options")
    if G.shape != (sum(widths), sum(widths)):
        raise ValueError(f"interactions are {G.shape}; expected {sum(widths)} options in all")
    draw = np.random.default_rng(seed)
    best = _descend(G, widths, costs, limits, _start(np.diag(G), widths, costs, limits))
    for restart in range(restarts):
        beside = _beside(G, widths, best)
        spread = np.repeat([float(np.ptp(part)) for part in _split(beside, widths)], widths)
        losses = beside + NOISES[restart % len(NOISES)] * spread * draw.standard_normal(len(beside))
        found = _descend(G, widths, costs, limits, _start(losses, widths, costs, limits))
        if energy(G, widths, found) < energy(G, widths, best):
            best = found
    return best


def _at(widths: Sequence[int], choice: Sequence[int]) -> Int64[np.ndarray, "U"]:
    return np.cumsum([0, *widths[:-1]]) + np.array(choice, np.int64)


def _split(values: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(widths)[:-1])


def _start(losses: Float64[np.ndarray, "D"], widths: Sequence[int], costs: Sequence[Costs], limits: Sequence[int]) -> list[int]:
    rows = [[float(loss) for loss in part] for part in _split(losses, widths)]
    return knapsack(rows, costs[0], limits[0]) if len(costs) == 1 else several(rows, costs, limits)


def _beside(G: Float64[np.ndarray, "D D"], widths: Sequence[int], choice: Sequence[int]) -> Float64[np.ndarray, "D"]:
    """What every option adds to the loss when the other units keep theirs."""
    at = _at(widths, choice)
    own = np.repeat(at, widths)
    options = np.arange(len(G))
    found: Float64[np.ndarray, "D"] = G[options, options] + 2 * (G[:, at].sum(1) - G[options, own])
    return found


def _descend(
    G: Float64[np.ndarray, "D D"], widths: Sequence[int], costs: Sequence[Costs], limits: Sequence[int], choice: list[int]
) -> list[int]:
    """Change one or two units, whichever lowers the loss most within the limits, until nothing does."""
    starts = np.cumsum([0, *widths[:-1]])
    unit = np.repeat(np.arange(len(widths)), widths)
    tables = [np.array([cost for row in table for cost in row], np.int64) for table in costs]
    same = unit[:, None] == unit
    tolerance = ROUNDING * float(np.abs(G).max())
    choice = list(choice)
    while True:
        own = _at(widths, choice)[unit]
        beside = _beside(G, widths, choice)
        one = beside - beside[own]
        change = one[:, None] + one + 2 * (G - G[:, own] - G[own] + G[own][:, own])
        change[same] = np.inf
        np.fill_diagonal(change, one)
        for table, costs_, limit in zip(tables, costs, limits, strict=True):
            more = table - table[own]
            both = more[:, None] + more
            np.fill_diagonal(both, more)
            change[both > limit - cost_of(costs_, choice)] = np.inf
        lowest = int(change.argmin())
        if not change.flat[lowest] < -tolerance:
            return choice
        for option in divmod(lowest, len(G)):
            choice[int(unit[option])] = int(option - starts[unit[option]])
