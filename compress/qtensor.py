"""Solved layers: QTensor on a grid, the only thing that is ever packed, and Pruned, with zeros. The only place that rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from compress.spec import Scheme


@dataclass(frozen=True)
class QTensor:
    """Integer codes straight from a solver, with what turns them back into weights.

    `scales` have the dtype they are stored in, so `dequantize` equals, bit for bit, the Q that a solver fed back.
    `zeros` are unsigned zero points, all `2^(bits-1)` for a symmetric scheme. `g_idx` gives the group of every input
    where groups are not contiguous; this package never makes such checkpoints, other tools do.
    `error` is the expected squared output error of every row, diag((W-Q) H (W-Q)^T) with H a mean over tokens; None where
    there was no H. `notes` are the fallbacks that were taken.
    """

    codes: UInt8[Tensor, "N K"]
    scales: Float[Tensor, "N G"]
    zeros: UInt8[Tensor, "N G"]
    scheme: Scheme
    g_idx: Int[Tensor, "K"] | None = None
    error: Float[Tensor, "N"] | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.codes.shape
        return N, K

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
        return (levels * q.scales[:, index].float()).to(dtype)
    grouped = q.codes.view(N, q.scales.shape[1], -1).float()
    return ((grouped - q.zeros[..., None].float()) * q.scales[..., None].float()).view(N, K).to(dtype)


def round_to_grid(
    w: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."], levels: int
) -> Float[Tensor, "..."]:
    """The nearest codes, as floats: `clamp(round(w / scale) + zero, 0, levels - 1)`; shapes broadcast. Rounds halves to even."""
    return torch.round(w / scale).add_(zero).clamp_(0, levels - 1)
