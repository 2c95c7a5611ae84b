"""What a user can choose about solving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.errors import CompressError

Order = Literal["act", "group", "natural"]


@dataclass(frozen=True)
class Options:
    """Settings of the solvers; each default was chosen by measurement (benchmarks/defaults.py).

    `order` is the order in which GPTQ visits the inputs: "group" by falling Hessian diagonal, group by group, with scales
    fitted on the updated weights (GAR, arXiv 2505.14638), "act" by falling diagonal across groups with scales fixed
    beforehand, "natural" as stored, also with updated weights. None of them needs anything stored. `candidates` is how many
    ranges the scale search tries per group, `damping` the fraction of H's mean diagonal that is added to it. `refit` moves
    the weights that pruning leaves to their least-squares optimum.
    """

    order: Order = "group"
    damping: float = 0.01
    candidates: int = 8
    refit: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise CompressError(
                f"damping is {self.damping}; it is a fraction of the Hessian's mean diagonal, above 0 and at most 1."
            )
