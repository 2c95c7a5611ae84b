"""Rotations: orthogonal, spread out, the same for the same seed, and applied as their matrix would be."""

from __future__ import annotations

import pytest
import torch

from compress.rotate.orthogonal import Rotation, sylvester


def of(width: int, seed: int = 0) -> Rotation:
    return Rotation.random(width, seed)


def matrix(rotation: Rotation) -> torch.Tensor:
    return rotation.rows(torch.eye(rotation.width))


@pytest.mark.parametrize("width", [1, 2, 3, 12, 31, 64, 96, 128, 448])
def test_it_is_orthogonal_and_changes_with_the_seed(width):
    R = matrix(of(width))
    assert R.dtype == torch.float64
    torch.testing.assert_close(R @ R.t(), torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(R, matrix(of(width)))
    assert width == 1 or any(not torch.equal(R, matrix(of(width, seed))) for seed in (1, 2, 3))


def test_it_is_the_product_it_says_it_is():
    rotation = of(24)
    expected = rotation.signs[:, None] * torch.kron(rotation.block.contiguous(), sylvester(8))
    torch.testing.assert_close(matrix(rotation), expected, rtol=0, atol=1e-14)
    assert len(rotation.block) == 3


@pytest.mark.parametrize("width", [64, 512])
def test_a_power_of_two_spreads_every_input_evenly(width):
    torch.testing.assert_close(matrix(of(width)).abs(), torch.full((width, width), width**-0.5, dtype=torch.float64))


def test_an_odd_part_is_spread_over_its_power_of_two():
    assert matrix(of(96)).abs().max() <= 32**-0.5 + 1e-12


def test_columns_turn_by_the_inverse_and_longer_rows_piece_by_piece():
    rotation, x = of(12), torch.randn(5, 36, generator=torch.Generator().manual_seed(1))
    R = matrix(rotation)
    pieces = torch.cat([piece.double() @ R for piece in x.split(12, dim=1)], 1)
    torch.testing.assert_close(rotation.rows(x), pieces, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.columns(x.t()), pieces.t(), rtol=0, atol=1e-13)
