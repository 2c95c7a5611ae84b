"""Orthogonal matrices that spread every input over all outputs, and that are quick to multiply with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) (B (x) S) with S the Sylvester Hadamard matrix of the largest power of two in the width, over its root.

    B is 1 where the width is a power of two, else a random orthogonal matrix of its odd part. Random signs before a Hadamard
    matrix are those of QuIP# (arXiv 2402.04396); it takes tabulated matrices for the odd part, which exist for few widths.
    """

    signs: Float64[Tensor, "K"]
    block: Float64[Tensor, "m m"]

    @staticmethod
    def random(width: int, seed: int) -> Rotation:
        generator = torch.Generator().manual_seed(seed)
        odd = width
        while odd % 2 == 0:
            odd //= 2
        signs = torch.randint(0, 2, (width,), generator=generator).double().mul_(2).sub_(1)
        upright, triangle = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        return Rotation(signs, (upright * triangle.diagonal().sign()).contiguous())  # uniform over all orthogonal matrices

    @property
    def width(self) -> int:
        return len(self.signs)

    def rows(self, x: Float[Tensor, "... K"]) -> Float64[Tensor, "... K"]:
        """x R in float64, where rows that are longer than R by a whole factor turn piece by piece."""
        m = len(self.block)
        p, q = (sylvester(side) for side in _sides(self.width // m))
        turned = (x.double().contiguous().view(-1, self.width) * self.signs).view(-1, len(q)) @ q
        turned = p @ turned.view(-1, len(p), len(q))
        turned = self.block.t() @ turned.view(-1, m, self.width // m)
        return turned.view(x.shape)

    def columns(self, W: Float[Tensor, "N K"]) -> Float64[Tensor, "N K"]:
        """R^T W, or its pieces one below the other."""
        return self.rows(W.t()).t()


def _sides(n: int) -> tuple[int, int]:
    """Two powers of two near its root: two small products instead of a large one, 128 multiplications for 4096."""
    low = n.bit_length() // 2
    return 2**low, n // 2**low


def sylvester(n: int) -> Float64[Tensor, "n n"]:
    """The symmetric orthogonal matrix of +-n^-1/2, for a power of two."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(n)
