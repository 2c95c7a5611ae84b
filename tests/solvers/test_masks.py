from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compress.linalg import ldl_
from compress.solvers import masks
from compress.spec import Sparsity
from tests.solvers.problem import layer


def test_smallest_takes_exactly_as_many_as_asked_even_among_equals():
    costs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
    for count in range(7):
        assert int(masks.smallest(costs, count).sum()) == count
    assert masks.smallest(costs, 2).tolist() == [[True, False, True], [False, False, False]]  # among equals the first


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("per_row", [True, False])
def test_unstructured_counts_are_exact(fraction, per_row):
    sparsity = Sparsity(fraction)
    pruned = masks.by_cost(torch.rand(7, 13), sparsity, per_row=per_row)
    assert int(pruned.sum()) == round(fraction * 91)
    if per_row:
        assert int(pruned.sum(1).max() - pruned.sum(1).min()) <= 1


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_every_group_of_an_nm_pattern_keeps_its_best(kept, of):
    costs = torch.rand(6, 8 * of)
    pruned = masks.by_cost(costs, Sparsity.of(f"{kept}:{of}", None)).view(6, 8, of)
    assert (pruned.sum(-1) == of - kept).all()
    grouped = costs.view(6, 8, of)
    assert (grouped.masked_fill(pruned, torch.inf).amin(-1) >= grouped.masked_fill(~pruned, -torch.inf).amax(-1)).all()


def test_blocks_go_whole_by_the_sum_of_their_costs():
    costs = torch.rand(6, 12)
    pruned = masks.by_cost(costs, Sparsity(0.25, "block:2x3"))
    blocks = pruned.view(3, 2, 4, 3).transpose(1, 2).flatten(2)
    assert (blocks.all(-1) == blocks.any(-1)).all()
    sums = costs.view(3, 2, 4, 3).sum((1, 3))
    assert set(sums[blocks.all(-1)].tolist()) == set(sums.flatten().sort().values[:3].tolist())


@pytest.mark.parametrize(
    ("sparsity", "K", "group", "expected"),
    [
        (Sparsity(0.5), 512, 1, 128),
        (Sparsity(0.5), 96, 1, 96),
        (Sparsity(0.5), 480, 48, 96),
        (Sparsity(0.5), 1024, 256, 128),
        (Sparsity(0.5), 600, 200, 100),
        (Sparsity(0.5, "block:1x6"), 600, 1, 126),
        (Sparsity(0.5, "2:4"), 600, 1, 4),
    ],
)
def test_windows_are_in_step_with_groups_and_blocks(sparsity, K, group, expected):
    assert masks.window(sparsity, K, group) == expected


def schur(K: int, C: int) -> tuple[torch.Tensor, ...]:
    """Targets, the first C columns of a factorised Hessian, and that Hessian."""
    W, stats = layer(5, K)
    H = stats.H.double() + 0.1 * torch.eye(K)
    Ut, D = ldl_(H.clone())
    return W.double(), Ut[:C, :C], D[:C], H


def rise(w: torch.Tensor, H: torch.Tensor, zeros: list[int]) -> float:
    """The least error of one row with some weights at zero and all others free, by the normal equations."""
    keep = [k for k in range(len(w)) if k not in zeros]
    v = torch.zeros_like(w)
    v[keep] = torch.linalg.solve(H[keep][:, keep], (H @ w)[keep])
    return float((v - w) @ H @ (v - w))


def test_nm_subsets_are_the_best_of_all():
    W, Ut, D, H = schur(12, 4)
    keep = masks.cheapest(W[:, :4].t(), Ut, D, Sparsity(0.5, "2:4"), 0, 12)
    for n, w in enumerate(W):
        best = min(combinations(range(4), 2), key=lambda zeros, w=w: rise(w, H, list(zeros)))
        assert set((~keep[:, n]).nonzero().flatten().tolist()) == set(best)


def test_large_nm_groups_compare_single_weights():
    W, Ut, D, _ = schur(32, 16)
    keep = masks.cheapest(W[:, :16].t(), Ut, D, Sparsity(0.5, "8:16"), 0, 32)
    assert (keep.sum(0) == 8).all()


def test_blocks_cost_what_they_raise_the_error_by():
    W, Ut, D, H = schur(12, 3)
    keep = masks.cheapest(W[:, :3].t(), Ut, D, Sparsity(0.5, "block:1x3"), 0, 12)  # half of 4 blocks a row, over 5 rows
    costs = [rise(w, H, [0, 1, 2]) for w in W]
    chosen = {n for n in range(5) if not keep[:, n].any()}
    assert len(chosen) == round(10 * 3 / 12)
    assert chosen == set(sorted(range(5), key=costs.__getitem__)[: len(chosen)])


def test_windows_add_up_to_the_whole_count():
    W, stats = layer(7, 50)
    Ut, D = ldl_(stats.H + torch.eye(50))
    total = 0
    for start in range(0, 50, 16):
        stop = min(start + 16, 50)
        window = masks.cheapest(W[:, start:stop].t(), Ut[start:stop, start:stop], D[start:stop], Sparsity(0.37), start, 50)
        total += int((~window).sum())
    assert total == round(0.37 * 350)
