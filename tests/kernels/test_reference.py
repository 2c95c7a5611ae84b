from __future__ import annotations

import pytest
import torch

from compress.kernels import reference
from compress.kernels.packing import pack

CASES = [(2, 64, 32), (3, 96, 96), (4, 80, 16), (8, 33, 33)]


def zero_points(zeros, scales, bits):
    return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "K", "group"), CASES)
def test_matches_float64_arithmetic(weight, q64, bits, K, group, symmetric, dtype):
    codes, scales, zeros = weight(7, K, group, bits, symmetric=symmetric, dtype=dtype)
    bias, x = torch.randn(7), torch.randn(2, 3, K)
    expected = x.double() @ q64(codes, scales, zeros, bits).t() + bias
    out = reference.linear(x, codes, scales, zero_points(zeros, scales, bits), bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group_index_replaces_contiguous_groups(weight, q64, bits):
    codes, scales, zeros = weight(5, 48, 16, bits, symmetric=False)
    g_idx = (torch.arange(48) // 16)[torch.randperm(48)].int()
    expected = q64(codes, scales, zeros, bits, g_idx).float()
    torch.testing.assert_close(reference.dequantize(codes, scales, zeros, g_idx), expected)
    assert not torch.allclose(reference.dequantize(codes, scales, zeros), expected)


def test_sums_in_float32_and_rounds_once():
    K = 4096
    codes, scales = torch.full((1, K), 9, dtype=torch.uint8), torch.ones(1, 1)
    zeros = torch.full((1, 1), 8, dtype=torch.uint8)
    out = reference.linear(torch.ones(1, K, dtype=torch.bfloat16), codes, scales, zeros)
    assert out.dtype == torch.bfloat16
    assert out.item() == K


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "K", "group"), CASES)
def test_tiles_of_words_give_the_same_product(weight, monkeypatch, bits, K, group, dtype):
    monkeypatch.setattr(reference, "SCRATCH_CPU", 4 * K)  # four rows a tile, so that 7 rows end in a part
    codes, scales, zeros = weight(7, K, group, bits, symmetric=False)
    x = torch.randn(5, K).to(dtype)
    out = reference.linear_words(x, pack(codes, bits), scales, zeros, bits)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.linear(x, codes, scales, zeros), rtol=0.02, atol=2e-3)
