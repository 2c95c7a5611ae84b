"""What calibration learns of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compress.linalg import add_gram_, mirror

ROWS_AT_A_TIME = 16384  # bounds the working copies of one update


@dataclass(frozen=True)
class LayerStats:
    """The Hessian of a layer's output error, H = X X^T / M over the M tokens seen; shared by layers with one input."""

    H: Float[Tensor, "K K"]
    tokens: int


class HessianSum:
    """Accumulates X X^T in float32 (or float64), whatever the dtype of the activations."""

    def __init__(self, K: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.lower = torch.zeros(K, K, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Float[Tensor, "M K"]) -> None:
        for rows in x.split(ROWS_AT_A_TIME):
            add_gram_(self.lower, rows)
        self.tokens += len(x)

    def stats(self) -> LayerStats:
        return LayerStats(mirror(self.lower) / max(self.tokens, 1), self.tokens)


def rows_of(x: Tensor, module: nn.Module, mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "M K"]:
    """A layer's input as rows of the matrix it multiplies: tokens, or the unfolded patches of a convolution.

    `mask` drops padding where the input has its batch and sequence dimensions.
    """
    if isinstance(module, nn.Conv2d):
        return nn.functional.unfold(x, *unfolding(module)).transpose(1, 2).flatten(0, 1)
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.flatten(0, -2)


def unfolding(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """What `unfold` needs to turn a convolution into a matrix product: kernel size, dilation, padding, stride; () otherwise."""
    if not isinstance(module, nn.Conv2d):
        return ()
    padding = module.padding if isinstance(module.padding, tuple) else ()
    return module.kernel_size, module.dilation, padding, module.stride
