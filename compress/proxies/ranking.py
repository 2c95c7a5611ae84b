"""How well scores rank configurations by their losses: at the top, over all, and among configurations of one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import kendalltau, rankdata

RATIOS = (0.2, 0.5, 1.0)  # of the configurations that a proxy puts first, as EMQ reports (arXiv 2307.10554)

Values = Float[np.ndarray, "C"]
Correlation = Callable[[Values, Values], float]


@dataclass(frozen=True)
class Ranking:
    """Correlations of scores with losses at RATIOS, and the mean of those within every size band, by Spearman and Kendall."""

    spearman: tuple[float, ...]
    kendall: tuple[float, ...]
    within: float
    within_kendall: float


def spearman(scores: Float[np.ndarray, "C"], losses: Float[np.ndarray, "C"]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where either is constant, as nothing is ranked then."""
    return pearson(rankdata(scores), rankdata(losses))


def pearson(x: Float[np.ndarray, "C"], y: Float[np.ndarray, "C"]) -> float:
    """The correlation of two vectors; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt(x @ x) * np.sqrt(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def kendall(scores: Float[np.ndarray, "C"], losses: Float[np.ndarray, "C"]) -> float:
    """Kendall's tau-b; 0 where either is constant."""
    if np.ptp(scores) == 0 or np.ptp(losses) == 0:
        return 0.0
    return float(kendalltau(scores, losses).statistic)


def first(scores: Float[np.ndarray, "C"], ratio: float) -> Int[np.ndarray, "c"]:
    """The part of the configurations with the lowest scores, at least two; earlier ones where scores are equal."""
    return np.argsort(scores, kind="stable")[: max(2, round(ratio * len(scores)))]


def within(
    scores: Float[np.ndarray, "C"],
    losses: Float[np.ndarray, "C"],
    bands: Int[np.ndarray, "C"],
    correlation: Correlation = spearman,
) -> float:
    """The mean over size bands, given by number, of the correlation inside each: what is left once size explains nothing."""
    members = [bands == band for band in np.unique(bands)]
    return float(np.mean([correlation(scores[one], losses[one]) for one in members]))


def ranked(scores: Float[np.ndarray, "C"], losses: Float[np.ndarray, "C"], bands: Int[np.ndarray, "C"]) -> Ranking:
    """Everything that is reported of a proxy: lower scores stand for lower losses."""
    tops = [first(scores, ratio) for ratio in RATIOS]
    return Ranking(
        spearman=tuple(spearman(scores[top], losses[top]) for top in tops),
        kendall=tuple(kendall(scores[top], losses[top]) for top in tops),
        within=within(scores, losses, bands),
        within_kendall=within(scores, losses, bands, kendall),
    )
