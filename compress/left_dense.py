"""How much of a model stays dense that nobody asked to leave dense, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

UNASKED = 0.05  # of a model's parameters: more is said
ASKED = frozenset({"outside the blocks", "output layer", "tied weight", "chooses experts", "skipped by request", "dense by plan"})


def warnings(model: nn.Module, dense: Mapping[str, str]) -> Iterator[str]:
    """Say how much stays dense for reasons that are none of the user's, where that is much; `dense` has the reasons by module."""
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: _numel(model, name) for name, why in dense.items() if why not in ASKED}
    share = sum(sizes.values()) / max(total, 1)
    if share > UNASKED:
        largest = max(sizes, key=sizes.__getitem__)
        reasons = ", ".join(dict.fromkeys(dense[name] for name in sorted(sizes, key=sizes.__getitem__, reverse=True)))
        yield (
            f"{share:.0%} of the parameters stay dense although nobody asked for that: {len(sizes)} modules, the largest of them "
            f"{largest}. Why: {reasons}."
        )


def _numel(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
