"""What a user can choose about solving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import CompressError

Order = Literal["act", "group", "natural"]
Effort = Literal["fast", "default", "best"]

SWEEPS = 2  # of effort default; 8 lower KL by another 2 % at 2 bits and by nothing certain at 3 and 4
ROUNDS = 3  # of effort best: KL is 3 % lower than with 1 at 3 bits


@dataclass(frozen=True)
class Options:
    """Settings of the solvers; each was chosen by measurement (benchmarks/defaults.py). As they stand here they are effort fast.

    `order` is the order in which GPTQ visits the inputs: "group" by falling Hessian diagonal, group by group, with scales
    fitted on the updated weights (GAR, arXiv 2505.14638), "act" by falling diagonal across groups with scales fixed
    beforehand, "natural" as stored, also with updated weights. None of them needs anything stored. `candidates` is how many
    ranges the scale search tries per group, `damping` the fraction of H's mean diagonal that is added to it. `refit` moves
    the weights that pruning leaves to their least-squares optimum. `sweeps` is how many times at most coordinate descent goes
    over the codes and scales of a solved layer. `corrected` solves every layer for the outputs of the dense model, not only for
    its own on the inputs that it gets. `coupled` weighs the errors of a layer's outputs, and pairs of them, by what they do to
    the model's loss, which takes a backward pass. `keep_zeros` leaves the zeros of a layer that is pruned already where they are.
    """

    order: Order = "group"
    damping: float = 0.01
    candidates: int = 8
    refit: bool = True
    sweeps: int = 0
    corrected: bool = False
    coupled: bool = False
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise CompressError(
                f"damping is {self.damping}; it is a fraction of the Hessian's mean diagonal, above 0 and at most 1."
            )

    @staticmethod
    def of(effort: Effort, **others: Any) -> Options:
        """Of "fast", GPTQ alone; "default", which corrects its target and descends from its result; "best": coupled, too."""
        if effort == "fast":
            return Options(**others)
        if effort == "default":
            return Options(sweeps=SWEEPS, corrected=True, **others)
        if effort == "best":
            return Options(sweeps=ROUNDS, corrected=True, coupled=True, **others)
        raise CompressError(f"There is no effort {effort}; choose fast, default or best.")
