from __future__ import annotations

import pytest

from benchmarks import search, search_bounds
from benchmarks.record import Measurement, append
from compress.mixed.methods import METHODS
from compress.spec import BITS


def test_the_best_mix_of_two_plans_is_on_their_lower_hull():
    points = [(1.0, 8.0), (2.0, 6.0), (3.0, 2.0), (5.0, 1.0)]  # (2, 6) is above the line from 1 to 3
    assert [search_bounds.interpolated(points, size) for size in (1.0, 2.0, 2.5, 3.0, 4.0)] == [8.0, 5.0, 3.5, 2.0, 1.5]


def test_the_bound_is_the_geometric_over_the_arithmetic_mean_of_losses_per_weight():
    part = search_bounds.water_filled([100 * 8.0, 300 * 2.0], [100, 300])
    assert part == pytest.approx((8 * 2**3) ** 0.25 / (0.25 * 8 + 0.75 * 2))


def test_real_bits_reach_the_bound_where_losses_fall_by_four_per_bit():
    weights, per_weight = [100, 300], [8.0, 2.0]
    table = [[w * d * 4.0 ** (2 - b) for b in BITS] for w, d in zip(weights, per_weight, strict=True)]
    uniform = sum(row[1] for row in table)  # at 3 bits
    expected = search_bounds.water_filled([row[1] for row in table], weights)
    assert search_bounds.real_bits(table, weights, 3.0) / uniform == pytest.approx(expected, rel=0.02)


def test_methods_are_compared_over_all_models_and_budgets(tmp_path):
    losses = {
        "A, 2.5 bits": dict(zip(METHODS, (1.0, 2.0, 4.0, 1.0, 1.0, 1.0), strict=True)),
        "B, 2.5 bits": dict(zip(METHODS, (0.8, 0.1, 0.1, 0.2, 0.2, 0.4), strict=True)),
        "A, g128 or g32, 2.5 bits": {"kl": 0.01},
    }
    measured = [Measurement(m, at, search.LOSS, loss, "") for at, row in losses.items() for m, loss in row.items()]
    found = {
        (one.subject, one.metric): one.value for one in search.compare(append("search", measured, results=tmp_path / "results"))
    }
    assert found["kl", "geometric mean"] == pytest.approx(8**0.5)
    assert found["kl", "largest"] == pytest.approx(8)
    assert found["output", "geometric mean"] == pytest.approx(2)
    against = "interlayer / hawq-v2"
    assert (found["kl", "pairs"], found[against, "equal in"]) == (2, 0)
    assert (found[against, "geometric mean"], found[against, "lower in"]) == (pytest.approx(1), 1)
