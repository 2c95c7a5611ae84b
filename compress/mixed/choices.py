"""The options of every layer as people write them: lists of bits, group sizes and sparsities; nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from compress.errors import CompressError, refuse
from compress.spec import BITS, LayerSpec, Scheme, Sparsity


def options_of(
    bits: str | int | Sequence[int] | None,
    group_size: str | int | Sequence[int],
    symmetric: bool,
    sparsity: str | Sequence[str | float],
) -> tuple[LayerSpec, ...]:
    """List every combination that a layer may take; raises for values out of range, and where there is only one."""
    zeros: list[Sparsity | None] = [_sparsity(str(one)) for one in _listed(sparsity)]
    widths = numbers(bits, "--bits") if bits is not None else [] if zeros else list(BITS)
    groups = numbers(group_size, "--group-size")
    if not widths:
        unused = {"--group-size": groups != [Scheme.group_size], "--asymmetric": not symmetric}
        refuse(unused, "Sparsities without --bits put no weight on a grid")
    schemes: list[Scheme | None] = [Scheme(width, group, symmetric) for width, group in product(widths, groups)]
    options = tuple(dict.fromkeys(LayerSpec(scheme, level) for scheme, level in product(schemes or [None], zeros or [None])))
    if len(options) < 2:
        shown = ", ".join(map(str, options))
        raise CompressError(f"There is nothing to choose from but {shown}; give several --bits, group sizes or sparsities.")
    return options


def _sparsity(text: str) -> Sparsity | None:
    """0 is none, 0.5 unstructured, 2:4 a pattern, and 0.5 block:1x4 both."""
    fraction, _, pattern = text.partition(" ") if " " in text else ("", "", text) if ":" in text else (text, "", "")
    try:
        value = float(fraction) if fraction else None
    except ValueError:
        raise CompressError(f"--sparsity {text!r} is not a fraction such as 0.5, or a pattern such as 2:4.") from None
    if pattern == "row":
        raise CompressError(
            f"--sparsity {text!r}: pattern row makes layers smaller and cannot be searched; see `compress prune`."
        )
    return None if value == 0 else Sparsity.of(pattern or "unstructured", value)


def _listed(value: str | Sequence[str | float]) -> list[str | float]:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)


def numbers(value: str | int | Sequence[int], name: str) -> list[int]:
    """A list of whole numbers, "2,3,4"; `name` is the flag's, for the error."""
    parts = [value] if isinstance(value, int) else re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise CompressError(f"{name} {value!r} is not a list of whole numbers with commas between them.") from None
