from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Weight = tuple[Tensor, Tensor, Tensor | None]


def rounded(N: int, K: int, group: int, bits: int, *, symmetric: bool = True, dtype: torch.dtype = torch.float16) -> Weight:
    """Codes, scales and zeros (None when symmetric) of normal weights, rounded to nearest; some scales are negative."""
    generator = torch.Generator().manual_seed(N + K + group + bits)
    grouped = torch.randn(N, K // group, group, generator=generator) * 0.02 + 0.003
    if symmetric:
        sign = torch.randint(0, 2, (N, K // group), generator=generator) * 2 - 1
        scales, zeros = (grouped.abs().amax(-1) / 2 ** (bits - 1) * sign).to(dtype), None
    else:
        scales = ((grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)).to(dtype)
        zeros = (-grouped.amin(-1) / scales.float()).round().clamp(0, 2**bits - 1)
    zero = 2 ** (bits - 1) if zeros is None else zeros[..., None]
    codes = (grouped / scales.float()[..., None] + zero).round().clamp(0, 2**bits - 1).view(N, K).to(torch.uint8)
    return codes, scales, None if zeros is None else zeros.to(torch.uint8)


def exact(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, g_idx: Tensor | None = None) -> Tensor:
    """Q in float64, element by element."""
    K = codes.shape[1]
    index = torch.arange(K) // (K // scales.shape[1]) if g_idx is None else g_idx.long()
    zero = torch.full(scales.shape, 2.0 ** (bits - 1)) if zeros is None else zeros
    return (codes.double() - zero.double()[:, index]) * scales.double()[:, index]


@pytest.fixture(scope="session")
def weight() -> Callable[..., Weight]:
    return rounded


@pytest.fixture(scope="session")
def q64() -> Callable[..., Tensor]:
    return exact
