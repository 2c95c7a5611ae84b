"""What a user writes, as a Request: lists of bits, sizes in gigabytes, fractions."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from compress.errors import CompressError, refuse
from compress.latency import LatencyTable
from compress.mixed.limits import Budget, parse_fraction, parse_size
from compress.mixed.methods import EMQ, METHODS, Method, Predict
from compress.mixed.search import Request
from compress.models import device
from compress.spec import BITS, LayerSpec, Scheme, Sparsity

CACHE = "compress-toolkit"
MOST_ACTIVATION_BITS = 16


def request(
    out: Path,
    *,
    bits: str | int | Sequence[int] | None = None,
    group_size: str | int | Sequence[int] = 128,
    symmetric: bool = True,
    sparsity: str | Sequence[str | float] = (),
    avg_bits: float | None = None,
    size: str | int | None = None,
    latency: str | float | None = None,
    latency_table: str | Path | None = None,
    bops: str | float | None = None,
    activation_bits: int | None = None,
    avg_sparsity: float | None = None,
    max_kl: float | None = None,
    max_ppl_increase: str | float | None = None,
    method: Method = "kl",
    predict: Predict | None = None,
    pins: Sequence[str] = (),
    refine: int = 0,
    verify: bool = False,
    all_pairs: bool = False,
    library: str | Path | None = None,
    seed: int = 0,
    on: str | None = None,
) -> Request:
    """A request from arguments as `compress.search` takes them; raises for those that make no sense."""
    if method not in METHODS and (method != EMQ or predict is None):
        raise CompressError(f"There is no method {method}; choose one of {', '.join((*METHODS, EMQ))}.")
    refuse({"--all-pairs": all_pairs and method != "interlayer"}, f"Method {method} measures no pairs")
    if activation_bits is not None and not 2 <= activation_bits <= MOST_ACTIVATION_BITS:
        raise CompressError(f"--activation-bits is {activation_bits}; choose 2 to {MOST_ACTIVATION_BITS}.")
    if refine < 0:
        raise CompressError(f"--refine is {refine}; it is a number of generations.")
    if refine and (max_kl is not None or max_ppl_increase is not None):
        raise CompressError("--refine lowers the loss within a limit of size; leave it out with a target of quality.")
    budget = Budget(
        avg_bits=avg_bits,
        size=None if size is None else parse_size(str(size)),
        latency=None if latency is None else parse_fraction(str(latency), "latency"),
        bops=None if bops is None else parse_fraction(str(bops), "bops"),
        avg_sparsity=avg_sparsity,
        max_kl=max_kl,
        max_ppl_increase=None if max_ppl_increase is None else parse_fraction(str(max_ppl_increase), "max_ppl_increase"),
    )
    table = None if latency_table is None else LatencyTable.load(latency_table, device(on))
    options = _options(bits, group_size, symmetric, sparsity)
    return Request(
        budget=budget,
        options=options,
        library=Path(library or default_library()),
        out=out,
        method=method,
        predict=predict,
        pins=pins,
        refine=refine,
        verify=verify,
        all_pairs=all_pairs,
        times=table,
        activation_bits=activation_bits,
        seed=seed,
    )


def default_library() -> Path:
    """Where solved layers are kept between runs; the folder may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE / "library"


def _options(
    bits: str | int | Sequence[int] | None,
    group_size: str | int | Sequence[int],
    symmetric: bool,
    sparsity: str | Sequence[str | float],
) -> tuple[LayerSpec, ...]:
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
