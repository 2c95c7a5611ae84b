"""A layer to solve: correlated inputs with outlier channels, one of them dead."""

from __future__ import annotations

import torch

from compress.calib.stats import LayerStats


def layer(N: int, K: int, seed: int = 0, dead: int | None = None) -> tuple[torch.Tensor, LayerStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5
    x = torch.randn(4 * K, K, generator=g) @ mix
    x[:, :: max(1, K // 5)] *= 6
    if dead is not None:
        x[:, dead] = 0
    return torch.randn(N, K, generator=g), LayerStats(x.t() @ x / len(x), len(x))


def loss(E: torch.Tensor, H: torch.Tensor) -> float:
    E, H = E.double(), H.double()
    return float(((E @ H) * E).sum())
