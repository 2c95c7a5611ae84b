from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from compress.mixed.bisection import OutOfReach, bisect, smallest


class Counted:
    """Losses that add up, and a list of what was measured."""

    def __init__(self, loss: Callable[[list[int]], float]) -> None:
        self.loss, self.asked = loss, list[tuple[int, ...]]()

    def __call__(self, choice: list[int]) -> float:
        self.asked.append(tuple(choice))
        return self.loss(choice)


L = 40
WEIGHTS = [1.0 + u for u in range(L)]  # unit 0 is the least sensitive
LADDERS = [[3, 2, 1, 0]] * L  # options are named by their precision


def additive(choice: list[int]) -> float:
    return sum(weight * (4.0 ** (3 - option) - 1) for weight, option in zip(WEIGHTS, choice, strict=True))


@pytest.mark.parametrize("target", [0.0, 2.9, 3.0, 500.0, 2460.0, 9000.0, 1e9])
def test_it_lowers_as_many_as_the_target_allows_in_few_measurements(target):
    measure = Counted(additive)
    found = bisect(range(L), LADDERS, measure, target)
    assert found.loss == additive(found.choice) <= target
    assert found.evaluations == len(measure.asked) == len(set(measure.asked)) <= 1 + 3 * math.ceil(math.log2(L + 1))
    expected = [3] * L
    for rung in (2, 1, 0):
        for u in range(L):
            lower = [*expected[:u], rung, *expected[u + 1 :]]
            if expected[u] > rung + 1 or additive(lower) > target:
                break
            expected = lower
    assert found.choice == expected


def test_pinned_units_and_short_ladders_stay_where_they_are():
    ladders = [[3, 2, 1, 0], [1], [2, 0], [3]]
    found = bisect([3, 2, 1, 0], ladders, lambda choice: float(choice[0] < 1), 0.5)
    assert found.choice == [1, 1, 0, 3]
    assert bisect([3, 2, 1], ladders, lambda _: 0.0, 0.5).choice == [3, 1, 0, 3], "units without a place in the order stay"


def test_the_better_measurement_decides_and_units_go_up_one_by_one():
    verify = Counted(lambda choice: additive(choice) * 1.1)
    found = bisect(range(L), LADDERS, additive, 500.0, verify)
    without = bisect(range(L), LADDERS, additive, 500.0).choice
    assert found.loss == additive(found.choice) * 1.1 <= 500
    changes = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in zip(verify.asked[1:], verify.asked[2:], strict=False)]
    assert verify.asked[1] == tuple(without)
    assert changes
    assert set(changes) == {1}
    assert all(verify.loss(list(choice)) > 500 for choice in verify.asked[1:-1])


@pytest.mark.parametrize("seed", range(20))
def test_noise_never_leads_past_the_target(seed):
    draws: dict[tuple[int, ...], float] = {}

    def noisy(choice: list[int]) -> float:
        return draws.setdefault(tuple(choice), additive(choice) * random.Random(f"{seed}{choice}").uniform(0.3, 3))

    found = bisect(range(L), LADDERS, noisy, 700.0)
    assert found.loss == noisy(found.choice) <= 700
    assert bisect(range(L), LADDERS, noisy, 700.0) == found
    plans = [[3 - (u < k) for u in range(L)] for k in range(L, -1, -1)]
    found = smallest(plans, noisy, 300.0)
    assert found.loss == noisy(found.choice) <= 300


@pytest.mark.parametrize("target", [0.0, 4.0, 300.0, 1e9])
def test_the_cheapest_plan_that_meets_the_target(target):
    plans = [[3 - (u < k) for u in range(L)] for k in range(L, -1, -1)]
    measure = Counted(additive)
    found = smallest(plans, measure, target)
    assert found.choice == next(plan for plan in plans if additive(plan) <= target)
    assert found.loss == additive(found.choice)
    assert found.evaluations == len(measure.asked) <= math.ceil(math.log2(len(plans) + 1)) + 1


def test_the_better_measurement_asks_for_a_dearer_plan():
    plans = [[k] for k in range(10)]
    found = smallest(plans, lambda choice: float(9 - choice[0]), 5.0, lambda choice: float(11 - choice[0]))
    assert (found.choice, found.loss) == ([6], 5.0)


@pytest.mark.parametrize("verify", [None, lambda _: 0.3])
def test_a_target_below_the_most_precise_choice_is_refused(verify):
    for search in (lambda: bisect([0], [[1, 0]], lambda _: 0.3, 0.2, verify), lambda: smallest([[0], [1]], lambda _: 0.3, 0.2)):
        with pytest.raises(OutOfReach, match=r"measures 0\.3, more than the target 0\.2") as caught:
            search()
        assert (caught.value.loss, caught.value.target) == (0.3, 0.2)
