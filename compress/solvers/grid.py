"""Fitting scales and zero points to groups of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.qtensor import round_to_grid
from compress.spec import Scheme

FINEST_SHRINK = 0.7  # the smallest candidate range; down to 0.5 gains nothing (benchmarks/defaults.py)
WEIGHTS_AT_A_TIME = 1 << 18  # a megabyte in float32: the search runs in a core's cache


@dataclass(frozen=True)
class Grid:
    """Scales, as stored, and unsigned zero points, both as float32 for arithmetic."""

    scales: Float[Tensor, "N G"]
    zeros: Float[Tensor, "N G"]


def fit(
    w: Float[Tensor, "N G g"],
    weights: Float[Tensor, "G g"] | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    candidates: int,
) -> Grid:
    """The scale and zero point of every group that minimise `sum weights * (w - q)^2` over a grid of shrunk ranges.

    One candidate means the plain range of the group. A symmetric grid has one more level below zero than above; the scale
    takes the sign that puts the group's extreme value there, and with more candidates also the other sign is tried.
    Scales are rounded to `scale_dtype` before they are judged.
    """
    rows = max(1, WEIGHTS_AT_A_TIME // w[0].numel())
    parts = [_fit_rows(part, weights, scheme, scale_dtype, candidates) for part in w.split(rows)]
    return Grid(torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]))


def _fit_rows(
    w: Float[Tensor, "N G g"],
    weights: Float[Tensor, "G g"] | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    candidates: int,
) -> Grid:
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    best: Grid | None = None
    best_error = torch.empty(0)
    for shrink in torch.linspace(1, FINEST_SHRINK, candidates).tolist():
        for sign in (1, -1) if scheme.symmetric and candidates > 1 else (1,):
            grid = _symmetric(low, high, scheme, shrink, sign) if scheme.symmetric else _asymmetric(low, high, scheme, shrink)
            grid = Grid(stored(grid.scales, scale_dtype), grid.zeros)
            if candidates == 1:
                return grid
            error = _error(w, weights, grid, scheme.levels)
            if best is None:
                best, best_error = grid, error
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    assert best is not None
    return best


def _symmetric(low: Tensor, high: Tensor, scheme: Scheme, shrink: float, sign: int) -> Grid:
    half = scheme.levels // 2
    extreme = torch.where(high > -low, high, low)
    return Grid(-extreme * (sign * shrink / half), torch.full_like(low, half))


def _asymmetric(low: Tensor, high: Tensor, scheme: Scheme, shrink: float) -> Grid:
    scale = (high - low) * (shrink / (scheme.levels - 1))
    zero = torch.round(-low * shrink / torch.where(scale == 0, 1, scale)).clamp(0, scheme.levels - 1)
    return Grid(scale, zero)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The value that is stored; never zero, so that an all-zero group divides safely and stays zero."""
    tiny = torch.finfo(dtype).tiny
    return torch.where(scale.abs() < tiny, tiny, scale).to(dtype).float()


def _error(w: Tensor, weights: Tensor | None, grid: Grid, levels: int) -> Tensor:
    scale, zero = grid.scales[..., None], grid.zeros[..., None]
    off = (round_to_grid(w, scale, zero, levels) - zero).mul_(scale).sub_(w).square_()
    return (off if weights is None else off.mul_(weights)).sum(-1)
