from __future__ import annotations

import pytest
import torch

from compress.qtensor import round_to_grid
from compress.solvers import grid
from compress.spec import Scheme


def error(w: torch.Tensor, fitted: grid.Grid, levels: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    scale, zero = fitted.scales[..., None], fitted.zeros[..., None]
    off = (round_to_grid(w, scale, zero, levels) - zero) * scale - w
    return (off.square() * (1 if weights is None else weights)).sum(-1)


def groups(N: int = 50, G: int = 4, g: int = 32) -> torch.Tensor:
    return torch.randn(N, G, g, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_symmetric_range_represents_the_extreme_value_of_every_group_exactly(bits):
    w = groups()
    fitted = grid.fit(w, None, Scheme(bits, 32), torch.float32, candidates=1)
    extreme = w.abs().amax(-1)
    assert torch.equal(fitted.zeros, torch.full_like(fitted.zeros, 2 ** (bits - 1)))
    torch.testing.assert_close(fitted.scales.abs() * 2 ** (bits - 1), extreme)
    at = w.abs().argmax(-1, keepdim=True)
    assert error(w, fitted, 2**bits).shape == (50, 4)
    codes = round_to_grid(w, fitted.scales[..., None], fitted.zeros[..., None], 2**bits)
    assert not codes.gather(-1, at).any()  # the extreme has code 0, the level that has no mirror image


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_plain_asymmetric_range_covers_the_group(bits):
    w = groups()
    fitted = grid.fit(w, None, Scheme(bits, 32, False), torch.float32, candidates=1)
    low = -fitted.zeros * fitted.scales
    high = (2**bits - 1 - fitted.zeros) * fitted.scales
    half = fitted.scales / 2 + 1e-6
    assert (low <= w.amin(-1) + half).all()
    assert (high >= w.amax(-1) - half).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_never_does_worse_than_the_plain_range(symmetric):
    w = groups()
    for weights in (None, torch.rand(4, 32)):
        plain = grid.fit(w, weights, Scheme(3, 32, symmetric), torch.float16, candidates=1)
        searched = grid.fit(w, weights, Scheme(3, 32, symmetric), torch.float16, candidates=12)
        assert (error(w, searched, 8, weights) <= error(w, plain, 8, weights)).all()
        assert error(w, searched, 8, weights).sum() < 0.97 * error(w, plain, 8, weights).sum()


def test_weights_decide_which_values_are_hit():
    w = torch.tensor([[[1.0, 0.31, 0.3, 0.29, -0.3, 0.0]]])
    small = grid.fit(w, torch.tensor([[1e-6, 1, 1, 1, 1, 1]]), Scheme(2, 6), torch.float32, candidates=32)
    large = grid.fit(w, torch.tensor([[1e6, 1, 1, 1, 1, 1]]), Scheme(2, 6), torch.float32, candidates=32)
    assert error(w, small, 4, torch.tensor([[0.0, 1, 1, 1, 1, 1]])) < error(w, large, 4, torch.tensor([[0.0, 1, 1, 1, 1, 1]]))


def test_scales_are_values_of_the_storage_dtype_and_never_zero():
    w = torch.cat([torch.zeros(1, 1, 16), 1e-9 * torch.ones(1, 1, 16), torch.randn(2, 1, 16)])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        fitted = grid.fit(w, None, Scheme(4, 16), dtype, candidates=4)
        assert torch.equal(fitted.scales.to(dtype).float(), fitted.scales)
        assert (fitted.scales != 0).all()
    assert not error(w, fitted, 16)[0].any()


def test_rows_are_fitted_independently_of_how_they_are_split(monkeypatch):
    w = groups()
    whole = grid.fit(w, None, Scheme(4, 32), torch.float16, candidates=8)
    monkeypatch.setattr(grid, "WEIGHTS_AT_A_TIME", 7 * 128)
    split = grid.fit(w, None, Scheme(4, 32), torch.float16, candidates=8)
    assert torch.equal(whole.scales, split.scales)
    assert torch.equal(whole.zeros, split.zeros)
