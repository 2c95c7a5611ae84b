from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compress.structured import obs


def problem(N: int = 5, K: int = 12, tokens: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g, dtype=torch.float64)
    return torch.randn(N, K, generator=g, dtype=torch.float64), x.t() @ x / tokens


def damped(H: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def loss(E: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.trace(E @ H @ E.t()))


def best(W: torch.Tensor, H: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Least squares on the given inputs, by the normal equations."""
    V = torch.zeros_like(W)
    V[:, inputs] = torch.linalg.solve(H[inputs][:, inputs], H[inputs] @ W.t()).t()
    return V


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_saliency_is_the_rise_of_the_loss_when_one_unit_goes(width):
    W, H = problem()
    H = damped(H)
    kept = torch.ones(12 // width, dtype=torch.bool)
    saliency = obs.saliency(W, torch.linalg.inv(H), kept, width)
    for u in range(len(kept)):
        left = torch.tensor([i for i in range(12) if i // width != u])
        expected = loss(W - best(W, H, left), H)
        assert abs(float(saliency[u]) - expected) < 1e-10 * max(1, expected)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 7), (1, 11), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("rounds", [1, 2, 100])
def test_the_costs_add_up_to_the_loss_and_the_weights_are_least_squares(width, count, rounds):
    W, H = problem(seed=count)
    found = obs.remove(W, H, width, count, 0.01, rounds)
    inputs = found.kept.repeat_interleave(width).nonzero().flatten()
    assert int((~found.kept).sum()) == count
    assert not found.W[:, ~found.kept.repeat_interleave(width)].any()
    torch.testing.assert_close(found.W, best(W, damped(H), inputs), rtol=1e-9, atol=1e-9)
    total = loss(W - found.W, damped(H))
    assert abs(found.cost - total) < 1e-10 * max(1, total)


@pytest.mark.parametrize("width", [1, 3])
def test_one_at_a_time_it_is_the_greedy_search_by_brute_force(width):
    W, H = problem(seed=3)
    left = list(range(12 // width))
    for _ in range(3):

        def without(u: int, left: list[int] = left) -> float:
            inputs = [u2 * width + i for u2 in left if u2 != u for i in range(width)]
            return loss(W - best(W, damped(H), torch.tensor(inputs)), damped(H))

        left.remove(min(left, key=without))
    found = obs.remove(W, H, width, 3, 0.01)
    assert found.kept.nonzero().flatten().tolist() == left


def test_greedy_is_close_to_the_best_of_all_subsets():
    W, H = problem(K=8, seed=1)
    H = damped(H)
    losses = [loss(W - best(W, H, torch.tensor(left)), H) for left in combinations(range(8), 5)]
    greedy = obs.remove(W, H, 1, 3, 1e-12).cost
    assert min(losses) * (1 - 1e-6) < greedy < 1.5 * min(losses)
    assert greedy < sorted(losses)[len(losses) // 10]


def test_inputs_that_repeat_others_go_first_and_cost_nothing():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=g, dtype=torch.float64)
    x = torch.cat([x, x[:, :2]], 1)
    W = torch.randn(4, 8, generator=g, dtype=torch.float64)
    found = obs.remove(W, x.t() @ x / 100, 1, 2, 1e-9)
    gone = set((~found.kept).nonzero().flatten().tolist())
    assert len(gone & {0, 6}) == len(gone & {1, 7}) == 1
    torch.testing.assert_close(x @ found.W.t(), x @ W.t(), rtol=1e-4, atol=1e-4)
    assert found.cost < 1e-6


def test_more_damping_where_the_hessian_is_not_positive():
    W, H = problem()
    H = H - 0.5 * torch.linalg.eigvalsh(H)[-1] * torch.eye(12, dtype=H.dtype) / 12
    found = obs.remove(W, H, 1, 2, 1e-6)
    assert found.notes[0].startswith("damping raised to ")
    assert found.W.isfinite().all()


def test_inputs_that_do_not_vary_are_told_apart_by_the_weights():
    W = torch.diag(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    found = obs.remove(W, torch.zeros(4, 4), 1, 2, 0.01)
    assert found.kept.tolist() == [True, False, False, True]
    assert found.notes == ("chosen by size: its inputs do not vary",)
    assert torch.equal(found.W, W.double() * found.kept)


def test_the_arguments_are_left_alone():
    W, H = problem()
    before = W.clone(), H.clone()
    obs.remove(W, H, 3, 2, 0.01)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
