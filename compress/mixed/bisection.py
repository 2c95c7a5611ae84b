"""The cheapest choice whose measured loss is at most a target, in few measurements (the search of arXiv 2302.01382, 2306.04879).

Their abstracts name the search; how it proceeds here is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Measure = Callable[[list[int]], float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Found:
    """A choice, its loss by the measure that counts, and how many measurements of both kinds that took."""

    choice: list[int]
    loss: float
    evaluations: int


class OutOfReach(ValueError):  # noqa: N818 - it is about the target
    """Even the most precise choice measures `loss`, more than the target."""

    def __init__(self, loss: float, target: float) -> None:
        self.loss, self.target = loss, target
        super().__init__(f"the most precise choice measures {loss:g}, more than the target {target:g}")


def bisect(
    order: Sequence[int], ladders: Sequence[Sequence[int]], measure: Measure, target: float, verify: Measure | None = None
) -> Found:
    """Lower the least sensitive units, as many as the target allows; then lower these further, and so on.

    `order` lists the units from least to most sensitive, `ladders[u]` unit u's options from most to least precise: one where it
    is pinned. Step s finds, in O(log L) measurements, how many of the units lowered in step s - 1 can go from rung s to s + 1.
    `verify`, by default `measure`, is what must be at most `target` in the end: a better measurement of the same loss. Until
    it is, the last lowered unit goes up again, one by one. No choice is measured twice. Raises `OutOfReach`.
    """
    quick, last = _Memo(measure), _Memo(verify) if verify else None
    checked = last or quick
    rungs = [0] * len(ladders)
    lowered: list[int] = []
    able = [u for u in order if len(ladders[u]) > 1]
    if (loss := checked(_choice(ladders, rungs))) > target:
        raise OutOfReach(loss, target)
    while able:
        steps = [_down(rungs, able[:k]) for k in range(len(able) + 1)]
        count = _most([_choice(ladders, step) for step in steps[1:]], lambda choice: quick(choice) <= target)
        rungs, able = steps[count], able[:count]
        lowered += able
        able = [u for u in able if len(ladders[u]) > rungs[u] + 1]
    while (loss := checked(_choice(ladders, rungs))) > target:
        rungs[lowered.pop()] -= 1
    return Found(_choice(ladders, rungs), loss, len(quick.known) + (len(last.known) if last else 0))


def smallest(plans: Sequence[Sequence[int]], measure: Measure, target: float, verify: Measure | None = None) -> Found:
    """The first of `plans`, choices from cheapest to dearest such as the knapsack's frontier, that meets the target.

    O(log plans) measurements, exact where loss falls with cost. `verify` as in `bisect`: until it is met, the next dearer plan.
    """
    quick, last = _Memo(measure), _Memo(verify) if verify else None
    checked = last or quick
    skipped = _most(plans, lambda plan: quick(list(plan)) > target)
    for plan in plans[skipped:]:
        if (loss := checked(list(plan))) <= target:
            return Found(list(plan), loss, len(quick.known) + (len(last.known) if last else 0))
    loss = checked(list(plans[-1]))
    raise OutOfReach(loss, target)


def _most(choices: Sequence[_T], holds: Callable[[_T], bool]) -> int:
    """How many of the choices come before the first for which `holds` does not, if it then never does again."""
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(choices[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return low


def _choice(ladders: Sequence[Sequence[int]], rungs: Sequence[int]) -> list[int]:
    return [ladder[rung] for ladder, rung in zip(ladders, rungs, strict=True)]


def _down(rungs: Sequence[int], units: Sequence[int]) -> list[int]:
    found = list(rungs)
    for u in units:
        found[u] += 1
    return found


@dataclass
class _Memo:
    measure: Measure
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __call__(self, choice: list[int]) -> float:
        key = tuple(choice)
        if key not in self.known:
            self.known[key] = self.measure(list(choice))
        return self.known[key]
