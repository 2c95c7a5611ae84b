"""Statistics and benches as arrays, without a model."""

from __future__ import annotations

import numpy as np

from compress.proxies.bench import Bench
from compress.proxies.formula import parse
from compress.proxies.operations import INPUTS, SIDE
from compress.proxies.sampling import stratified
from compress.proxies.statistics import BY_OPTION, TOTALS, Statistics, scores

L, O = 3, 4  # noqa: E741 - layers and options
BITS = np.tile(np.array([2.0, 3.0, 4.0, 8.0]), (L, 1))
WEIGHTS = np.array([100.0, 2000.0, 30.0])


def tensors(seed: int = 0, layers: int = L) -> dict[str, np.ndarray]:
    """Every input in its own shape, with the signs it may have."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, about in INPUTS.items():
        rows, columns = {"A": (1, SIDE), "D": (SIDE, 1), "O": (SIDE, 1)}.get(name, (SIDE, SIDE))
        value = draw.standard_normal((layers, O if about.by_option else 1, rows, columns))
        found[name] = (np.abs(value) if about.nonnegative else value).astype(np.float32)
    return found


def bench(seed: int = 0, formula: str = "sum(square(D) * square(O))", configurations: int = 60, layers: int = 12) -> Bench:
    """A bench of arrays whose losses are what a formula says, times noise; layers are units, and sizes come in bands."""
    draw = np.random.default_rng(seed)
    inputs = tensors(seed, layers)
    bits = np.tile(np.array([2.0, 3.0, 4.0, 8.0]), (layers, 1))
    for name in "EO":
        inputs[name] = inputs[name] * (2.0 ** -bits[:, :, None, None]).astype(np.float32)
    inputs["D"] = inputs["D"] * draw.lognormal(0, 1.5, (layers, 1, 1, 1)).astype(np.float32)
    weights = draw.integers(100, 1000, layers).astype(float)
    totals = {name: draw.random((layers, 4) if name in BY_OPTION else layers) for name in TOTALS}
    names = tuple(f"layer {i}" for i in range(layers))
    statistics = Statistics(names, np.arange(layers), weights, bits, inputs, totals)
    costs = bits * weights[:, None]
    choices, bands = stratified(costs, 5, configurations // 5, draw)
    table = parse(formula).table(inputs, weights, bits)
    losses = scores(statistics.by_unit(table), choices) * draw.lognormal(0, 0.02, len(choices))
    average = costs[np.arange(layers), choices].sum(1) / weights.sum()
    key = f"key {seed} {formula}"
    return Bench(f"bench {seed}", key, names, ("2", "3", "4", "8"), choices, bands, average, losses, statistics, {})
