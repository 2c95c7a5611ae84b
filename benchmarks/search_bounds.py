"""What no choice of bits can beat: mixes of uniform plans to begin with, and real numbers of bits where units' losses add up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from compress.spec import BITS

SMALLEST = 1e-12  # a measured loss may be below zero by rounding
STEP = 0.01  # bits
BISECTIONS = 100


def interpolated(points: Sequence[tuple[float, float]], size: float) -> float:
    """The least loss of a mix of two plans that has this size, where the loss of a mix is the mix of the losses."""
    below, above = [p for p in points if p[0] <= size], [p for p in points if p[0] >= size]
    return min(a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (size - a[0]) / (b[0] - a[0]) for a, b in product(below, above))


def water_filled(losses: Sequence[float], weights: Sequence[int]) -> float:
    """The part of a uniform plan's loss that stays when every unit takes the best real number of bits for the same sum.

    Where units' losses add up and fall by the same factor per bit (4 at high rates), the best bits make every unit's loss per
    weight the same (reverse water-filling, the classic result of rate distortion): their mean over weights, arithmetic for the
    uniform plan, becomes the geometric one.
    """
    W = np.array(weights, np.float64)
    per_weight = np.maximum(losses, SMALLEST) / W
    mean, log_mean = np.average(per_weight, weights=W), np.average(np.log(per_weight), weights=W)
    return float(np.exp(log_mean) / mean)


def real_bits(losses: Sequence[Sequence[float]], weights: Sequence[int], average: float) -> float:
    """The least sum of losses at this average, were there all widths from 2 to 8: logarithms of losses are interpolated.

    By a price per bit, at which every unit takes what is best for it: the mean over weights falls as the price rises.
    """
    W = np.array(weights, np.float64)
    widths = np.arange(BITS[0], BITS[-1] + STEP / 2, STEP)
    curves = np.exp([np.interp(widths, BITS, np.log(np.maximum(row, SMALLEST))) for row in losses])

    def chosen(log_price: float) -> np.ndarray:
        return np.argmin(curves + np.exp(log_price) * W[:, None] * widths, axis=1)

    cheap, dear = -100.0, 100.0
    for _ in range(BISECTIONS):
        middle = (cheap + dear) / 2
        spent = np.average(widths[chosen(middle)], weights=W)
        cheap, dear = (middle, dear) if spent > average else (cheap, middle)
    return float(curves[np.arange(len(W)), chosen(cheap)].sum())  # spends a little more than allowed: a bound
