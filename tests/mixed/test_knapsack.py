from __future__ import annotations

import itertools
import random

import pytest

from compress.mixed import knapsack as module
from compress.mixed.knapsack import frontier, knapsack
from compress.mixed.tables import cost_of, loss_of
from tests.mixed.brute import choices, least, limits_between, problem


@pytest.mark.parametrize("widths", [module.WIDTHS, (1, 2, 1 << 17), (1,)])
@pytest.mark.parametrize("seed", range(60))
def test_it_equals_brute_force(seed, widths, monkeypatch):
    """Also where the search has to widen, and where it has to give up."""
    monkeypatch.setattr(module, "WIDTHS", widths)
    losses, (costs,) = problem(seed)
    (limit,) = limits_between([costs], seed)
    expected = least(losses, [costs], [limit])
    choice = knapsack(losses, costs, limit)
    assert expected is not None
    assert cost_of(costs, choice) <= limit
    assert loss_of(losses, choice) == pytest.approx(expected[0], abs=1e-12)
    if widths[-1] > 1:
        assert cost_of(costs, choice) == expected[1], "of choices of the same loss the cheapest"


def large(seed: int, units: int) -> tuple[list[list[float]], list[list[int]]]:
    draw = random.Random(seed)
    bits = (2, 3, 4, 5, 6, 8)
    sizes = [draw.choice([4096, 11008, 1024]) * 4096 for _ in range(units)]
    scales = [draw.lognormvariate(0, 1.5) for _ in range(units)]
    losses = [[scale * 4.0**-b * draw.lognormvariate(0, 0.2) for b in bits] for scale in scales]
    return losses, [[size * b // 8 + size // 64 for b in bits] for size in sizes]


def by_table(losses: list[list[float]], costs: list[list[int]], limit: int, step: int) -> float:
    """The textbook's dynamic programming: the least loss for every budget."""
    slack = (limit - sum(map(min, costs))) // step
    best = [0.0] * (slack + 1)
    for row, prices in zip(losses, costs, strict=True):
        above = [(cost - min(prices)) // step for cost in prices]
        options = list(zip(row, above, strict=True))
        best = [min(best[b - cost] + loss for loss, cost in options if cost <= b) for b in range(slack + 1)]
    return best[slack]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.8, 1.0])
def test_a_model_equals_the_textbook_table(fraction):
    losses, costs = large(0, units=40)
    low, high = sum(map(min, costs)), sum(map(max, costs))
    limit = low + int((high - low) * fraction)
    choice = knapsack(losses, costs, limit)
    assert cost_of(costs, choice) <= limit
    assert loss_of(losses, choice) == pytest.approx(by_table(losses, costs, limit, step=256 * 4096 // 8), rel=1e-12)


def test_units_that_are_all_the_same_share_the_budget():
    choice = knapsack([[1.0, 0.25, 0.0625]] * 50, [[2, 3, 4]] * 50, 130)
    assert sorted(choice) == [0] * 20 + [1] * 30


def test_an_option_that_costs_more_and_loses_more_is_never_taken():
    assert knapsack([[1.0, 2.0, 0.5]], [[1, 2, 3]], 2) == [0]


@pytest.mark.parametrize("limit", [9, 0, -1])
def test_a_limit_below_the_cheapest_choice_is_refused(limit):
    with pytest.raises(ValueError, match=f"cheapest choice costs 10, more than the limit {limit}"):
        knapsack([[0.0, 1.0], [2.0]], [[6, 4], [6]], limit)


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ([], [], "no units"),
        ([[1.0], []], [[1], []], "unit 1 has the losses"),
        ([[float("inf")]], [[1]], "unit 0 has the losses"),
        ([[1.0, 2.0]], [[1]], "other units or options"),
        ([[1.0]], [[1], [1]], "other units or options"),
    ],
)
def test_tables_that_do_not_fit_are_refused(losses, costs, message):
    with pytest.raises(ValueError, match=message):
        knapsack(losses, costs, 5)


@pytest.mark.parametrize("seed", range(40))
def test_the_frontier_has_every_choice_that_none_beats(seed):
    losses, (costs,) = problem(seed, units=5)
    plans = {(cost_of(costs, choice), loss_of(losses, choice)) for choice in choices(losses)}
    expected = {plan for plan in plans if not any(o != plan and o[0] <= plan[0] and o[1] <= plan[1] for o in plans)}
    found = frontier(losses, costs, points=5**5)
    assert [(cost_of(costs, choice), loss_of(losses, choice)) for _, _, choice in found] == [plan[:2] for plan in found]
    assert {plan[:2] for plan in found} == expected
    assert found == sorted(found)


@pytest.mark.parametrize("enumerated", [0, 1 << 14])
@pytest.mark.parametrize(("units", "points"), [(8, 20), (8, 2), (40, 30)])
def test_a_long_frontier_is_thinned_to_the_best_of_evenly_spaced_costs(units, points, enumerated, monkeypatch):
    monkeypatch.setattr(module, "ENUMERATED", enumerated)
    losses, costs = large(1, units)
    found = frontier(losses, costs, points)
    low, high = sum(map(min, costs)), sum(map(max, costs))
    assert 2 <= len(found) <= points
    assert (found[0][0], found[-1][0]) == (low, high)
    for earlier, later in itertools.pairwise(found):
        assert earlier[0] < later[0]
        assert earlier[1] > later[1]
    for cost, loss, choice in found:
        assert (cost, loss) == (cost_of(costs, choice), loss_of(losses, choice))
        assert loss == pytest.approx(loss_of(losses, knapsack(losses, costs, cost)), rel=1e-12)
