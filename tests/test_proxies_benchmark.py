from __future__ import annotations

import numpy as np
import pytest

from benchmarks import proxies
from compress.proxies.ranking import Ranking
from tests.proxies.made import bench


def made(value: float) -> Ranking:
    return Ranking((value, value, value), (value, value, value), value / 2, value / 4)


def test_means_are_over_benches_for_each_seed():
    found = {
        ("p", "A"): [made(0.2), made(0.4)],
        ("p", "B"): [made(0.6), made(0.6)],
        ("q", "A"): [made(-1.0)],
        ("q", "B"): [made(1.0)],
    }
    rows = {(one.subject, one.setting, one.metric): one for one in proxies._measurements(found, ["A", "B"])}
    assert rows["p", "A", "Spearman, first 100%"].value == pytest.approx(0.3)
    assert rows["p", "A", "Spearman, first 100%"].spread == pytest.approx(0.2)
    assert rows["p", "mean", "Spearman, first 100%"].value == pytest.approx((0.4 + 0.5) / 2)
    assert rows["p", "mean", "Spearman, first 100%"].spread == pytest.approx(0.1)
    assert rows["q", "mean", "Kendall within size bands"].value == 0
    assert rows["p", "B", "Spearman within size bands"].value == pytest.approx(0.3)


def test_what_is_not_finite_ranks_nothing():
    one = bench()
    table = np.full((12, 4), np.nan)
    assert proxies._ranking(table, one).spearman == (0, 0, 0)
    by_size = proxies._ranking(-one.statistics.bits * one.statistics.weights[:, None], one)
    assert by_size.spearman[-1] > 0.2


def test_the_throughput_is_of_formulas_on_one_bench(monkeypatch):
    monkeypatch.setattr(proxies, "FORMULAS", 5)
    assert proxies._throughput(bench()) > 1
