from __future__ import annotations

import numpy as np
import pytest

from compress.mixed.quadratic import assemble, energy, nearest_psd, quadratic
from compress.mixed.tables import cost_of, loss_of
from tests.mixed.brute import choices, limits_between, problem, within


def interactions(seed: int, losses: list[list[float]]) -> dict[tuple[int, int], list[list[float]]]:
    """Between about half of the pairs."""
    draw = np.random.default_rng(seed)
    pairs = [(u, v) for u in range(len(losses)) for v in range(u) if draw.random() < 0.5]
    return {(u, v): draw.normal(0, 0.4, (len(losses[u]), len(losses[v]))).tolist() for u, v in pairs}


def total(losses, pairs, choice) -> float:
    return loss_of(losses, choice) + sum(table[choice[u]][choice[v]] for (u, v), table in pairs.items())


@pytest.mark.parametrize("seed", range(8))
def test_the_quadratic_form_is_the_losses_and_interactions(seed):
    losses, _ = problem(seed, units=4)
    pairs = interactions(seed, losses)
    G, widths = assemble(losses, pairs), [len(row) for row in losses]
    assert (G == G.T).all()
    for choice in choices(losses):
        assert energy(G, widths, choice) == pytest.approx(total(losses, pairs, choice), abs=1e-12)


@pytest.mark.parametrize("pair", [(0, 0), (0, 1)])
def test_a_table_that_does_not_fit_its_pair_is_refused(pair):
    with pytest.raises(ValueError, match="the table of units 0 and"):
        assemble([[1.0, 2.0], [3.0]], {pair: [[1.0, 2.0], [3.0, 4.0]]})


def test_the_projection_is_semi_definite_nearest_and_idempotent():
    draw = np.random.default_rng(0)
    G = draw.normal(size=(12, 12))
    G = G + G.T
    near = nearest_psd(G)
    assert np.linalg.eigvalsh(near).min() > -1e-12
    np.testing.assert_allclose(nearest_psd(near), near, atol=1e-12)
    negative = np.minimum(np.linalg.eigvalsh(G), 0)
    assert np.linalg.norm(near - G) == pytest.approx(np.linalg.norm(negative))
    for _ in range(50):
        A = draw.normal(size=(12, 12)) * 0.1
        half = np.linalg.cholesky(near + 1e-9 * np.eye(12)) + A
        assert np.linalg.norm(half @ half.T - G) >= np.linalg.norm(near - G)


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_small_problems_equal_brute_force(seed, tables):
    losses, costs = problem(seed, tables, units=5)
    limits = limits_between(costs, seed)
    widths = [len(row) for row in losses]
    G = nearest_psd(assemble(losses, interactions(seed, losses)))
    found = [energy(G, widths, choice) for choice in choices(losses) if within(costs, limits, choice)]
    if not found:
        with pytest.raises(ValueError, match="no choice keeps all limits"):
            quadratic(G, costs, limits)
        return
    choice = quadratic(G, costs, limits)
    assert within(costs, limits, choice)
    assert energy(G, widths, choice) == pytest.approx(min(found), abs=1e-9)


def test_interactions_change_the_choice():
    """Two units that harm each other when both are lowered: alone, each of the first two would be the one to lower."""
    losses, costs = [[1.0, 0.0], [1.1, 0.0], [1.5, 0.0]], [[[1, 2]] * 3]
    assert quadratic(assemble(losses, {}), costs, [4]) == [0, 0, 1]
    assert quadratic(assemble(losses, {(0, 1): [[2.0, 0.0], [0.0, 0.0]]}), costs, [4]) == [0, 1, 0]


def test_a_seed_gives_one_choice_and_large_ones_fit_and_improve():
    draw = np.random.default_rng(3)
    U, bits = 40, np.array([2, 3, 4, 8])
    half = draw.normal(size=(U * 4, 20)) * np.tile(2.0**-bits, U)[:, None] * draw.lognormal(0, 0.7, U).repeat(4)[:, None]
    G = half @ half.T
    costs = [[int(size * b) for b in bits] for size in draw.integers(1, 4, U) * 1000]
    limit = sum(row[1] for row in costs) + 777
    first = quadratic(G, [costs], [limit], seed=5)
    assert first == quadratic(G, [costs], [limit], seed=5)
    assert cost_of(costs, first) <= limit
    alone = quadratic(np.diag(np.diag(G)), [costs], [limit], restarts=0)
    assert energy(G, [4] * U, first) < 0.9 * energy(G, [4] * U, alone)


@pytest.mark.parametrize(
    ("shape", "limits", "message"), [(3, [1], "expected 2 options"), (2, [1, 1], "2 limits for 1"), (2, [0], "cheapest choice")]
)
def test_what_does_not_fit_is_refused(shape, limits, message):
    with pytest.raises(ValueError, match=message):
        quadratic(np.eye(shape), [[[1, 2]]], limits)
