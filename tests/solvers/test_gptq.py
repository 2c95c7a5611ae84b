from __future__ import annotations

import pytest
import torch

from compress.calib.stats import LayerStats
from compress.errors import CompressError
from compress.qtensor import dequantize, round_to_grid
from compress.solvers import columns, gptq, rtn
from compress.solvers.options import Options
from compress.spec import Scheme
from tests.solvers.problem import layer, loss

ORDERS = ["act", "group", "natural"]


def textbook(W, H, q, scheme, order, damping):
    """GPTQ's Algorithm 1 in float64, unblocked, with an inverse Cholesky factor and given scales."""
    perm = gptq.visiting_order(H.diagonal(), scheme.group(len(H)), order)
    H = H.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H[perm][:, perm]), upper=True)
    W = W.double()[:, perm].clone()
    Q, total = torch.zeros_like(W), torch.zeros(len(W), dtype=torch.float64)
    for j, column in enumerate(perm.tolist()):
        g = column // scheme.group(len(H))
        scale, zero = q.scales[:, g].double(), q.zeros[:, g].double()
        Q[:, j] = round_to_grid(W[:, j], scale, zero, scheme) * scale
        e = (W[:, j] - Q[:, j]) / U[j, j]
        total += e.square()
        W[:, j:] -= e[:, None] * U[j, j:]
    out = torch.empty_like(Q)
    out[:, perm] = Q
    return out, total


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", [Scheme(2, -1), Scheme(3, 36, False), Scheme(4, 48)], ids=str)
def test_equals_the_textbook_algorithm(scheme, order):
    W, stats = layer(20, 144)
    options = Options(order=order)
    q = gptq.solve(W, stats, scheme, torch.float32, options)
    Q, total = textbook(W, stats.H, q, scheme, order, options.damping)
    assert torch.equal(dequantize(q), Q.float()) or loss(W - dequantize(q), stats.H) == pytest.approx(
        loss(W.double() - Q, stats.H), rel=1e-4
    )
    damped = q.error + options.damping * stats.H.diagonal().mean() * (W - dequantize(q)).square().sum(1)
    torch.testing.assert_close(damped.double(), total, rtol=1e-3, atol=1e-6)  # the loss identity


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("leaf", [1, 5, 1000])
def test_blocking_does_not_change_the_result(order, leaf, monkeypatch):
    W, stats = layer(12, 160)
    W, stats = W.double(), LayerStats(stats.H.double(), stats.tokens)
    expected = gptq.solve(W.float(), LayerStats(stats.H.float(), 1), Scheme(4, 32), torch.float32, Options(order=order))
    monkeypatch.setattr(columns, "LEAF", leaf)
    found = gptq.solve(W.float(), LayerStats(stats.H.float(), 1), Scheme(4, 32), torch.float32, Options(order=order))
    assert float(found.error.sum()) == pytest.approx(float(expected.error.sum()), rel=2e-3)
    assert (found.codes == expected.codes).float().mean() > 0.98


def test_no_coupling_means_rounding_to_nearest():
    W, _ = layer(10, 64)
    stats = LayerStats(torch.eye(64), 64)
    q, nearest = (s(W, stats, Scheme(4, 32), torch.float16, Options()) for s in (gptq.solve, rtn.solve))
    assert torch.equal(dequantize(q), dequantize(nearest))


def test_inputs_that_were_never_active_are_rounded_to_nearest():
    W, stats = layer(10, 64, dead=5)
    q = gptq.solve(W, stats, Scheme(4, 32), torch.float32, Options())
    scale = q.scales[:, 0].float()
    nearest = round_to_grid(W[:, 5], scale, torch.tensor(8.0), Scheme()) * scale
    assert torch.equal(dequantize(q)[:, 5], nearest)
    assert q.notes == ()


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation(order):
    diagonal = torch.rand(96)
    assert sorted(gptq.visiting_order(diagonal, 32, order).tolist()) == list(range(96))


def test_activity_order_falls_and_group_order_keeps_groups_whole():
    diagonal = torch.rand(96)
    act = diagonal[gptq.visiting_order(diagonal, 32, "act")]
    assert (act.diff() <= 0).all()
    perm = gptq.visiting_order(diagonal, 32, "group").view(3, 32)
    assert all(len(set((row // 32).tolist())) == 1 for row in perm)
    assert (diagonal[perm].diff(dim=1) <= 0).all()
    assert (diagonal[perm].amax(1).diff() <= 0).all()


def test_damping_doubles_until_the_hessian_can_be_factorised():
    W, _ = layer(4, 32)
    H = torch.eye(32)
    H[0, 1] = H[1, 0] = 1.02  # indefinite by 0.02
    q = gptq.solve(W, LayerStats(H, 32), Scheme(4, 32), torch.float32, Options(damping=0.01))
    assert q.notes == ("damping raised to 0.04",)


def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so():
    W, _ = layer(4, 32)
    H = torch.eye(32)
    H[0, 1] = H[1, 0] = 5
    q = gptq.solve(W, LayerStats(H, 32), Scheme(4, 32), torch.float32, Options())
    assert q.notes == ("rounded to nearest: the Hessian cannot be factorised",)
    assert torch.equal(q.codes, rtn.solve(W, None, Scheme(4, 32), torch.float32, Options()).codes)


def test_inputs_that_are_all_zero_fall_back_and_say_so():
    W, _ = layer(4, 32)
    q = gptq.solve(W, LayerStats(torch.zeros(32, 32), 32), Scheme(4, 32), torch.float32, Options())
    assert q.notes == ("rounded to nearest: its inputs are all zero on the calibration data",)


def test_a_rank_deficient_hessian_needs_no_fallback():
    W, _ = layer(8, 64)
    x = torch.randn(9, 64)
    assert gptq.solve(W, LayerStats(x.t() @ x / 9, 9), Scheme(4, 32), torch.float32, Options()).notes == ()


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5])
def test_damping_out_of_range_is_refused(damping):
    with pytest.raises(CompressError, match="damping is"):
        Options(damping=damping)
