from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from compress.proxies.ranking import first, kendall, pearson, ranked, spearman, within

X = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 4.0])
Y = np.array([2.0, 1.0, 4.0, 9.0, 3.0, 7.0])


def test_spearman_is_scipys_also_with_ties():
    assert spearman(X, Y) == pytest.approx(spearmanr(X, Y).statistic, abs=1e-12)


def test_kendall_counts_pairs():
    pairs = list(itertools.combinations(range(len(X)), 2))
    signs = [np.sign(X[i] - X[j]) * np.sign(Y[i] - Y[j]) for i, j in pairs]
    untied = math.sqrt(sum(X[i] != X[j] for i, j in pairs) * sum(Y[i] != Y[j] for i, j in pairs))
    assert kendall(X, Y) == pytest.approx(sum(signs) / untied)


def test_only_order_counts():
    assert spearman(np.exp(X), Y**3) == pytest.approx(spearman(X, Y))
    assert spearman(-X, Y) == pytest.approx(-spearman(X, Y))
    assert spearman(Y, Y) == pytest.approx(1)


@pytest.mark.parametrize("correlation", [spearman, kendall, pearson])
def test_what_is_constant_ranks_nothing(correlation):
    assert correlation(np.ones(6), Y) == 0
    assert correlation(X, np.ones(6)) == 0


def test_the_first_have_the_lowest_scores():
    assert first(X, 0.5).tolist() == [1, 2, 0]
    assert first(X, 0.01).tolist() == [1, 2], "two at least"
    assert sorted(first(X, 1.0)) == list(range(6))


def test_size_alone_ranks_nothing_within_bands():
    """Losses fall with size, and vary at random within a band: size ranks them well over all, and not at all within."""
    draw = np.random.default_rng(0)
    bands = np.repeat(np.arange(5), 40)
    losses, noise = 10.0 - bands + draw.standard_normal(200) * 0.3, draw.standard_normal(200) * 1e-3
    by_size = ranked(-bands + noise, losses, bands)
    assert by_size.spearman[-1] > 0.9
    assert abs(by_size.within) < 0.2
    perfect = ranked(losses**2, losses, bands)
    assert perfect.within == pytest.approx(1)
    assert perfect.within_kendall == pytest.approx(1)
    assert perfect.spearman == pytest.approx((1, 1, 1))
    assert perfect.kendall == pytest.approx((1, 1, 1))


def test_within_is_the_mean_of_bands():
    bands = np.array([0, 0, 0, 1, 1, 1])
    assert within(X, Y, bands) == pytest.approx((spearman(X[:3], Y[:3]) + spearman(X[3:], Y[3:])) / 2)
