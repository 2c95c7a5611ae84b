"""What proxies read of a model: small samples of every layer's tensors, and exact totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from compress.proxies.operations import SIDE, Tensors

Sample = Float[np.ndarray, "R C"]  # of a layer; 1 row or column where all are the same
TOTALS = {  # exact, of whole layers
    "snip": "sum of |weight x gradient|",
    "synflow": "sum of |weight x virtual gradient|, with all weights made positive",
    "eigenvalue": "top eigenvalue of the Hessian",
    "trace": "trace of the Hessian",
    "spread": "standard deviation of the output",
    "channels": "output features",
    "overlap": "similarity of the output to those of the other layers",
    "weight_error": "squared error of the weight",
    "output_error": "squared error of the output, relative to the output",
}
BY_OPTION = frozenset({"weight_error", "output_error"})


@dataclass(frozen=True)
class Statistics:
    """Of every layer: its unit's number, its number of weights, the bits of every option, `tensors` by the letters of
    `operations.INPUTS`, and `totals` by the names above, [L] or [L, O].

    Layers with fewer options than others repeat their last.
    """

    layers: tuple[str, ...]
    unit_of: Int[np.ndarray, "L"]
    weights: Float[np.ndarray, "L"]
    bits: Float[np.ndarray, "L O"]
    tensors: Mapping[str, Tensors]
    totals: Mapping[str, Float[np.ndarray, "L ..."]]

    def by_unit(self, table: Float[np.ndarray, "L O"]) -> Float[np.ndarray, "U O"]:
        """What a table of layers makes of units: sums over their layers."""
        found = np.zeros((int(self.unit_of.max()) + 1, table.shape[1]))
        np.add.at(found, self.unit_of, table)
        return found


def scores(table: Float[np.ndarray, "U O"], choices: Int[np.ndarray, "C U"]) -> Float[np.ndarray, "C"]:
    """The score of every configuration: the sum over units of what the table has for its option."""
    found: Float[np.ndarray, "C"] = np.take_along_axis(table, choices.T, 1).sum(0)
    return found


def places(size: int, draw: np.random.Generator) -> Int[np.ndarray, "S"]:
    """SIDE rows or columns of `size`, drawn without replacement; of fewer than SIDE all, again and again."""
    return np.resize(draw.permutation(size), SIDE)


def scaled(sample: Sample, mean_square: float) -> Sample:
    """A sample made to have the mean square of the whole it was drawn from, which it can differ from by its draw."""
    own = float(np.square(sample, dtype=np.float64).mean())
    return sample * np.float32(np.sqrt(mean_square / own)) if own > 0 else sample


def shifted(sample: Sample, mean: float) -> Sample:
    """A sample made to have the mean of the whole: for what has both signs, and no scale that keeps them."""
    return sample + np.float32(mean - sample.mean(dtype=np.float64))


def stacked(rows: Sequence[Sequence[Sample]]) -> Tensors:
    """Samples [layer][option] as one tensor; layers with fewer options repeat their last."""
    most = max(len(row) for row in rows)
    return np.stack([np.stack([row[min(o, len(row) - 1)] for o in range(most)]) for row in rows]).astype(np.float32)
