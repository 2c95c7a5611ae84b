"""What a user writes, as a Request: lists of bits, sizes in gigabytes, fractions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compress.errors import CompressError, refuse
from compress.latency import LatencyTable
from compress.mixed.choices import options_of
from compress.mixed.limits import Budget
from compress.mixed.methods import EMQ, METHODS, Method, Predict
from compress.mixed.search import Request
from compress.models import device

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
    budget = Budget.of(
        avg_bits=avg_bits,
        size=size,
        latency=latency,
        bops=bops,
        avg_sparsity=avg_sparsity,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
    )
    table = None if latency_table is None else LatencyTable.load(latency_table, device(on))
    options = options_of(bits, group_size, symmetric, sparsity)
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
