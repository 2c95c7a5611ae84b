from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from compress.qtensor import dequantize
from compress.solvers import PRUNERS, descent, gptq
from compress.solvers.descent import Start, descend
from compress.solvers.options import Options
from compress.spec import FIXED, LayerSpec, Scheme, Sparsity
from tests.solvers.problem import layer, loss

FLOATS = [Scheme.of(grid) for grid, fixed in FIXED.items() if fixed.form != "int"]
SCHEMES = [*FLOATS, Scheme(2, 32), Scheme(3, 48, False), Scheme(4, -1), Scheme(8, 16), Scheme(2, 96, False)]
ADDED = 0.02


def descended(W, stats, scheme, sweeps, dtype=torch.float16, keep=None, order="group"):
    """GPTQ's layer, and the same after `sweeps` sweeps."""
    q = gptq.solve(W, stats, scheme, dtype, Options(order=order))
    perm = gptq.visiting_order(stats.H.diagonal(), scheme.group(len(stats.H)), "group")
    return q, descend([Start(q, W, stats.H, ADDED, perm, keep)], sweeps)[0]


def objective(W, q, H):
    return loss(W - dequantize(q), H + ADDED * torch.eye(len(H)))


@pytest.fixture
def to_the_end(monkeypatch):
    monkeypatch.setattr(descent, "ENOUGH", -1.0)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("order", ["act", "group", "natural"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_sweep_lowers_the_error(scheme, order):
    W, stats = layer(24, 96)
    found = [objective(W, descended(W, stats, scheme, sweeps, order=order)[1], stats.H) for sweeps in range(5)]
    assert found[0] == objective(W, gptq.solve(W, stats, scheme, torch.float16, Options(order=order)), stats.H)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(found))
    assert found[4] < 0.98 * found[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_on_the_grid_and_its_error_is_that_of_its_weights(scheme, dtype):
    W, stats = layer(24, 96)
    start, q = descended(W, stats, scheme, 3, dtype)
    assert q.scales.dtype == start.scales.dtype
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < scheme.levels
    assert torch.equal(q.zeros, start.zeros)
    E = (W - dequantize(q)).double()
    torch.testing.assert_close(q.error.double(), ((E @ stats.H.double()) * E).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("scheme", [Scheme(2, 4), Scheme(3, -1, False)], ids=str)
def test_where_it_ends_no_single_code_or_scale_can_be_improved(scheme):
    W, stats = layer(6, 8, seed=3)
    _, q = descended(W, stats, scheme, 60)
    H = stats.H.double() + ADDED * torch.eye(8)

    def errors(codes, scales):
        grouped = codes.view(6, scheme.groups(8), -1).double() - q.zeros[..., None]
        E = W.double() - (grouped * scales[..., None].double()).view(6, 8)
        return ((E @ H) * E).sum(1)

    best = errors(q.codes, q.scales)
    for column, level in product(range(8), range(scheme.levels)):
        other = q.codes.clone()
        other[:, column] = level
        assert (errors(other, q.scales) >= best * (1 - 1e-5)).all()
    for group, way in product(range(scheme.groups(8)), (-torch.inf, torch.inf)):
        other = q.scales.clone()
        other[:, group] = torch.nextafter(other[:, group], torch.tensor(way, dtype=torch.float16))
        assert (errors(q.codes, other) >= best * (1 - 1e-5)).all()


@pytest.mark.usefixtures("to_the_end")
def test_it_finds_most_of_the_best_codes_there_are():
    W, stats = layer(200, 5, seed=1)
    scheme = Scheme(2, -1)
    start, q = descended(W, stats, scheme, 40, torch.float32)
    H = stats.H.double() + ADDED * torch.eye(5)
    levels = torch.tensor(list(product(range(-2, 2), repeat=5)), dtype=torch.float64)
    curvature = ((levels @ H) * levels).sum(1)
    gain = (W.double() @ H @ levels.t()).square() / curvature.clamp(min=1e-9)  # of a pattern of codes with its best scale
    best = ((W.double() @ H) * W.double()).sum(1) - gain.amax(1)

    def reached(one):
        E = W.double() - dequantize(one).double()
        errors = ((E @ H) * E).sum(1)
        assert (errors >= best - 1e-5).all()
        return int((errors <= best * 1.001 + 1e-5).sum())

    assert reached(q) > 2 * reached(start)


def test_zeros_stay_where_the_mask_has_them():
    W, stats = layer(24, 96)
    keep = torch.rand(24, 96, generator=torch.Generator().manual_seed(0)) > 0.5
    perm = gptq.visiting_order(stats.H.diagonal(), 32, "group")
    for scheme in (Scheme(4, 32), Scheme(3, 32, False)):
        solved = gptq.solve(W * keep, stats, scheme, torch.float16, Options())
        codes = torch.where(keep, solved.codes, solved.zeros.repeat_interleave(32, 1))
        masked = type(solved)(codes, solved.scales, solved.zeros, scheme)
        q = descend([Start(masked, W * keep, stats.H, ADDED, perm, keep)], 3)[0]
        assert not dequantize(q)[~keep].any()
        assert objective(W * keep, q, stats.H) < 0.9 * objective(W * keep, masked, stats.H)


@pytest.mark.parametrize("setting", [("LEAF", 1), ("LEAF", 64), ("ROWS", 7)])
@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(2, -1)], ids=str)
def test_blocking_does_not_change_the_result(scheme, setting, monkeypatch):
    W, stats = layer(20, 160)
    expected = descended(W, stats, scheme, 2)[1]
    monkeypatch.setattr(descent, *setting)
    found = descended(W, stats, scheme, 2)[1]
    assert float(found.error.sum()) == pytest.approx(float(expected.error.sum()), rel=2e-3)
    assert (found.codes == expected.codes).float().mean() > 0.99


def test_groups_of_zeros_and_dead_inputs_stay_finite():
    W, stats = layer(6, 64, dead=40)
    W[:, :32] = 0
    W[0] = 0
    _, q = descended(W, stats, Scheme(4, 32), 3)
    assert torch.isfinite(dequantize(q)).all()
    assert not dequantize(q)[0].any()


@pytest.mark.parametrize("order", ["act", "group", "natural"])
def test_gptq_descends_if_asked(order):
    W, stats = layer(64, 128)
    before = W.clone(), stats.H.clone()
    plain, q = (gptq.solve(W, stats, Scheme(3, 32), torch.float16, Options(order=order, sweeps=n)) for n in (0, 3))
    assert float(q.error.sum()) < 0.97 * float(plain.error.sum())
    assert torch.equal(W, before[0])
    assert torch.equal(stats.H, before[1])


@pytest.mark.parametrize("pruner", ["alps", "sparsegpt", "wanda"])
def test_pruned_layers_on_a_grid_descend_with_their_zeros(pruner):
    W, stats = layer(32, 64)
    spec = LayerSpec(Scheme(3, 32), Sparsity.of("2:4", None))
    plain, q = (PRUNERS[pruner](W, stats, spec, torch.float16, Options(sweeps=n)) for n in (0, 3))
    assert not dequantize(q)[dequantize(plain) == 0].any() or pruner != "sparsegpt"
    assert (dequantize(q).view(-1, 4) != 0).sum(1).max() <= 2
    assert float(q.error.sum()) < float(plain.error.sum())
