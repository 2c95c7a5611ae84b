"""What every quantizer promises, whatever the scheme."""

from __future__ import annotations

import pytest
import torch

from compress.qtensor import dequantize
from compress.solvers import QUANTIZERS
from compress.solvers.options import Options
from compress.spec import FIXED, Scheme
from tests.solvers.problem import layer, loss

SCHEMES = [Scheme(b, g, s) for b in (2, 3, 4, 8) for g in (32, -1) for s in (True, False)]
SCHEMES += [Scheme.of(grid, group_size=fixed.group_size or 32) for grid, fixed in FIXED.items()]
STORED = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}
ORDERS = ["act", "group", "natural"]


@pytest.fixture(params=sorted(QUANTIZERS))
def solve(request):
    return QUANTIZERS[request.param]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_scales_and_zeros_are_on_the_grid(solve, scheme):
    W, stats = layer(24, 96)
    q = solve(W, stats, scheme, torch.float16, Options())
    assert q.codes.shape == (24, 96)
    assert q.scales.shape == q.zeros.shape == (24, scheme.groups(96))
    assert scheme.lowest <= int(q.codes.min())
    assert int(q.codes.max()) < scheme.levels
    assert q.scales.dtype == STORED.get(scheme.grid, torch.float16)
    if scheme.symmetric:
        assert (q.zeros == scheme.zero).all()
    assert dequantize(q).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_reported_error_is_the_error_of_the_dequantized_weights(solve, scheme):
    W, stats = layer(24, 96)
    q = solve(W, stats, scheme, torch.float16, Options())
    E = (W - dequantize(q)).double()
    torch.testing.assert_close(q.error.double(), ((E @ stats.H.double()) * E).sum(1), rtol=2e-3, atol=1e-6)


def test_inputs_are_not_changed_and_the_result_is_repeatable(solve):
    W, stats = layer(16, 64)
    before = W.clone(), stats.H.clone()
    first, second = (solve(W, stats, Scheme(3, 32), torch.bfloat16, Options()) for _ in range(2))
    assert torch.equal(W, before[0])
    assert torch.equal(stats.H, before[1])
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_rows_are_independent(solve):
    W, stats = layer(16, 64)
    together = solve(W, stats, Scheme(4, 32), torch.float16, Options())
    apart = [solve(part, stats, Scheme(4, 32), torch.float16, Options()) for part in (W[:5], W[5:])]
    assert torch.equal(dequantize(together), torch.cat([dequantize(q) for q in apart]))


@pytest.mark.parametrize("K", [1, 7, 33, 130])
def test_odd_sizes(solve, K):
    W, stats = layer(3, K)
    q = solve(W, stats, Scheme(4, -1), torch.float32, Options())
    assert (W - dequantize(q)).abs().max() <= q.scales.float().abs().max() * 1.01 * max(1, K)


def test_eight_bits_are_nearly_exact(solve):
    W, stats = layer(16, 64)
    q = solve(W, stats, Scheme(8, 32), torch.float32, Options())
    assert loss(W - dequantize(q), stats.H) < 1e-3 * loss(W, stats.H)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(3, -1), Scheme(4, 32, False)], ids=str)
def test_gptq_improves_on_rounding_to_nearest(scheme, order):
    W, stats = layer(64, 128)
    gptq, rtn = (QUANTIZERS[name](W, stats, scheme, torch.float16, Options(order=order)) for name in ("gptq", "rtn"))
    assert loss(W - dequantize(gptq), stats.H) < 0.8 * loss(W - dequantize(rtn), stats.H)


def test_effort_fast_is_the_plain_solver():
    assert Options.of("fast", order="act", damping=0.1) == Options(order="act", damping=0.1)
    assert Options.of("fast").sweeps == 0
    assert not Options.of("fast").corrected
    assert Options.of("default", order="act") == Options(order="act", sweeps=2, corrected=True)
