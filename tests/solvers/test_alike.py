"""Layers of one shape that are solved at once come out as if each had been solved alone."""

from __future__ import annotations

import pytest
import torch

from compress.calib.stats import LayerStats
from compress.solvers import solve, solve_alike
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme, Sparsity

SPECS = {
    "quantized": LayerSpec(Scheme(3, 16)),
    "asymmetric": LayerSpec(Scheme(3, 16, False)),
    "pruned": LayerSpec(None, Sparsity(0.5)),
    "both": LayerSpec(Scheme(4, 16), Sparsity(0.5, "2:4")),
}


@pytest.mark.parametrize("options", [Options(), Options.of("default")], ids=["fast", "default"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layers_solved_at_once_are_what_each_is_alone(spec, options):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(24, 32, generator=generator) for _ in range(5)]
    inputs = [torch.randn(100, 32, generator=generator) @ torch.randn(32, 32, generator=generator) for _ in range(3)]
    stats = [*(LayerStats(x.t() @ x / len(x), len(x)) for x in inputs), None, LayerStats(torch.zeros(32, 32), 100)]
    given = (spec, torch.float32, options)
    before = [W.clone() for W in weights]
    for found, W, known in zip(solve_alike(weights, stats, *given), weights, stats, strict=True):
        alone = solve(W, known, *given)
        assert type(found) is type(alone)
        assert found.notes == alone.notes
        for part, value in vars(alone).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(getattr(found, part), value), part
    assert all(torch.equal(W, old) for W, old in zip(weights, before, strict=True))
