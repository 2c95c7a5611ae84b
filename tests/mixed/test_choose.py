"""Choices within limits, and the smallest that keeps a measured quality, on losses that are made up."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from compress.errors import CompressError
from compress.mixed import choose
from compress.mixed.budget import Cost
from compress.mixed.choose import Measured, Model, interacting
from compress.mixed.knapsack import knapsack
from compress.mixed.limits import Budget
from compress.mixed.measure import Swaps
from compress.mixed.quadratic import energy
from compress.mixed.tables import cost_of, loss_of
from compress.mixed.units import Space, Unit
from compress.models import Layer
from compress.progress import silent
from compress.spec import LayerSpec, Scheme

OPTIONS = tuple(LayerSpec(Scheme(bits, 32)) for bits in (2, 3, 4, 8))


class Pretended(Swaps):
    """What a choice loses without a model: `losses` added up, and a part more for every two neighbours at 2 bits."""

    tokens = 16

    def __init__(self, losses: list[list[float]], beyond: float) -> None:
        self.losses, self.beyond = losses, beyond
        self.asked: list[int | None] = []

    def loss(self, specs, samples=None):
        self.asked.append(samples)
        at = [OPTIONS.index(spec) for spec in specs.values()]
        both = sum(a == b == 0 for a, b in itertools.pairwise(at))
        return loss_of(self.losses, at) + self.beyond * both

    def nll(self, specs):
        return 2.0 + (self.loss(specs) if specs else 0.0)


def problem(seed: int, units: int = 6):
    draw = random.Random(seed)
    sizes = [draw.choice([32, 64, 96]) for _ in range(units)]
    losses = [[draw.uniform(0.5, 1.5) * 4.0**-bits for bits in (2, 3, 4, 8)] for _ in sizes]
    layers = [Unit(f"u{i}", (Layer(f"u{i}", "linear", 32, K),), i) for i, K in enumerate(sizes)]
    space = Space(tuple(layers), tuple(OPTIONS for _ in sizes))
    table = [[32 * K * bits for bits in (2, 3, 4, 8)] for K in sizes]
    return losses, space, table


def cost(table, limit, name="size", fixed=1000) -> Cost:
    return Cost(name, table, fixed, limit, str)


def measured(losses, space, beyond: float = 0.0) -> Measured:
    return Measured(lambda: Pretended(losses, beyond), space)


@pytest.mark.parametrize("seed", range(5))
def test_a_limit_is_kept_and_nothing_better_keeps_it(seed):
    losses, space, table = problem(seed)
    least, most = (sum(map(best, table)) for best in (min, max))
    limit = 1000 + least + (most - least) // 3
    found = choose.choose(Model(losses), [cost(table, limit)], Budget(size=limit), measured(losses, space))
    assert 1000 + cost_of(table, found) <= limit
    every = itertools.product(range(4), repeat=len(losses))
    best = min(loss_of(losses, one) for one in every if 1000 + cost_of(table, one) <= limit)
    assert loss_of(losses, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_interactions_of_zero_change_nothing(seed):
    losses, space, table = problem(seed)
    limit = 1000 + sum(row[1] for row in table)
    model = interacting(losses, dict.fromkeys(itertools.combinations(range(6), 2), 0.0))
    for choice in ([0] * 6, [3] * 6, [0, 1, 2, 3, 2, 1]):
        assert model.predict(choice) == pytest.approx(loss_of(losses, choice))
    both = [
        choose.choose(one, [cost(table, limit)], Budget(size=limit), measured(losses, space)) for one in (model, Model(losses))
    ]
    assert both[0] == both[1]


def test_an_interaction_is_what_two_lose_beyond_what_each_does():
    losses = [[0.4, 0.1, 0.0], [0.9, 0.2, 0.0], [0.3, 0.3, 0.0]]
    model = interacting(losses, {(0, 1): 0.25, (1, 2): -0.1})
    assert model.predict([0, 0, 2]) == pytest.approx(0.4 + 0.9 + 0.25)
    assert model.predict([1, 0, 2]) == pytest.approx(0.1 + 0.9 + 0.25 * 0.5)  # half the amplitude of the worst
    assert model.predict([2, 0, 0]) == pytest.approx(0.9 + 0.3 - 0.1)
    assert model.predict([2, 2, 2]) == 0


def test_noise_never_promises_less_than_nothing():
    losses = [[0.1, 0.0], [0.1, 0.0], [-0.01, 0.0]]
    model = interacting(losses, {(0, 1): -5.0, (0, 2): 3.0})
    for choice in itertools.product(range(2), repeat=3):
        assert model.predict(choice) >= -1e-12
    assert np.linalg.eigvalsh(model.G).min() > -1e-12


def test_what_loses_together_is_kept_apart():
    losses = [[0.1, 0.0]] * 4
    table = [[1, 2]] * 4
    model = interacting(losses, {(0, 1): 0.2, (2, 3): 0.2})
    space = problem(0, 4)[1]
    found = choose.choose(model, [cost(table, 1006)], Budget(size=1006), measured(losses, space))
    assert sum(found) == 2
    assert found[0] != found[1]
    assert found[2] != found[3]
    assert energy(model.G, [2] * 4, found) == pytest.approx(0.2)


def test_several_limits_hold_at_once_or_are_said_to_contradict():
    losses, space, table = problem(1)
    kept = [[100 - option for option in range(4)] for _ in losses]  # costs less the more bits
    budget = Budget(size=1000 + sum(row[2] for row in table), avg_sparsity=0.5)
    size, other = cost(table, budget.size), cost(kept, 591, "avg_sparsity", 0)
    found = choose.choose(Model(losses), [size, other], budget, measured(losses, space))
    assert size.of(found) <= size.limit
    assert other.of(found) <= other.limit
    with pytest.raises(
        CompressError,
        match=r"No plan keeps all budgets: --size .*alone .*, together .*\), --avg-sparsity 585.* Relax one of them",
    ):
        choose.choose(Model(losses), [size, cost(kept, 585, "avg_sparsity", 0)], budget, measured(losses, space))


@pytest.mark.parametrize("beyond", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_a_target_of_quality_is_measured_to_be_kept(seed, beyond):
    losses, space, table = problem(seed)
    target = 0.3 * sum(row[0] for row in losses)
    judge = measured(losses, space, beyond)
    found = choose.choose(Model(losses), [cost(table, 0)], Budget(max_kl=target), judge)
    assert judge(found) <= target
    assert judge.known[tuple(found), None] == judge(found)
    every = [choice for choice in itertools.product(range(4), repeat=6) if judge(choice) <= target]
    smallest = min(cost_of(table, choice) for choice in every)
    assert smallest <= cost_of(table, found) <= 1.25 * smallest


def test_a_rise_of_perplexity_is_kept_too():
    losses, space, table = problem(2)
    judge = measured(losses, space)
    found = choose.choose(Model(losses), [cost(table, 0)], Budget(max_ppl_increase=0.05), judge)
    assert judge(found) <= math.log(1.05)
    assert cost_of(table, found) < sum(row[3] for row in table)


def test_a_target_out_of_reach_says_the_best():
    losses, space, table = problem(0)
    best = sum(row[3] for row in losses)
    with pytest.raises(
        CompressError, match=rf"--max-kl cannot be kept: the most precise plan measures {best:.4g} nats, and 1e-09"
    ):
        choose.choose(Model(losses), [cost(table, 0)], Budget(max_kl=1e-9), measured(losses, space))


def test_a_target_and_a_size_may_contradict():
    losses, space, table = problem(0)
    least = 1000 + sum(row[0] for row in table)
    budget = Budget(max_kl=sum(row[2] for row in losses), size=least)
    with pytest.raises(CompressError, match=r"--size .* and the target of quality contradict each other"):
        choose.choose(Model(losses), [cost(table, least)], budget, measured(losses, space))


@pytest.mark.parametrize("seed", range(3))
def test_refining_never_loses_more_and_keeps_the_limit(seed):
    losses, space, table = problem(seed)
    limit = 1000 + sum(row[1] for row in table)
    judge = measured(losses, space, beyond=0.05)
    start = knapsack(losses, table, limit - 1000)
    found = choose.refined(start, [cost(table, limit)], judge, 5, seed, silent)
    assert judge(found) <= judge(start)
    assert 1000 + cost_of(table, found) <= limit
    assert judge.swaps.asked[0] == 16384 // 16
    again = choose.refined(start, [cost(table, limit)], measured(losses, space, beyond=0.05), 5, seed, silent)
    assert found == again


def test_a_choice_is_measured_once():
    losses, space, _ = problem(0)
    judge = measured(losses, space)
    assert [judge([0] * 6), judge((0,) * 6), judge([0] * 6, 4), judge([0] * 6, 4)] == [judge([0] * 6)] * 4
    assert judge.swaps.asked == [None, 4]
