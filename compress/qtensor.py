"""Solved layers: QTensor on a grid, the only thing that is ever packed, and Pruned, with zeros. The only place that rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import no_type_check

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from compress.kernels import minifloat
from compress.spec import Scheme


@dataclass(frozen=True)
class QTensor:
    """Integer codes straight from a solver, with what turns them back into weights.

    `scales` have the dtype they are stored in, so `dequantize` equals, bit for bit, the Q that a solver fed back; they are
    divided by `global_scale`, which layers that runtimes fuse share.
    `zeros` are unsigned zero points, all `scheme.zero` for a symmetric scheme. `g_idx` gives the group of every input
    where groups are not contiguous; this package never makes such checkpoints, other tools do.
    `error` is the expected squared output error of every row, diag((W-Q) H (W-Q)^T) with H a mean over tokens; None where
    there was no H. `notes` are the fallbacks that were taken.
    """

    codes: UInt8[Tensor, "N K"]
    scales: Shaped[Tensor, "N G"]  # of a floating-point dtype; jaxtyping does not count e8m0 among them
    zeros: UInt8[Tensor, "N G"]
    scheme: Scheme
    g_idx: Int[Tensor, "K"] | None = None
    error: Float[Tensor, "N"] | None = None
    notes: tuple[str, ...] = ()
    global_scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.codes.shape
        return N, K

    @property
    def steps(self) -> Float[Tensor, "N G"]:
        """What values of the grid are multiplied by, in float32."""
        scales = self.scales.float()
        return scales if self.global_scale == 1 else scales / self.global_scale

    def to(self, device: torch.device) -> QTensor:
        """The same on a device; the errors of rows stay where they are."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=self.zeros.to(device))

    def rows(self, start: int, stop: int) -> QTensor:
        """The layer made of some of the rows; rows are solved independently, so stacked layers can be solved at once."""
        cut = slice(start, stop)
        error = None if self.error is None else self.error[cut]
        return replace(self, codes=self.codes[cut], scales=self.scales[cut], zeros=self.zeros[cut], error=error)


@dataclass(frozen=True)
class Pruned:
    """A solved layer that is not on a grid: weights in the dtype they are stored in, exactly zero where they were pruned.

    `error` and `notes` as in QTensor.
    """

    weight: Float[Tensor, "N K"]
    error: Float[Tensor, "N"] | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.weight.shape
        return N, K

    def to(self, device: torch.device) -> Pruned:
        return replace(self, weight=self.weight.to(device))

    def rows(self, start: int, stop: int) -> Pruned:
        """The layer made of some of the rows."""
        error = None if self.error is None else self.error[start:stop]
        return replace(self, weight=self.weight[start:stop], error=error)


Solved = QTensor | Pruned


def dense(solved: Solved, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N K"]:
    """The weights that a solved layer stands for."""
    return dequantize(solved, dtype) if isinstance(solved, QTensor) else solved.weight.to(dtype)


def zeros(solved: Solved) -> int:
    """How many of the weights are zero."""
    return int((dense(solved) == 0).sum())


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N K"]:
    """Q = scale * (u - zero), computed in float32 and rounded once to `dtype`; what every reader of the formats computes."""
    N, K = q.shape
    if q.g_idx is not None:
        index = q.g_idx.long()
        levels = q.codes.float() - q.zeros[:, index].float()
        return (levels * q.steps[:, index]).to(dtype)
    grouped = values_of(q.codes.view(N, q.scales.shape[1], -1), q.zeros[..., None].float(), q.scheme)
    return grouped.mul_(q.steps[..., None]).view(N, K).to(dtype)


def round_to_grid(
    w: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."], scheme: Scheme
) -> Float[Tensor, "..."]:
    """The nearest values of the grid in units of the scale, u - zero for whole numbers; shapes broadcast. Halves go to even."""
    steps = w / scale
    round_steps(steps, zero, scheme, steps)
    return steps


@no_type_check  # called for every column: checking its shapes took a fifth of the time of tests that solve
def round_steps(
    steps: Float[Tensor, "..."], zero: Float[Tensor, "..."], scheme: Scheme, out: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """`round_to_grid` of numbers in units of the scale, written to `out`, which may be `steps`."""
    if scheme.form != "int":
        return out.copy_(minifloat.rounded(steps, scheme.form))
    torch.round(steps, out=out)
    if scheme.symmetric:  # bounds that are no tensors take half of the time
        return out.clamp_(scheme.lowest - scheme.zero, scheme.levels - 1 - scheme.zero)
    return out.clamp_(scheme.lowest - zero, scheme.levels - 1 - zero)


def codes_of(values: Float[Tensor, "..."], zero: Float[Tensor, "..."], scheme: Scheme) -> UInt8[Tensor, "..."]:
    """The codes of what `round_to_grid` gave; shapes broadcast."""
    return (values + zero).byte() if scheme.form == "int" else minifloat.codes_of(values, scheme.form)


def values_of(codes: UInt8[Tensor, "..."], zero: Float[Tensor, "..."], scheme: Scheme) -> Float[Tensor, "..."]:
    """Inverse of `codes_of`."""
    return codes.float() - zero if scheme.form == "int" else minifloat.values_of(codes, scheme.form)
