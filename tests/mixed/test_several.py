from __future__ import annotations

import ctypes
import random

import pytest
from scipy.optimize import milp

from compress.mixed import several as module
from compress.mixed.knapsack import knapsack
from compress.mixed.several import Contradiction, several
from compress.mixed.tables import cost_of, loss_of
from tests.mixed.brute import choices, least, limits_between, problem, within


@pytest.mark.parametrize("largest", [module.LARGEST, 4e-6])
@pytest.mark.parametrize("tables", [1, 2, 3])
@pytest.mark.parametrize("seed", range(24))
def test_it_equals_brute_force(seed, tables, largest, monkeypatch):
    """Also with rows so small that HiGHS tolerates choices beyond the limits."""
    monkeypatch.setattr(module, "LARGEST", largest)
    losses, costs = problem(seed, tables)
    limits = limits_between(costs, seed)
    expected = least(losses, costs, limits)
    if expected is None:
        with pytest.raises(Contradiction):
            several(losses, costs, limits)
        return
    choice = several(losses, costs, limits)
    assert within(costs, limits, choice)
    assert loss_of(losses, choice) == pytest.approx(expected[0], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_small_losses_are_told_apart(scale):
    losses = [[scale * 2, scale * 1], [scale * 3, scale * 1], [scale * 2.5, scale * 1]]
    assert several(losses, [[[1, 2]] * 3, [[3, 1]] * 3], [4, 7]) == [0, 1, 0]


def test_one_limit_of_a_model_is_the_knapsack():
    draw = random.Random(0)
    costs = [[size * bits for bits in (2, 3, 4, 8)] for size in (draw.randint(10**6, 10**8) for _ in range(60))]
    losses = [[draw.lognormvariate(0, 1) * 4.0**-bits for bits in (2, 3, 4, 8)] for _ in costs]
    limit = sum(row[1] for row in costs) + 12345
    choice = several(losses, [costs], [limit])
    assert cost_of(costs, choice) <= limit
    assert loss_of(losses, choice) == pytest.approx(loss_of(losses, knapsack(losses, costs, limit)), rel=1e-9)


def test_limits_that_contradict_each_other_say_what_is_possible():
    sizes, times = [[1, 3]] * 4, [[30, 10]] * 4  # the small option is the slow one
    with pytest.raises(Contradiction, match="alone, costs can be 4 against the limit 7, 40 against the limit 50") as caught:
        several([[1.0, 0.0]] * 4, [sizes, times], [7, 50])
    assert caught.value.limits == [7, 50]
    assert caught.value.smallest == [4, 40]
    worst = min(max(cost_of(sizes, c) / 7, cost_of(times, c) / 50) for c in choices([[1.0, 0.0]] * 4))
    size, time = caught.value.closest
    assert max(size / 7, time / 50) == pytest.approx(worst)


def test_a_limit_that_cannot_be_met_alone_is_told_too():
    with pytest.raises(Contradiction) as caught:
        several([[1.0, 0.0]] * 2, [[[5, 6]] * 2, [[1, 1]] * 2], [9, 2])
    assert caught.value.smallest == [10, 2]
    assert caught.value.closest == [10, 2]


def test_every_table_needs_a_limit():
    with pytest.raises(ValueError, match="2 cost tables and 1 limits"):
        several([[0.0]], [[[1]], [[1]]], [1])


def test_nothing_is_printed(monkeypatch, capfd):
    """HiGHS writes to the process's standard output for some large problems."""

    def talking(*arguments, **options):
        ctypes.CDLL(None).puts(b"from C")
        return milp(*arguments, **options)

    monkeypatch.setattr(module, "milp", talking)
    assert several([[1.0, 0.0]], [[[1, 2]]], [2]) == [1]
    ctypes.CDLL(None).puts(b"later")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("later\n", "")
