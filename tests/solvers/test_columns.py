"""The column loop as launches of a kernel against the same loop one column at a time."""

from __future__ import annotations

import pytest
import torch

from compress.calib.stats import LayerStats
from compress.kernels import dispatch
from compress.solvers import columns, gptq, solve
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme, Sparsity
from tests.solvers.problem import layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")


def problem(N, K, seed=0):
    W, stats = layer(N, K, seed)
    return W.to(DEVICE), LayerStats(stats.H.to(DEVICE), stats.tokens)


def both_ways(monkeypatch, run):
    """What `run` gives without and with the kernel, and how many columns every launch had."""
    widths = []
    launch = columns.Columns._launch
    monkeypatch.setattr(columns.Columns, "_launch", lambda self, a, b: widths.append(b - a) or launch(self, a, b))
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(columns, "has_kernel", lambda _, kernel=kernel: kernel)
        assert not widths
        found.append(run())
    return *found, widths


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "order", "K", "widths"),
    [
        (Scheme(4, 32), "group", 96, [32] * 3),
        (Scheme(4, 8), "group", 40, [8] * 5),
        (Scheme(3, 24, symmetric=False), "natural", 48, [24] * 2),
        (Scheme(4, 24), "act", 72, [72]),
        (Scheme(2, -1), "group", 80, [80]),
        (Scheme(2, 16), "act", 144, [64, 80]),
        pytest.param(Scheme(8, 256), "group", 256, [128] * 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_codes_equal_the_plain_loops(monkeypatch, scheme, order, K, widths):
    W, stats = problem(18, K)
    plain, fused, seen = both_ways(monkeypatch, lambda: gptq.solve(W, stats, scheme, torch.float16, Options(order=order)))
    assert seen == widths
    assert torch.equal(fused.codes, plain.codes)
    assert torch.equal(fused.scales, plain.scales)
    assert torch.equal(fused.zeros, plain.zeros)
    torch.testing.assert_close(fused.error, plain.error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(Scheme(4, 32), Sparsity(0.5, "2:4")),
        LayerSpec(sparsity=Sparsity(0.5)),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_goes_column_by_column(monkeypatch, spec):
    W, stats = problem(8, 64)
    monkeypatch.setattr(columns, "has_kernel", lambda _: True)
    monkeypatch.setattr(columns.Columns, "_launch", lambda *_: pytest.fail("launched"))
    assert solve(W, stats, spec, torch.float16, Options(), pruner="sparsegpt").error is not None


def test_a_cpu_has_no_kernel():
    assert not columns.has_kernel(torch.device("cpu"))
