"""Patterns of layers to leave dense: read, and held against the layers that a model has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from compress.errors import CompressError

SHOWN = 4  # layers of different kinds that an error names


def patterns(skip: Sequence[str]) -> list[re.Pattern[str]]:
    """Compile regular expressions that are searched in names of layers; raises for one that is none."""
    try:
        return [re.compile(one) for one in skip]
    except re.error as error:
        raise CompressError(f"--skip {error.pattern!r} is not a regular expression: {error}.") from error


def check(skip: Sequence[re.Pattern[str]], names: Sequence[str]) -> None:
    """Raise for a pattern that matches none of the model's layers `names`: what it meant to protect would be compressed."""
    for pattern in skip:
        if not any(map(pattern.search, names)):
            kinds = {name.rpartition(".")[2]: name for name in reversed(names)}
            shown = ", ".join(list(kinds.values())[::-1][:SHOWN])
            raise CompressError(f"--skip {pattern.pattern!r} matches no layer of the model. It has layers such as {shown}.")


def needless(skip: Sequence[str], layers: Mapping[str, str], reason: str) -> Iterable[str]:
    """Say which patterns match only dense `layers` whose reason is not `reason`, that is, layers that stay dense anyway."""
    for pattern in patterns(skip):
        matched = {name: why for name, why in layers.items() if pattern.search(name)}
        if reason not in matched.values() and matched:
            name, why = next(iter(matched.items()))
            others = f" and {len(matched) - 1} more" if len(matched) > 1 else ""
            yield f"--skip {pattern.pattern!r} changes nothing: {name}{others} would stay dense without it ({why})."
