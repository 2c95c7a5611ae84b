"""What a user can choose about solving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.errors import CompressError

Order = Literal["act", "group", "natural"]


@dataclass(frozen=True)
class Options:
    """Settings of the solvers; each default was chosen by measurement (benchmarks/defaults.py).

    `order` is the order in which GPTQ visits the inputs: "act" by falling Hessian diagonal with scales fixed beforehand,
    "group" the same but group by group (GAR, arXiv 2505.14638) with scales fitted on the updated weights, "natural" as
    stored, also with updated weights. None of them needs anything stored. `candidates` is how many ranges the scale search
    tries per group, `damping` the fraction of H's mean diagonal that is added to it.
    """

    order: Order = "act"
    damping: float = 0.01
    candidates: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise CompressError(
                f"damping is {self.damping}; it is a fraction of the Hessian's mean diagonal, above 0 and at most 1."
            )
