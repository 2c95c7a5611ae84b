"""Budgets as people write them: sizes with units, fractions and percentages; nothing here imports torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from compress.errors import CompressError

NUMBER = r"(\d+\.?\d*|\.\d+)"
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FEWEST_BYTES = 10**4  # of a size without a unit: no model is as small, and who writes less forgot the unit


@dataclass(frozen=True)
class Budget:
    """At most this much; None does not matter.

    `avg_bits` counts codes, scales and zero points over the weights of the layers that can be compressed, `size` is the bytes of
    the weight files with everything in them, `latency` the part of the dense layers' time, `bops` that of their bit operations
    (multiply-accumulates x bits of the weight x bits of the input, HAWQ-v3, arXiv 2011.10680), `avg_sparsity` the least part of
    zeros. `max_kl` (nats) and `max_ppl_increase` (a fraction) are measured, and the smallest plan that keeps them is wanted.
    """

    avg_bits: float | None = None
    size: int | None = None
    latency: float | None = None
    bops: float | None = None
    avg_sparsity: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.given == ():
            flags = ", ".join(flag(one.name) for one in fields(self))
            raise CompressError(f"There is no budget: give one or several of {flags}.")
        for name in self.given:
            if not 0 < getattr(self, name) < math.inf:
                raise CompressError(f"{flag(name)} is {getattr(self, name):g}; it must be a number above 0.")
        if self.avg_sparsity is not None and self.avg_sparsity >= 1:
            meant = f" Did you mean {self.avg_sparsity / 100:g}?" if 1 < self.avg_sparsity < 100 else ""
            raise CompressError(f"--avg-sparsity is {self.avg_sparsity:g}; it is a fraction of the weights, below 1.{meant}")
        if self.max_kl is not None and self.max_ppl_increase is not None:
            raise CompressError("--max-kl and --max-ppl-increase are both targets of quality; give one of them.")

    @staticmethod
    def of(
        avg_bits: float | None = None,
        size: str | int | None = None,
        latency: str | float | None = None,
        bops: str | float | None = None,
        avg_sparsity: float | None = None,
        max_kl: float | None = None,
        max_ppl_increase: str | float | None = None,
    ) -> Budget:
        """Read a budget as people write it: sizes with units, parts as 0.7x or 70%."""
        return Budget(
            avg_bits=avg_bits,
            size=None if size is None else parse_size(str(size)),
            latency=None if latency is None else parse_fraction(str(latency), "latency"),
            bops=None if bops is None else parse_fraction(str(bops), "bops"),
            avg_sparsity=avg_sparsity,
            max_kl=max_kl,
            max_ppl_increase=None if max_ppl_increase is None else parse_fraction(str(max_ppl_increase), "max_ppl_increase"),
        )

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is not None)

    @property
    def measured(self) -> bool:
        """Whether quality is the limit, and not size."""
        return self.max_kl is not None or self.max_ppl_increase is not None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_size(text: str) -> int:
    """Bytes of "2.1GB", "700 MiB" or a plain number."""
    found = re.fullmatch(rf"\s*{NUMBER}\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in SIZES:
        raise CompressError(f"--size {text!r} is no size; write 2.1GB, 700MB or a number of bytes.")
    nbytes = round(float(found[1]) * SIZES[found[2].upper()])
    if not found[2] and (nbytes < FEWEST_BYTES or not float(found[1]).is_integer()):
        raise CompressError(f"--size {text!r} has no unit and would be bytes. Did you mean {found[1]}GB or {found[1]}MB?")
    return nbytes


def parse_fraction(text: str, name: str) -> float:
    """0.7 of "0.7x", "70%" or "0.7"."""
    found = re.fullmatch(rf"\s*{NUMBER}\s*([x%]?)\s*", text)
    if found is None:
        raise CompressError(f"{flag(name)} {text!r} is no fraction; write 0.7x, 70% or 0.7.")
    return float(found[1]) / (100 if found[2] == "%" else 1)
