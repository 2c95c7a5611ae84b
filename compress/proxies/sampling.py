"""Configurations for a bench: as different as they come, at sizes that are spread evenly."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from compress.errors import CompressError

TOLERANCE = 0.01  # of the whole range of sizes: how far a configuration may be from its band's
TRIES = 200  # for every configuration that is wanted


def stratified(
    costs: Float[np.ndarray, "U O"], bands: int, per_band: int, draw: np.random.Generator
) -> tuple[Int[np.ndarray, "C U"], Int[np.ndarray, "C"]]:
    """Different choices in `bands` bands of equal cost each, and the number of every one's band.

    The bands are spread evenly between the cheapest and the dearest choice. In a band the cost is the same within
    TOLERANCE of that range, so that it cannot explain why one choice loses more than another. A choice begins with options drawn
    by chances that are drawn themselves, so that some are nearly uniform and others use everything, and is then moved to its
    band by changes of random units.
    """
    lowest, highest = costs.min(1).sum(), costs.max(1).sum()
    if highest <= lowest:
        raise CompressError("All options have the same size, so that there is nothing to rank. Give several --bits.")
    found: dict[tuple[int, ...], int] = {}
    for band, target in enumerate(np.linspace(lowest, highest, bands + 2)[1:-1]):
        for _ in range(per_band * TRIES):
            if sum(one == band for one in found.values()) == per_band:
                break
            choice = _moved(_drawn(costs, draw), costs, float(target), TOLERANCE * (highest - lowest), draw)
            if choice is not None:
                found.setdefault(choice, band)
        else:
            raise CompressError(
                f"Fewer than {per_band} different configurations were found at one size. "
                "Ask for fewer --configurations, or give more options."
            )
    return np.array(list(found)), np.array(list(found.values()))


def _drawn(costs: Float[np.ndarray, "U O"], draw: np.random.Generator) -> Int[np.ndarray, "U"]:
    chances = draw.dirichlet(np.ones(costs.shape[1]))
    return draw.choice(costs.shape[1], len(costs), p=chances)


def _moved(
    choice: Int[np.ndarray, "U"], costs: Float[np.ndarray, "U O"], target: float, tolerance: float, draw: np.random.Generator
) -> tuple[int, ...] | None:
    """The choice after changes of random units, each nearer to the target; None where these end too far from it."""
    units, off = np.arange(len(costs)), float(costs[np.arange(len(costs)), choice].sum()) - target
    while abs(off) > tolerance:
        change = costs - costs[units, choice][:, None]
        nearer = np.argwhere(np.abs(off + change) < abs(off))
        if not len(nearer):
            return None
        unit, option = nearer[int(draw.integers(len(nearer)))]
        off += float(change[unit, option])
        choice[unit] = option
    return tuple(choice.tolist())
