"""What a plan reached of every budget that was given, and which of them decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.mixed.budget import Cost
from compress.mixed.choose import Measured
from compress.mixed.limits import Budget, flag


@dataclass(frozen=True)
class Kept:
    """A budget by its flag, what it allows and what the plan takes of it, in words, and whether it decided the plan."""

    flag: str
    asked: str
    reached: str
    binds: bool

    def __str__(self) -> str:
        return f"{self.flag} {self.asked}: {self.reached} reached{', which decides' if self.binds else ''}"


def kept(budget: Budget, currencies: Sequence[Cost], choice: Sequence[int], measured: Measured) -> tuple[Kept, ...]:
    """List the budgets that were given.

    A target of quality decides unless the smallest plan of all keeps it: no smaller plan was found that does, and limits of
    size were kept by the way. Among limits that decides of which the plan takes the largest part.
    """
    limited = [cost for cost in currencies if cost.name in budget.given]
    parts = {cost.name: cost.of(choice) / cost.limit for cost in limited}
    fullest = None if budget.measured else max(parts, key=parts.__getitem__)
    found = [Kept(flag(one.name), one.shown(one.limit), one.shown(one.of(choice)), one.name == fullest) for one in limited]
    size = currencies[0]
    decides = size.of(choice) > size.fixed + sum(map(min, size.table))
    if budget.max_kl is not None:
        found.append(Kept("--max-kl", f"{budget.max_kl:g} nats", f"{measured(choice):.4g} nats", decides))
    if budget.max_ppl_increase is not None:
        risen = measured.swaps.nll(measured.space.specs(choice)) - measured.swaps.nll({})
        found.append(Kept("--max-ppl-increase", f"{budget.max_ppl_increase:.4g}", f"{math.expm1(risen):.4g}", decides))
    return tuple(found)
