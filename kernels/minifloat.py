"""Numbers of few bits - sign, exponent, mantissa - as codes: their bit patterns, so that code 0 is zero.

Every binary exponent has as many of them, so steps grow with size; the smallest exponent reaches down to zero in even steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Form = Literal["int", "e2m1", "e4m3"]  # what codes stand for: whole numbers above a zero point, or one of the forms below
MANTISSA, BIAS = 23, 127  # of float32


@dataclass(frozen=True)
class Minifloat:
    """Bits of the exponent and of the mantissa, and the largest number; exponents are stored plus `bias`."""

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def smallest_normal(self) -> float:
        """Below it steps no longer shrink."""
        return 2.0 ** (1 - self.bias)

    @property
    def step(self) -> float:
        """The smallest number above zero."""
        return self.smallest_normal / (1 << self.mantissa)


FORMS = MappingProxyType({"e2m1": Minifloat(2, 1, 6.0), "e4m3": Minifloat(4, 3, 448.0)})


def rounded(x: Float[Tensor, "*S"], form: Form) -> Float[Tensor, "*S"]:
    """The number of the form that is nearest to each x, in float32; the one with an even code of two, the largest beyond it."""
    kind = FORMS[form]
    x = x.clamp(-kind.largest, kind.largest)
    cut = MANTISSA - kind.mantissa  # bits of a float32 that go; adding half of the last that stays carries into the exponent
    bits = x.view(torch.int32)
    normal = (((bits >> cut) & 1) + bits + ((1 << (cut - 1)) - 1)) & (-1 << cut)
    return torch.where(x.abs() < kind.smallest_normal, torch.round(x / kind.step) * kind.step, normal.view(torch.float32))


def codes_of(values: Float[Tensor, "*S"], form: Form) -> UInt8[Tensor, "*S"]:
    """The codes of numbers that `rounded` gave; a negative zero counts as zero."""
    kind = FORMS[form]
    size = values.abs()
    first = (BIAS - kind.bias) << kind.mantissa  # where a float32's exponent of the form's exponent 0 lies
    normal = (size.view(torch.int32) >> (MANTISSA - kind.mantissa)) - first
    even = (size / kind.step).int()
    code = torch.where(size < kind.smallest_normal, even, normal)
    return (code + ((values < 0).int() << (kind.bits - 1))).to(torch.uint8)


def values_of(codes: UInt8[Tensor, "*S"], form: Form) -> Float[Tensor, "*S"]:
    """The numbers that codes stand for, in float32. Inverse of `codes_of`."""
    return numbers(form, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def numbers(form: Form, device: torch.device | None = None) -> Float[Tensor, "L"]:
    """The number of every code; e4m3 has two, with all bits set but the sign, that are none."""
    kind = FORMS[form]
    code = torch.arange(1 << (kind.bits - 1), device=device)
    exponent, mantissa = code >> kind.mantissa, code & ((1 << kind.mantissa) - 1)
    fraction = torch.where(exponent > 0, 1, 0) + mantissa / (1 << kind.mantissa)
    sizes = torch.ldexp(fraction, exponent.clamp(min=1) - kind.bias).float()
    sizes[sizes > kind.largest] = torch.nan
    return torch.cat([sizes, -sizes])
