"""Mistakes in the arguments of a verb that can be seen without torch, which takes seconds to import.

The verbs call these checks, and so does the command line, before the verbs are imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress import folders, skips
from compress.errors import CompressError, refuse
from compress.mixed.choices import options_of
from compress.mixed.limits import Budget
from compress.spec import Grid, Plan, Scheme, Sparsity


def quantized(
    *,
    bits: int | str | None,
    group_size: int | None,
    symmetric: bool,
    grid: Grid,
    avg_bits: float | None,
    size: str | int | None,
    max_kl: float | None,
    max_ppl_increase: str | float | None,
    pins: Sequence[str],
    library: str | Path | None,
    rotate: bool,
    plan: str | Path | Plan | None,
    skip: Sequence[str],
    model: str | Path | None,
    out: str | Path | None,
    overwrite: bool,
    **_others: Any,
) -> Scheme | None:
    """Check arguments of `quantize`; returns the scheme of a uniform plan, None where a budget has one searched."""
    folders.check(model, out, overwrite)
    skips.patterns(skip)
    budgets = dict(avg_bits=avg_bits, size=size, max_kl=max_kl, max_ppl_increase=max_ppl_increase)
    searched = any(budget is not None for budget in budgets.values())
    _check_searched(searched, plan=plan, pins=pins, library=library, grid=grid, rotate=rotate)
    if plan:
        every = {"--bits": bits is not None, "--group-size": group_size is not None}
        every |= {"--asymmetric": not symmetric, f"--grid {grid}": grid != "int"}
        refuse(every, "The plan says what every layer becomes")
        if not isinstance(plan, Plan):
            Plan.load(plan)
    if searched:
        Budget.of(avg_bits, size, max_kl=max_kl, max_ppl_increase=max_ppl_increase)
        options_of(bits, Scheme.group_size if group_size is None else group_size, symmetric, ())
        return None
    return Scheme.of(grid, _one(bits), group_size, symmetric)


def searched(
    *,
    bits: str | int | Sequence[int] | None,
    group_size: str | int | Sequence[int],
    symmetric: bool,
    sparsity: str | Sequence[str | float],
    avg_bits: float | None,
    size: str | int | None,
    latency: str | float | None,
    bops: str | float | None,
    avg_sparsity: float | None,
    max_kl: float | None,
    max_ppl_increase: str | float | None,
    method: str,
    proxy: str | Path | None,
    skip: Sequence[str],
    model: str | Path | None,
    **_others: Any,
) -> None:
    """Check arguments of `search`."""
    if proxy is not None and method != "emq":
        raise CompressError(f"--proxy is for method emq, not for {method}.")
    folders.check(model, None, overwrite=False)
    skips.patterns(skip)
    Budget.of(avg_bits, size, latency, bops, avg_sparsity, max_kl, max_ppl_increase)
    options_of(bits, group_size, symmetric, sparsity)


def pruned(
    *,
    sparsity: float | None,
    pattern: str,
    bits: int | None,
    group_size: int,
    symmetric: bool,
    skip: Sequence[str],
    model: str | Path | None,
    out: str | Path | None,
    overwrite: bool,
    **_others: Any,
) -> tuple[Sparsity, Scheme | None]:
    """Check arguments of `prune`; returns its zeros, and its grid if it has one."""
    folders.check(model, out, overwrite)
    skips.patterns(skip)
    return Sparsity.of(pattern, sparsity), None if bits is None else Scheme(bits, group_size, symmetric)


def _check_searched(
    searched: bool,
    *,
    plan: str | Path | Plan | None,
    pins: Sequence[str],
    library: str | Path | None,
    grid: Grid,
    rotate: bool,
) -> None:
    """Raise for arguments that do not go together with a budget, or with none."""
    if not searched and (pins or library):
        raise CompressError("--pin and --library are for a search; give a budget too, such as --avg-bits 3.5.")
    if not searched:
        return
    if plan:
        raise CompressError("A plan is given, and a budget to search one for; give one of them.")
    if grid != "int":
        raise CompressError(f"A search chooses among bits of grid int; leave out --grid {grid}, or the budget.")
    if rotate:
        raise CompressError("--rotate is judged at the bits of a plan; leave it out of a search, and use it with the plan found.")


def _one(bits: int | str | None) -> int | None:
    """The bits of a uniform plan, None where they were not asked for."""
    try:
        return None if bits is None else int(bits)
    except ValueError:
        raise CompressError(
            f"--bits is {bits}; it is one number, and several are for a budget to choose from, such as --avg-bits 3.5."
        ) from None
