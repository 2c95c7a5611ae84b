"""How fit a formula is: how well it ranks the configurations of benches, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

import numpy as np
from jaxtyping import Float

from compress.proxies.bench import Bench
from compress.proxies.formula import Formula
from compress.proxies.operations import INPUTS
from compress.proxies.ranking import spearman, within
from compress.proxies.statistics import Statistics, scores

SCREENED_LAYERS = 4

Evaluate = Callable[[Sequence[Formula]], list[float | None]]


def scored(formula: Formula, bench: Bench) -> Float[np.ndarray, "C"] | None:
    """The scores of a bench's configurations; None where any is not finite."""
    s = bench.statistics
    table = formula.table(s.tensors, s.weights, s.bits)
    return scores(s.by_unit(table), bench.choices) if np.isfinite(table).all() else None


def fitness_of(formula: Formula, benches: Sequence[Bench]) -> float | None:
    """The mean over benches of Spearman's correlation with the loss, half over all and half within size bands.

    EMQ (arXiv 2307.10554) has the first alone, which the sizes of configurations explain in good part. None where the formula is
    not finite on a bench, or ranks nothing.
    """
    values = []
    for bench in benches:
        found = scored(formula, bench)
        if found is None or np.ptp(found) == 0:
            return None
        values.append((spearman(found, bench.losses) + within(found, bench.losses, bench.bands)) / 2)
    return float(np.mean(values))


def reduced(bench: Bench) -> Statistics:
    """The statistics of a few of its layers: enough to see that a formula fails."""
    s = bench.statistics
    at = np.linspace(0, len(s.layers) - 1, min(SCREENED_LAYERS, len(s.layers))).astype(int)
    return Statistics(
        layers=tuple(s.layers[i] for i in at),
        unit_of=s.unit_of[at],
        weights=s.weights[at],
        bits=s.bits[at],
        tensors={name: tensor[at] for name, tensor in s.tensors.items()},
        totals={name: total[at] for name, total in s.totals.items()},
    )


def promising(formula: Formula, screen: Sequence[Statistics]) -> bool:
    """Whether a formula can rank anything: it depends on the option, and is finite and no constant on a few layers."""
    if not formula.bits and not any(INPUTS[name].by_option for name in formula.inputs):
        return False
    for s in screen:
        table = formula.table(s.tensors, s.weights, s.bits)
        if not np.isfinite(table).all() or np.ptp(table) == 0:
            return False
    return True


@contextmanager
def evaluator(benches: Sequence[Bench], workers: int) -> Iterator[Evaluate]:
    """What evaluates many formulas at once, with the same results for any number of processes."""
    if workers == 1:
        yield partial(_evaluated, benches)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def evaluate(formulas: Sequence[Formula]) -> list[float | None]:
            chunks = [formulas[i::workers] for i in range(workers)]
            found: list[float | None] = [None] * len(formulas)
            for i, part in enumerate(pool.map(partial(_evaluated, benches), chunks)):
                found[i::workers] = part
            return found

        yield evaluate


def _evaluated(benches: Sequence[Bench], formulas: Sequence[Formula]) -> list[float | None]:
    return [fitness_of(formula, benches) for formula in formulas]
