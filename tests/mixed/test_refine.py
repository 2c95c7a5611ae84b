from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from compress.mixed.refine import Stage, State, mutated, refine
from tests.mixed.brute import limits_between, problem, within

STAGES = (Stage(10, 4), Stage(100, 1))
U = 12
COSTS = [[[2, 3, 4, 8]] * U]
WEIGHTS = [2.0**u for u in range(U)]


def smooth(choice: list[int], tokens: int) -> float:
    """Lower with more bits for the later units; noisier with few tokens."""
    loss = sum(weight * 4.0 ** -(2, 3, 4, 8)[option] for weight, option in zip(WEIGHTS, choice, strict=True))
    return loss * random.Random(f"{choice}{tokens}").uniform(1 - 1 / tokens, 1 + 1 / tokens)


@pytest.mark.parametrize("tables", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_mutations_stay_within_every_limit(seed, tables):
    losses, costs = problem(seed, tables)
    limits, draw = limits_between(costs, seed), np.random.default_rng(seed)
    choice = [min(range(len(row)), key=lambda option, row=row: row[option]) for row in costs[0]]
    limits = [
        max(limit, sum(row[o] for row, o in zip(table, choice, strict=True))) for limit, table in zip(limits, costs, strict=True)
    ]
    for _ in range(30):
        new = mutated(choice, costs, limits, draw)
        assert within(costs, limits, new)
        assert all(0 <= option < len(row) for option, row in zip(new, losses, strict=True))
        choice = new


def test_equal_units_swap_exactly():
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        new = mutated([1] * 8, [[[2, 3, 4]] * 8], [24], draw)
        assert sum(new) == 8, "as much up as down"
        seen.add(sum(abs(option - 1) for option in new) // 2)
    assert {1, 2, 3} <= seen


def test_room_is_spent_before_anything_goes_down():
    new = mutated([0, 0], [[[2, 3]] * 2], [5], np.random.default_rng(0))
    assert sum(new) == 1


def test_what_cannot_move_stays():
    assert mutated([0, 0], [[[2, 3], [2]]], [4], np.random.default_rng(0)) == [0, 0]
    states = list(refine([0, 0], [[[2, 3], [2]]], [4], lambda _, __: 1.0, STAGES, patience=3))
    assert states[-1] == State([0, 0], 1.0, generation=3, idle=3, evaluations=1)


@pytest.mark.parametrize("seed", range(4))
def test_it_never_gets_worse_never_breaks_the_limit_and_gets_better(seed):
    asked = []

    def measure(choice: list[int], tokens: int) -> float:
        assert within(COSTS, [40], choice)
        asked.append((tuple(choice), tokens))
        return smooth(choice, tokens)

    states = list(refine([1] * U, COSTS, [40], measure, STAGES, offspring=16, patience=8, seed=seed))
    for before, after in itertools.pairwise(states):
        assert after.loss < before.loss or (after.choice, after.loss) == (before.choice, before.loss)
        assert after.idle == (0 if after.loss < before.loss else before.idle + 1)
    last = states[-1]
    assert last.loss == smooth(last.choice, 100)
    assert last.loss < 0.35 * states[0].loss
    assert last.idle == 8
    assert last.evaluations == len(asked) == len(set(asked)), "nothing is measured twice"
    assert sum(tokens == 100 for _, tokens in asked) <= 1 + 4 * last.generation


def test_it_goes_on_from_any_state_as_if_it_had_not_stopped():
    whole = list(refine([1] * U, COSTS, [40], smooth, STAGES, offspring=8, generations=12, seed=3))
    again = list(refine(whole[5], COSTS, [40], smooth, STAGES, offspring=8, generations=12, seed=3))
    assert [(s.choice, s.loss, s.generation, s.idle) for s in again] == [
        (s.choice, s.loss, s.generation, s.idle) for s in whole[5:]
    ]
    other = list(refine([1] * U, COSTS, [40], smooth, STAGES, offspring=8, generations=12, seed=4))
    assert [s.choice for s in other] != [s.choice for s in whole]


def test_generations_bound_the_search():
    assert [s.generation for s in refine([1] * U, COSTS, [40], smooth, STAGES, generations=3)] == [0, 1, 2, 3]


def test_the_last_stage_decides():
    """With few tokens everything looks better than the start; with many, nothing is."""
    states = list(
        refine([1] * U, COSTS, [40], lambda choice, tokens: float(tokens == 100 and choice != [1] * U), STAGES, patience=2)
    )
    assert states[-1].choice == [1] * U


def test_a_start_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"costs \[36\]; the limits are \[35\]"):
        next(refine([1] * U, COSTS, [35], smooth))
