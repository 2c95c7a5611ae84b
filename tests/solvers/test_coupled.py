"""Rows that count together: the block form of the objective, what it gains, and that nothing changes where rows are apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.linalg import ldl_
from compress.qtensor import QTensor, dequantize
from compress.solvers import coupled, gptq, solve
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme
from tests.solvers.problem import layer

DEFAULT = Options.of("default")


def moments(N: int, seed: int = 0, rank: int = 4) -> torch.Tensor:
    """Gradients with a few common directions, and rows that weigh differently."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(N, rank, generator=g) @ torch.randn(rank, 400, generator=g)
    each = (common + 0.5 * torch.randn(N, 400, generator=g)) * torch.rand(N, 1, generator=g)
    return each @ each.t() / 400


def objective(E: torch.Tensor, H: torch.Tensor, O: torch.Tensor) -> float:  # noqa: E741
    return float(((O.double() @ E.double() @ H.double()) * E.double()).sum())


def test_the_objective_is_that_of_blocks_with_targets_of_their_own():
    _, stats = layer(22, 32)
    E, H = torch.randn(22, 32, generator=torch.Generator().manual_seed(1)).double(), stats.H.double()
    O = moments(22).double() + 0.1 * torch.eye(22)  # noqa: E741
    blocks = coupled.dealt(O.diagonal())
    rows = torch.cat(blocks)
    ordered, E = O[rows][:, rows], E[rows]
    Ut, D = ldl_(ordered.clone())
    total = 0.0
    for cut in coupled.cuts(blocks):
        T = E[cut] + coupled.fed_forward(Ut, E, cut)
        own = Ut[cut, cut] @ torch.diag(D[cut]) @ Ut[cut, cut].t()
        total += objective(T, H, own)
    assert total == pytest.approx(objective(E, H, ordered), rel=1e-10)


def test_with_all_other_rows_fixed_a_block_aims_where_the_objective_is_least():
    E = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).double()
    O, cut = moments(10).double() + 0.1 * torch.eye(10), slice(3, 6)  # noqa: E741
    E[cut] = -coupled.made_up(O, E, cut)
    assert (O @ E)[cut].abs().max() < 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_lowers_what_errors_do_to_the_loss(bits):
    W, stats = layer(64, 96)
    O, scheme = moments(64), Scheme(bits, 32)  # noqa: E741
    plain = gptq.solve(W, stats, scheme, torch.float16, DEFAULT)
    found = coupled.solve(W, replace(stats, outputs=O), scheme, torch.float16, DEFAULT)
    before, after = (objective(W - dequantize(q), stats.H, O) for q in (plain, found))
    assert after < 0.85 * before
    assert not torch.equal(plain.codes, found.codes)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_rows_that_do_not_count_together_are_solved_as_ever(sweeps):
    W, stats = layer(24, 64)
    options = replace(DEFAULT, sweeps=sweeps)
    plain = gptq.solve(W, stats, Scheme(3, 32), torch.float16, options)
    found = coupled.solve(W, replace(stats, outputs=torch.eye(24)), Scheme(3, 32), torch.float16, options)
    assert (plain.codes == found.codes).float().mean() > 0.999
    torch.testing.assert_close(found.error, plain.error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("N", [1, 2, 3, 5, 18])
@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, -1, symmetric=False)], ids=str)
def test_it_keeps_the_contract(N, scheme):
    W, stats = layer(N, 64, dead=5)
    stats = replace(stats, outputs=moments(N))
    before = W.clone(), stats.H.clone(), stats.outputs.clone()
    q = solve(W, stats, LayerSpec(scheme), torch.float16, DEFAULT)
    assert isinstance(q, QTensor)
    assert q.codes.shape == (N, 64)
    assert int(q.codes.max()) < scheme.levels
    E = (W - dequantize(q)).double()
    torch.testing.assert_close(q.error.double(), ((E @ stats.H.double()) * E).sum(1), rtol=2e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (W, stats.H, stats.outputs), strict=True))
    assert torch.equal(q.codes, solve(W, stats, LayerSpec(scheme), torch.float16, DEFAULT).codes)


def test_what_cannot_be_factorised_is_solved_apart_and_says_so():
    W, stats = layer(8, 64)
    broken = replace(stats, outputs=torch.diag(torch.tensor([1.0] * 7 + [-5.0])))
    q = coupled.solve(W, broken, Scheme(3, 32), torch.float16, DEFAULT)
    assert q.notes == (coupled.APART,)
    assert torch.equal(q.codes, gptq.solve(W, stats, Scheme(3, 32), torch.float16, DEFAULT).codes)
    silent = replace(stats, H=torch.zeros(64, 64), outputs=torch.eye(8))
    assert "nearest" in coupled.solve(W, silent, Scheme(3, 32), torch.float16, DEFAULT).notes[0]
