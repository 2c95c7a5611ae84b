"""Fitting scales and zero points to groups of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from compress.kernels import minifloat
from compress.kernels.minifloat import FORMS
from compress.qtensor import round_steps
from compress.spec import Scheme

FINEST_SHRINK = 0.7  # the smallest candidate range; down to 0.5 gains nothing (benchmarks/defaults.py)
LARGEST_POWER, HIGHEST_EXPONENT = 2.0**127, 64  # of an e8m0 scale; of a global scale, where a layer is next to nothing
FINEST_TERNARY = 0.2  # normal weights are best served at 0.31 of the largest of 4096, 0.44 of that of 128
WEIGHTS_AT_A_TIME = 1 << 19  # two megabytes in float32: the search runs in cache


@dataclass(frozen=True)
class Storage:
    """How a layer's scales are stored: their dtype, and the one number that they are all divided by."""

    dtype: torch.dtype
    global_scale: float = 1.0

    @staticmethod
    def of(scheme: Scheme | None, W: Float[Tensor, "N K"], dtype: torch.dtype) -> Storage:
        """That of a scheme, for weights like W; `dtype` is for scales, or weights without a grid, that have the model's.

        nvfp4's global scale is a power of two, with which numbers times scales are exact in bfloat16 and float16 too: readers
        that compute in either agree. It leaves the largest scale one binade of e4m3's fifteen to grow.
        """
        if scheme is None or scheme.grid not in ("mxfp4", "nvfp4"):
            return Storage(dtype)
        if scheme.grid == "mxfp4":
            return Storage(torch.float8_e8m0fnu)
        largest = W.abs().max().item() / FORMS["e2m1"].largest
        room = FORMS["e4m3"].largest / 2
        exponent = math.floor(math.log2(room / largest)) if largest > 0 else 0
        return Storage(torch.float8_e4m3fn, 2.0 ** min(exponent, HIGHEST_EXPONENT))

    def rounded(self, scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The scales that can be stored and are nearest; never zero, so that an all-zero group divides safely and stays zero."""
        if self.dtype == torch.float8_e8m0fnu:
            return scale.clamp(torch.finfo(torch.float32).tiny, LARGEST_POWER).to(self.dtype).float()
        if self.dtype == torch.float8_e4m3fn:
            e4m3 = FORMS["e4m3"]
            return minifloat.rounded((scale * self.global_scale).clamp(e4m3.step, e4m3.largest), "e4m3") / self.global_scale
        tiny = torch.finfo(self.dtype).tiny
        return torch.where(scale.abs() < tiny, tiny, scale).to(self.dtype).float()

    def of_rounded(self, scales: Float[Tensor, "N G"]) -> Shaped[Tensor, "N G"]:
        """What `rounded` gave, as it is stored."""
        return (scales * self.global_scale).to(self.dtype)


@dataclass(frozen=True)
class Grid:
    """Scales, as stored and over what their layer shares, and unsigned zero points, both as float32 for arithmetic.

    [N, G], or [N] of one group.
    """

    scales: Float[Tensor, "..."]
    zeros: Float[Tensor, "..."]


def fit(
    w: Float[Tensor, "N G g"],
    weights: Float[Tensor, "G g"] | None,
    scheme: Scheme,
    storage: Storage,
    candidates: int,
) -> Grid:
    """The scale and zero point of every group that minimise `sum weights * (w - q)^2` over a grid of shrunk ranges.

    One candidate means the plain range of the group. A symmetric grid of whole numbers has one more level below zero than
    above; the scale takes the sign that puts the group's extreme value there, and with more candidates also the other sign is
    tried. Scales are rounded as they are stored before they are judged.
    """
    each = [
        fit_group(w[:, g].t().contiguous(), None if weights is None else weights[g], scheme, storage, candidates)
        for g in range(w.shape[1])
    ]
    return Grid(torch.stack([one.scales for one in each], 1), torch.stack([one.zeros for one in each], 1))


def fit_group(
    w: Float[Tensor, "g N"],
    weights: Float[Tensor, "g"] | None,
    scheme: Scheme,
    storage: Storage,
    candidates: int,
) -> Grid:
    """`fit` for the weights of one group of every row, transposed: a scale is then one of many in a vector."""
    rows = min(max(1, WEIGHTS_AT_A_TIME // len(w)), w.shape[1])
    work = torch.empty(2, len(w), rows, device=w.device)
    parts = [_search(part, weights, scheme, storage, candidates, work) for part in w.split(rows, 1)]
    return Grid(torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]))


def _search(
    w: Float[Tensor, "g N"],
    weights: Float[Tensor, "g"] | None,
    scheme: Scheme,
    storage: Storage,
    candidates: int,
    work: Float[Tensor, "2 g R"],
) -> Grid:
    tried = _tried(w.amin(0).clamp(max=0), w.amax(0).clamp(min=0), scheme, candidates)
    tried = Grid(storage.rounded(tried.scales), tried.zeros)  # [candidate, N]
    if candidates == 1:
        return Grid(tried.scales[0], tried.zeros[0])
    best = _errors(w, torch.ones_like(w[:, 0]) if weights is None else weights, tried, scheme, work).min(0, keepdim=True)
    return Grid(tried.scales.gather(0, best.indices)[0], tried.zeros.gather(0, best.indices)[0])


def _errors(
    w: Float[Tensor, "g N"], weights: Float[Tensor, "g"], tried: Grid, scheme: Scheme, work: Float[Tensor, "2 g R"]
) -> Float[Tensor, "C N"]:
    """`sum weights * (w - q)^2` for every candidate, with products by reciprocals: only codes need a division."""
    steps, off = work[:, :, : w.shape[1]]
    inverse, squared = tried.scales.reciprocal(), tried.scales.square()
    errors = torch.empty_like(squared)
    for c, zero in enumerate(tried.zeros):
        torch.mul(w, inverse[c], out=steps)
        round_steps(steps, zero, scheme, off)
        torch.mv(off.sub_(steps).square_().t(), weights, out=errors[c])
    return errors.mul_(squared)


def ranges(scheme: Scheme, candidates: int) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """What candidates for the scale of whole numbers are: factors of a group's range, and how much of it they cover."""
    shrink = _shrinks(scheme, candidates)
    if not scheme.symmetric:
        return shrink / (scheme.levels - 1), shrink
    if candidates > 1:  # a negative one puts the extreme on the side with one level less
        shrink = torch.stack([shrink, -shrink], 1).flatten()
    return shrink / scheme.zero, shrink


def _tried(low: Float[Tensor, "N"], high: Float[Tensor, "N"], scheme: Scheme, candidates: int) -> Grid:
    """Scales and zero points [candidate, N], before they are rounded."""
    if scheme.grid != "int":
        scales = _even(low, high, scheme) * _shrinks(scheme, candidates).to(low.device)[:, None]
        return Grid(scales, torch.full_like(scales, scheme.zero))
    factor, shrink = (table.to(low.device)[:, None] for table in ranges(scheme, candidates))
    if not scheme.symmetric:
        scales = (high - low) * factor
        zeros = torch.round(-low * shrink / torch.where(scales == 0, 1, scales)).clamp(0, scheme.levels - 1)
        return Grid(scales, zeros)
    scales = _symmetric(low, high, factor)
    return Grid(scales, torch.full_like(scales, scheme.zero))


def _symmetric(low: Float[Tensor, "N"], high: Float[Tensor, "N"], factor: Float[Tensor, "C 1"]) -> Float[Tensor, "C N"]:
    return -torch.where(high > -low, high, low) * factor


def _even(low: Float[Tensor, "N"], high: Float[Tensor, "N"], scheme: Scheme) -> Float[Tensor, "N"]:
    """Of a grid with as many values below zero as above."""
    largest = torch.maximum(high, -low)
    if scheme.form == "int":
        return largest
    plain = largest / FORMS[scheme.form].largest
    return _power_above(plain) if scheme.grid == "mxfp4" else plain


def _shrinks(scheme: Scheme, candidates: int) -> Float[Tensor, "C"]:
    """What the plain scale is multiplied by.

    The steps of e2m1 grow towards its largest number, so that a larger scale, with the extreme at 4, can also be better (Four
    Over Six, arXiv 2512.02010). Powers of two leave one other choice. Of three values, most weights want the scale itself.
    """
    if scheme.grid == "ternary":
        return torch.linspace(1, FINEST_TERNARY, 2 * candidates - 1)
    if candidates > 1 and scheme.grid == "mxfp4":
        return torch.tensor([1.0, 0.5])
    extreme_at_four = [3 / 2] if candidates > 1 and scheme.grid == "nvfp4" else []
    return torch.cat([torch.linspace(1, FINEST_SHRINK, candidates), torch.tensor(extreme_at_four)])


def _power_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below."""
    mantissa, exponent = torch.frexp(scale)  # of 0.5 .. 1
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
