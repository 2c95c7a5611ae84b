"""What every pruner promises, whatever the pattern, with and without a grid."""

from __future__ import annotations

import pytest
import torch

from compress.calib.stats import LayerStats
from compress.errors import CompressError
from compress.qtensor import Pruned, QTensor, dense, zeros
from compress.solvers import PRUNERS, alps, columns, gptq, masks, obs, solve
from compress.solvers.grid import Storage
from compress.solvers.options import Options
from compress.solvers.refit import refit
from compress.spec import LayerSpec, Scheme, Sparsity
from tests.solvers.problem import layer, loss

PATTERNS = [Sparsity(0.6), Sparsity(0.5, "2:4"), Sparsity(0.5, "4:8"), Sparsity(0.4, "block:1x4"), Sparsity(0.5, "block:2x8")]
GRIDS = [None, Scheme(4, 32), Scheme(3, -1, False)]
NK = (12, 96)


@pytest.fixture(params=sorted(PRUNERS))
def method(request):
    return request.param


def prunable(method, sparsity):
    if method == "obs" and sparsity.block != (1, 1):
        pytest.skip("exact OBS prunes single weights")


def pruned(method, sparsity, scheme=None, refitted=True, stored=torch.float16, W=None, stats=None):
    if W is None:
        W, stats = layer(*NK)
    return solve(W, stats, LayerSpec(scheme, sparsity), stored, Options(refit=refitted), pruner=method)


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_the_zeros_are_as_many_as_asked_and_in_the_pattern(method, sparsity, scheme):
    prunable(method, sparsity)
    solved = pruned(method, sparsity, scheme)
    zero = dense(solved) == 0
    if scheme is None:
        assert isinstance(solved, Pruned)
        assert solved.weight.dtype == torch.float16
        assert zeros(solved) == sparsity.pruned(*NK) * sparsity.block[0] * sparsity.block[1] or sparsity.nm
    else:  # rounding may add zeros
        assert isinstance(solved, QTensor)
        assert zeros(solved) >= sparsity.pruned(*NK)
    if sparsity.nm:
        assert (zero.view(NK[0], -1, sparsity.nm[1]).sum(-1) >= sparsity.nm[1] - sparsity.nm[0]).all()
    rows, cols = sparsity.block
    whole = zero.view(NK[0] // rows, rows, NK[1] // cols, cols).all(3).all(1)
    assert int(whole.sum()) >= sparsity.pruned(*NK) or sparsity.nm


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
@pytest.mark.parametrize("refitted", [True, False])
def test_the_reported_error_is_that_of_the_weights(method, scheme, refitted):
    W, stats = layer(*NK)
    solved = pruned(method, PATTERNS[0], scheme, refitted)
    E = (W - dense(solved)).double()
    torch.testing.assert_close(solved.error.double(), ((E @ stats.H.double()) * E).sum(1), rtol=2e-3, atol=1e-5)


def test_inputs_are_not_changed_and_the_result_is_repeatable(method):
    W, stats = layer(*NK)
    before = W.clone(), stats.H.clone()
    first, second = (dense(pruned(method, PATTERNS[0], W=W, stats=stats)) for _ in range(2))
    assert torch.equal(W, before[0])
    assert torch.equal(stats.H, before[1])
    assert torch.equal(first, second)


@pytest.mark.parametrize("sparsity", PATTERNS[:2], ids=str)
def test_refitting_lowers_the_error(method, sparsity):
    W, stats = layer(*NK)
    with_, without = (loss(W - dense(pruned(method, sparsity, None, refitted)), stats.H) for refitted in (True, False))
    assert with_ < without


@pytest.mark.parametrize("K", [1, 5, 37, 130])
def test_odd_sizes(method, K):
    W, stats = layer(3, K)
    solved = pruned(method, Sparsity(0.5), Scheme(4, -1), W=W, stats=stats)
    assert zeros(solved) >= round(1.5 * K)


def test_an_input_that_was_never_active_is_pruned_first(method):
    if method == "magnitude":
        pytest.skip("looks at no inputs")
    W, stats = layer(8, 40, dead=7)
    assert (dense(pruned(method, Sparsity(0.5), W=W, stats=stats))[:, 7] == 0).sum() >= 4


def test_refit_solves_the_normal_equations_of_every_row():
    W, stats = layer(6, 40)
    H = stats.H + 0.05 * stats.H.diagonal().mean() * torch.eye(40)
    keep = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) > 0.6
    keep[0] = False
    found = refit(W, H, keep)
    for w, v, support in zip(W.double(), found.double(), keep, strict=True):
        assert (v[~support] == 0).all()
        S = support.nonzero().flatten()
        exact = torch.zeros(40, dtype=torch.float64)
        exact[S] = torch.linalg.solve(H.double()[S][:, S], (H.double() @ w)[S])
        assert loss((v - w)[None], H) <= loss((exact - w)[None], H) * (1 + 1e-4)


def test_rounding_a_refit_is_rounding_the_original():
    """tr((W-Q) H (W-Q)^T) splits into refit and rounding errors for every Q with the same zeros."""
    W, stats = layer(6, 32)
    W, H = W.double(), stats.H.double()
    keep = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    V = torch.zeros_like(W)
    for n, S in enumerate(k.nonzero().flatten() for k in keep):
        V[n, S] = torch.linalg.solve(H[S][:, S], (H @ W[n])[S])
    Q = (V * 4).round() / 4 * keep
    assert loss(W - Q, H) == pytest.approx(loss(W - V, H) + loss(V - Q, H), rel=1e-10)


def textbook_sparsegpt(W, H, sparsity, block):
    """Algorithm 1 of arXiv 2301.00774 in float64, without lazy updates."""
    K = len(H)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W, mask = W.clone(), torch.zeros_like(W, dtype=torch.bool)
    for j in range(K):
        if j % block == 0:
            scores = (W[:, j : j + block] / U.diagonal()[j : j + block]).square()
            count = round(sparsity.fraction * W.numel() * min(j + block, K) / K) - int(mask.sum())
            mask[:, j : j + block] = masks.smallest(scores, count)
        q = torch.where(mask[:, j], 0, W[:, j])
        e = (W[:, j] - q) / U[j, j]
        W[:, j:] -= e[:, None] * U[j, j:]
        W[:, j] = q
    return W


@pytest.mark.parametrize("block", [16, 24, 128])
def test_sparsegpt_equals_the_textbook_algorithm(block, monkeypatch):
    monkeypatch.setattr(masks, "WINDOW", block)
    W, stats = layer(10, 120)
    H = stats.H.double() + 0.01 * stats.H.diagonal().mean() * torch.eye(120)
    expected = textbook_sparsegpt(W.double(), H, Sparsity(0.6), block)
    found = dense(pruned("sparsegpt", Sparsity(0.6), None, False, torch.float32, W, stats))
    assert ((found == 0) == (expected == 0)).float().mean() > 0.995  # near-ties may fall otherwise in float32
    assert loss(W - found, stats.H) == pytest.approx(loss(W.double() - expected, stats.H), rel=1e-2)


def test_the_joint_pass_makes_up_for_zeros_and_rounding_together():
    """Pruning and then rounding each weight to nearest is far worse than one pass."""
    W, stats = layer(32, 128)
    sparsity, scheme = Sparsity(0.5), Scheme(3, 32)
    joint = dense(pruned("sparsegpt", sparsity, scheme, W=W, stats=stats))
    apart = pruned("sparsegpt", sparsity, None, W=W, stats=stats)
    rounded = dense(solve(dense(apart), None, LayerSpec(scheme), torch.float16, Options(), quantizer="rtn"))
    assert loss(W - joint, stats.H) < 0.95 * loss(W - rounded, stats.H)


def test_a_given_mask_in_the_column_loop_holds_in_every_order():
    W, stats = layer(8, 96)
    keep = torch.rand(8, 96) > 0.5
    for order in ("act", "group", "natural"):
        scheme, options = Scheme(4, 32), Options(order=order)
        factor = gptq.factorise(stats.H, gptq.visiting_order(stats.H.diagonal(), 32, order), 0.01)
        loop = columns.Columns(W * keep, factor, LayerSpec(scheme, Sparsity(0.5)), Storage(torch.float16), options, keep)
        assert (dense(columns.run([loop])[0])[~keep] == 0).all()


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, "2:4")], ids=str)
def test_exact_obs_removes_what_brute_force_would(sparsity):
    """Every removal is the cheapest of all with the others at their least-squares optimum."""
    W, stats = layer(1, 8)
    H = stats.H.double() + 0.05 * torch.eye(8)
    w, gone = W[0].double(), set()
    for _ in range(4):

        def error(p, gone=gone):
            keep = [k for k in range(8) if k not in gone | {p}]
            v = torch.zeros_like(w)
            v[keep] = torch.linalg.solve(H[keep][:, keep], (H @ w)[keep])
            return float((v - w) @ H @ (v - w))

        full = {g for g in range(2) if sparsity.nm and len([p for p in gone if p // 4 == g]) == 2}
        gone = gone | {min((p for p in range(8) if p not in gone and p // 4 not in full), key=error)}
    assert set(obs.mask(W, H.float(), sparsity)[0].nonzero().flatten().tolist()) == gone


def test_exact_obs_spreads_zeros_over_rows_by_cost():
    W, stats = layer(4, 24)
    W = W * torch.tensor([1e-4, 1, 1, 1])[:, None]
    pruned = obs.mask(W, stats.H + 0.05 * torch.eye(24), Sparsity(0.25))
    assert pruned.sum(1).tolist() == [24, 0, 0, 0]


def test_exact_obs_in_parts_of_rows_is_the_same(monkeypatch):
    W, stats = layer(9, 24)
    H = stats.H + 0.05 * torch.eye(24)
    whole = obs.mask(W, H, Sparsity(0.5))
    monkeypatch.setattr(obs, "BYTES_AT_A_TIME", 2 * 8 * 24 * 24)
    assert torch.equal(whole, obs.mask(W, H, Sparsity(0.5)))


def test_exact_obs_refuses_blocks():
    with pytest.raises(CompressError, match="prunes single weights, not block:1x4"):
        pruned("obs", Sparsity(0.5, "block:1x4"))


@pytest.mark.parametrize("sparsity", [Sparsity(0.7), Sparsity(0.5, "2:4")], ids=str)
def test_better_methods_find_better_zeros(sparsity):
    W, stats = layer(48, 128)
    errors = {name: loss(W - dense(pruned(name, sparsity, None, W=W, stats=stats)), stats.H) for name in PRUNERS}
    assert errors["alps"] < errors["sparsegpt"] < errors["magnitude"]
    assert errors["alps"] < errors["wanda"] < errors["magnitude"] * 1.001
    assert errors["alps"] < 1.1 * errors["obs"]


def test_alps_converges_to_a_support():
    W, stats = layer(16, 64)
    H = stats.H + 0.01 * stats.H.diagonal().mean() * torch.eye(64)
    assert int(alps.mask(W, H, Sparsity(0.7)).sum()) == round(0.7 * 1024)


def test_a_hessian_of_zeros_falls_back_to_magnitude_and_says_so():
    W, _ = layer(4, 16)
    solved = pruned("sparsegpt", Sparsity(0.5), W=W, stats=LayerStats(torch.zeros(16, 16), 4))
    assert solved.notes == ("pruned by magnitude: its inputs are all zero on the calibration data",)
