"""Passes whose linear layers multiply bfloat16 factors, for calibration that stands it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from compress.linalg import narrowed


class Narrow(nn.Linear):
    """A linear layer with `narrowed` factors; all between such layers stays in the input's dtype."""

    def forward(self, x: Float[Tensor, "*M K"]) -> Float[Tensor, "*M N"]:
        """x W^T + b."""
        bias = None if self.bias is None else narrowed(self.bias)
        return nn.functional.linear(narrowed(x), narrowed(self.weight), bias).to(x.dtype)


def narrow_(block: nn.Module) -> None:
    """Have all linear layers of a block multiply as `Narrow`; on their own weights, in place.

    What reaches a layer then has errors of 0.2 %, beside the several percent that rounding the layers before it to 4 bits makes.
    KL to the dense model, of three small models: -0.4 to +1.2 % at 4, 3 and 2 bits, but +10 % and more at 8 (2026-11-22).
    """
    for module in block.modules():
        if type(module) is nn.Linear:
            module.__class__ = Narrow
