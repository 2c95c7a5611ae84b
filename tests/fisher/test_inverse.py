"""oBERT's and M-FAC's inverse Fishers against dense ones, in float64."""

from __future__ import annotations

import pytest
import torch

from compress.fisher import greedy, mfac, obert, units
from compress.solvers import masks, obs
from compress.spec import Sparsity

CPU = torch.device("cpu")
DAMPING = 1e-3


def gradients(m: int = 7, d: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1.5, 0.5, d, dtype=torch.float64)
    mix = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(m, d, generator=g, dtype=torch.float64) @ mix * scales, torch.randn(d, generator=g, dtype=torch.float64)


def fisher(G: torch.Tensor, block: int | None = None) -> torch.Tensor:
    """The dense F, zero between blocks."""
    F = G.t() @ G / len(G)
    if block is not None:
        number = torch.arange(len(F)) // block
        F = F * (number[:, None] == number)
    return F + DAMPING * torch.eye(len(F), dtype=torch.float64)


def sherman_morrison(G: torch.Tensor) -> torch.Tensor:
    """The recursion of the papers."""
    inverse = torch.eye(G.shape[1], dtype=torch.float64) / DAMPING
    for g in G:
        u = inverse @ g
        u = u / (len(G) + g @ u).sqrt()
        inverse = inverse - u[:, None] * u
    return inverse


def diagonal_blocks(matrix: torch.Tensor, unit: int) -> torch.Tensor:
    return torch.stack([matrix[i : i + unit, i : i + unit] for i in range(0, len(matrix), unit)])


@pytest.mark.parametrize("method", [obert, mfac])
@pytest.mark.parametrize(("d", "block", "unit"), [(24, 8, 1), (24, 8, 4), (24, 24, 2), (20, 8, 4), (13, 4, 1), (24, 12, 3)])
def test_blocks_of_the_inverse_equal_those_of_the_dense_one(method, d, block, unit, monkeypatch):
    monkeypatch.setattr(method, "PANEL_BYTES", 1000)  # several panels
    G, _ = gradients(d=d)
    found = method.inverse_blocks(G, DAMPING, block, unit, CPU)
    torch.testing.assert_close(found, diagonal_blocks(fisher(G, block).inverse(), unit), rtol=1e-9, atol=0)


def test_the_inverse_equals_the_recursion_of_the_papers():
    G, _ = gradients(m=40)
    found = obert.inverse_blocks(G, DAMPING, 24, 24, CPU)[0]
    torch.testing.assert_close(found, sherman_morrison(G), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("m", [1, 7, 40])
def test_products_equal_the_dense_ones(m, monkeypatch):
    monkeypatch.setattr(mfac, "PANEL_BYTES", 1000)
    G, x = gradients(m=m)
    found = mfac.InverseFisher.of(G, DAMPING, CPU).product(x)
    torch.testing.assert_close(found, fisher(G).inverse() @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [obert, mfac])
@pytest.mark.parametrize(("d", "block"), [(24, 8), (24, 24), (20, 8)])
def test_an_update_is_the_minimum_for_its_zeros(method, d, block, monkeypatch):
    monkeypatch.setattr(method, "PANEL_BYTES", 1000)
    G, w = gradients(d=d)
    pruned = torch.rand(d, generator=torch.Generator().manual_seed(1)) < 0.6
    F, keep = fisher(G, block), ~pruned
    expected = torch.zeros_like(w)
    expected[keep] = w[keep] + torch.linalg.solve(F[keep][:, keep], F[keep][:, pruned] @ w[pruned])
    found = method.update(w, G, pruned, DAMPING, block)
    assert bool((found[pruned] == 0).all())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", [obert, mfac])
@pytest.mark.parametrize("pattern", ["unstructured", "block:1x4", "2:4", "1:4", "7:14"])
def test_the_loss_rises_by_what_a_unit_costs(method, pattern):
    sparsity = Sparsity.of(pattern, None)
    C = units.width(sparsity)
    d = 28 if C == 14 else 24
    G, w = gradients(d=d)
    F = fisher(G)
    costs, zeros = units.costs(w.view(-1, C), method.inverse_blocks(G, DAMPING, d, C, CPU), sparsity)
    for unit in range(len(costs)):
        pruned = torch.zeros(d // C, C, dtype=torch.bool)
        pruned[unit] = zeros[unit]
        moved = method.update(w, G, pruned.flatten(), DAMPING, d)
        delta = moved - w
        assert moved[pruned.flatten()].count_nonzero() == 0
        assert float(0.5 * delta @ F @ delta) == pytest.approx(float(costs[unit]), rel=1e-10, abs=1e-10)


def test_an_nm_group_gives_up_its_cheapest_subset():
    G, w = gradients()
    _, zeros = units.costs(w.view(-1, 4), obert.inverse_blocks(G, DAMPING, 24, 4, CPU), Sparsity(0.5, "2:4"))
    inverse = diagonal_blocks(fisher(G).inverse(), 4)
    for group, S, chosen in zip(w.view(-1, 4), inverse, zeros, strict=True):
        pairs = [(i, j) for i in range(4) for j in range(i)]
        costs = {pair: float(group[list(pair)] @ S[list(pair)][:, list(pair)].inverse() @ group[list(pair)]) for pair in pairs}
        assert tuple(chosen.nonzero().flatten().flip(0).tolist()) == min(costs, key=costs.get)


def test_all_zeros_of_a_block_together_cost_what_the_update_says():
    """The papers' sum of single updates is not optimal for several zeros of one block."""
    G, w = gradients(d=8)
    F, pruned = fisher(G), torch.arange(8) < 5
    inverse = F.inverse()
    delta = obert.update(w, G, pruned, DAMPING, 8) - w
    group = 0.5 * w[pruned] @ inverse[pruned][:, pruned].inverse() @ w[pruned]
    assert float(0.5 * delta @ F @ delta) == pytest.approx(float(group), rel=1e-10)
    summed = -(inverse[:, pruned] * (w[pruned] / inverse.diagonal()[pruned])).sum(1)
    summed[pruned] = -w[pruned]
    assert float(0.5 * summed @ F @ summed) > 1.01 * float(group)


def test_pruned_weights_decouple():
    """Gradients that are masked to zero make the other weights' Fisher that of a model without the pruned ones."""
    G, w = gradients(d=8)
    gone = torch.arange(8) < 3
    masked, w = G * ~gone, w * ~gone
    pruned = gone | (torch.arange(8) == 5)
    for method in (obert, mfac):
        found = method.update(w, masked, pruned, DAMPING, 8)
        alone = method.update(w[~gone], G[:, ~gone].contiguous(), pruned[~gone], DAMPING, 5)
        torch.testing.assert_close(found[~gone], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_gradients_of_fewer_bits_give_nearly_the_same(dtype):
    G, _ = gradients(m=40)
    for method in (obert, mfac):
        found = method.inverse_blocks(G.to(dtype), DAMPING, 8, 1, CPU).double()
        expected = method.inverse_blocks(G.to(dtype).double(), DAMPING, 8, 1, CPU)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("pattern", ["unstructured", "block:1x2", "block:1x4", "1:4"])
def test_greedy_costs_are_those_of_removing_unit_by_unit(pattern, monkeypatch):
    """Against inverting what is left again after every removal."""
    monkeypatch.setattr(obert, "PANEL_BYTES", 1000)
    sparsity, (G, w) = Sparsity.of(pattern, None), gradients(d=20)
    C, block = units.width(sparsity), 8
    done = torch.zeros(20 // C, dtype=torch.bool)
    done[1] = True
    gone = done.repeat_interleave(C)
    G, w = G * ~gone, w * ~gone
    found, zeros = greedy.costs(w, G, done, DAMPING, block, sparsity)
    for start in range(0, 20, block):
        stop = min(start + block, 20)
        own, F, v = range(start // C, stop // C), fisher(G[:, start:stop]), w[start:stop].clone()
        pruned, left, highest = gone[start:stop].clone(), [u for u in own if not done[u]], -torch.inf
        while left:
            inverse, kept = torch.eye(len(F), dtype=torch.float64), ~pruned
            inverse[kept.nonzero(), kept.nonzero().T] = F[kept][:, kept].inverse()
            costs, subsets = units.costs(v.view(-1, C), diagonal_blocks(inverse, C), sparsity)
            unit = min(left, key=lambda u: float(costs[u - own[0]]))
            highest = max(highest, float(costs[unit - own[0]]))
            assert float(found[unit]) == pytest.approx(highest, rel=1e-8)
            assert torch.equal(zeros[unit], subsets[unit - own[0]])
            pruned.view(-1, C)[unit - own[0]] |= subsets[unit - own[0]]
            v = obert.update(v, G[:, start:stop], pruned, DAMPING, block)
            left.remove(unit)
    assert found[1] == -torch.inf


def test_greedy_zeros_are_those_of_exact_obs():
    G, w = gradients(d=12)
    costs, _ = greedy.costs(w, G, torch.zeros(12, dtype=torch.bool), DAMPING, 12, Sparsity(0.5))
    for count in range(12):
        expected = obs.mask(w[None], fisher(G), Sparsity(count / 12))[0]
        assert torch.equal(masks.smallest(costs, count), expected)
