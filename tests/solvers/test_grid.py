from __future__ import annotations

import pytest
import torch

from compress.qtensor import round_to_grid
from compress.solvers import grid
from compress.spec import Scheme


def error(w: torch.Tensor, fitted: grid.Grid, scheme: Scheme, weights: torch.Tensor | None = None) -> torch.Tensor:
    scale, zero = fitted.scales[..., None], fitted.zeros[..., None]
    off = round_to_grid(w, scale, zero, scheme) * scale - w
    return (off.square() * (1 if weights is None else weights)).sum(-1)


def groups(N: int = 50, G: int = 4, g: int = 32) -> torch.Tensor:
    return torch.randn(N, G, g, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_symmetric_range_represents_the_extreme_value_of_every_group_exactly(bits):
    w = groups()
    fitted = grid.fit(w, None, Scheme(bits, 32), grid.Storage(torch.float32), candidates=1)
    extreme = w.abs().amax(-1)
    assert torch.equal(fitted.zeros, torch.full_like(fitted.zeros, 2 ** (bits - 1)))
    torch.testing.assert_close(fitted.scales.abs() * 2 ** (bits - 1), extreme)
    at = w.abs().argmax(-1, keepdim=True)
    assert error(w, fitted, Scheme(bits, 32)).shape == (50, 4)
    values = round_to_grid(w, fitted.scales[..., None], fitted.zeros[..., None], Scheme(bits, 32))
    assert (values.gather(-1, at) == -(2 ** (bits - 1))).all()  # the level that has no mirror image


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_plain_asymmetric_range_covers_the_group(bits):
    w = groups()
    fitted = grid.fit(w, None, Scheme(bits, 32, False), grid.Storage(torch.float32), candidates=1)
    low = -fitted.zeros * fitted.scales
    high = (2**bits - 1 - fitted.zeros) * fitted.scales
    half = fitted.scales / 2 + 1e-6
    assert (low <= w.amin(-1) + half).all()
    assert (high >= w.amax(-1) - half).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_never_does_worse_than_the_plain_range(symmetric):
    w, scheme = groups(), Scheme(3, 32, symmetric)
    for weights in (None, torch.rand(4, 32)):
        plain = grid.fit(w, weights, scheme, grid.Storage(torch.float16), candidates=1)
        searched = grid.fit(w, weights, scheme, grid.Storage(torch.float16), candidates=12)
        assert (error(w, searched, scheme, weights) <= error(w, plain, scheme, weights)).all()
        assert error(w, searched, scheme, weights).sum() < 0.97 * error(w, plain, scheme, weights).sum()


def test_weights_decide_which_values_are_hit():
    w, scheme = torch.tensor([[[1.0, 0.31, 0.3, 0.29, -0.3, 0.0]]]), Scheme(2, 6)
    small = grid.fit(w, torch.tensor([[1e-6, 1, 1, 1, 1, 1]]), scheme, grid.Storage(torch.float32), candidates=32)
    large = grid.fit(w, torch.tensor([[1e6, 1, 1, 1, 1, 1]]), scheme, grid.Storage(torch.float32), candidates=32)
    others = torch.tensor([[0.0, 1, 1, 1, 1, 1]])
    assert error(w, small, scheme, others) < error(w, large, scheme, others)


def test_scales_are_values_of_the_storage_dtype_and_never_zero():
    w = torch.cat([torch.zeros(1, 1, 16), 1e-9 * torch.ones(1, 1, 16), torch.randn(2, 1, 16)])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        fitted = grid.fit(w, None, Scheme(4, 16), grid.Storage(dtype), candidates=4)
        assert torch.equal(fitted.scales.to(dtype).float(), fitted.scales)
        assert (fitted.scales != 0).all()
    assert not error(w, fitted, Scheme(4, 16))[0].any()


def test_rows_are_fitted_independently_of_how_they_are_split(monkeypatch):
    w = groups()
    whole = grid.fit(w, None, Scheme(4, 32), grid.Storage(torch.float16), candidates=8)
    monkeypatch.setattr(grid, "WEIGHTS_AT_A_TIME", 7 * 128)
    split = grid.fit(w, None, Scheme(4, 32), grid.Storage(torch.float16), candidates=8)
    assert torch.equal(whole.scales, split.scales)
    assert torch.equal(whole.zeros, split.zeros)


def test_mxfp4_takes_the_best_power_of_two():
    w = groups(g=32) * torch.logspace(-6, 3, 50)[:, None, None]
    scheme = Scheme.of("mxfp4")
    storage = grid.Storage.of(scheme, w.flatten(1), torch.float16)
    fitted = grid.fit(w, None, scheme, storage, candidates=8)
    assert (torch.frexp(fitted.scales).mantissa == 0.5).all()
    powers = [grid.Grid(torch.full((50, 4), 2.0**e), torch.zeros(50, 4)) for e in range(-40, 20)]
    best = torch.stack([error(w, power, scheme) for power in powers]).amin(0)
    assert torch.equal(error(w, fitted, scheme), best)


@pytest.mark.parametrize("largest", [1e-12, 0.03, 1.0, 70000.0])
def test_nvfp4_scales_can_be_stored_and_the_largest_has_room(largest):
    w = groups(g=16)
    w *= largest / w.abs().max()
    scheme = Scheme.of("nvfp4")
    storage = grid.Storage.of(scheme, w.flatten(1), torch.bfloat16)
    plain = grid.fit(w, None, scheme, storage, candidates=1)
    stored = storage.of_rounded(plain.scales)
    assert stored.dtype == torch.float8_e4m3fn
    assert 112 <= stored.float().max() <= 224
    fitted = grid.fit(w, None, scheme, storage, candidates=8)
    assert torch.equal(storage.of_rounded(fitted.scales).float() / storage.global_scale, fitted.scales)
    assert (fitted.scales > 0).all()
    assert (error(w, fitted, scheme) <= error(w, plain, scheme)).all()
    assert error(w, fitted, scheme).sum() < 0.9 * error(w, plain, scheme).sum()
    assert error(w, fitted, scheme).sum() < 0.02 * w.square().sum()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_groups_of_zeros_stay_zero(name):
    w = torch.zeros(3, 2, Scheme.of(name).group_size)
    for scheme, weights in ((Scheme.of(name), w), (Scheme.of(name), torch.cat([w, torch.randn_like(w)]))):
        storage = grid.Storage.of(scheme, weights.flatten(1), torch.float16)
        fitted = grid.fit(weights, None, scheme, storage, candidates=8)
        assert (storage.of_rounded(fitted.scales).float() > 0).all()
        assert not error(weights, fitted, scheme)[:3].any()


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_stored_scales_are_the_nearest(dtype):
    storage = grid.Storage(dtype, 1.0 if dtype == torch.float8_e8m0fnu else 0.25)
    every = torch.arange(1, 127, dtype=torch.uint8).view(dtype).float() / storage.global_scale
    x = torch.logspace(-3, 2, 999)
    off = (storage.rounded(x)[:, None] - x[:, None]).abs()
    assert torch.equal(off[:, 0], (every - x[:, None]).abs().amin(1).minimum(off[:, 0]))
    assert (storage.rounded(torch.tensor([-1.0, 0.0, 1e-30])) > 0).all()
    assert storage.rounded(torch.tensor([1e30])).isfinite().all()


@pytest.mark.parametrize("weights", [None, torch.logspace(-1, 1, 128).view(4, 32)])
def test_ternary_scales_come_near_the_best(weights):
    w, scheme = groups(), Scheme.of("ternary", group_size=32)
    fitted = grid.fit(w, weights, scheme, grid.Storage(torch.float32), candidates=8)
    assert set(round_to_grid(w, fitted.scales[..., None], fitted.zeros[..., None], scheme).unique().tolist()) == {-1, 0, 1}
    extreme, twos = w.abs().amax(-1), torch.full((50, 4), 2.0)
    every = [error(w, grid.Grid(extreme * shrink, twos), scheme, weights) for shrink in torch.linspace(0.01, 1.2, 500).tolist()]
    assert error(w, fitted, scheme, weights).sum() < 1.01 * torch.stack(every).amin(0).sum()
