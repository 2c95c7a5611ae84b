"""Solving by launches of kernels against the same loops one column at a time."""

from __future__ import annotations

import pytest
import torch

from compress.calib.stats import LayerStats
from compress.kernels import dispatch
from compress.solvers import coupled, fused, gptq, solve, solve_alike
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme, Sparsity
from tests.solvers.problem import layer

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(N, K, seed=0):
    W, stats = layer(N, K, seed)
    return W.to(DEVICE), LayerStats(stats.H.to(DEVICE), stats.tokens)


@pytest.fixture
def small_blocks(monkeypatch):
    """Columns take their time in the interpreter."""
    monkeypatch.setattr(fused, "BLOCK", 32)


@pytest.fixture
def both_ways(monkeypatch):
    """Runs something without and with the kernels: both results, and how many columns every launch had."""

    def run(what):
        from compress.kernels import columns, descent

        widths = []
        for module, name in ((columns, "round_columns_"), (descent, "descend_")):
            launch = getattr(module, name)

            def counted(state, matrix, start, stop, *rest, launch=launch):
                widths.append(stop - start)
                launch(state, matrix, start, stop, *rest)

            monkeypatch.setattr(module, name, counted)
        found = []
        for kernel in (False, True):
            monkeypatch.setattr(fused, "has_kernel", lambda _, kernel=kernel: kernel)
            assert not widths
            found.append(what())
        return *found, widths

    return run


def same(found, expected):
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    assert found.notes == expected.notes
    torch.testing.assert_close(found.error, expected.error, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("scheme", "order", "K", "widths"),
    [
        (Scheme(4, 16), "group", 48, [16, 32]),
        (Scheme(3, 12, symmetric=False), "natural", 48, [24, 24]),
        (Scheme(2, 8, symmetric=False), "group", 40, [16, 24]),
        (Scheme(4, 24), "act", 72, [24, 24, 24]),
        (Scheme(2, -1), "group", 40, [32, 8]),
        (Scheme(8, 48, symmetric=False), "natural", 96, [32, 16, 32, 16]),
    ],
    ids=str,
)
def test_codes_equal_the_plain_loops(both_ways, scheme, order, K, widths):
    W, stats = problem(9, K)
    plain, launched, seen = both_ways(lambda: gptq.solve(W, stats, scheme, torch.float16, Options(order=order)))
    assert seen == widths
    same(launched, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "widths"),
    [
        (Scheme(4, 128), [128, 128, 128, 128]),
        (Scheme(8, 256), [128, 128, 128, 128]),
        (Scheme(2, 32, symmetric=False), [128, 128, 128, 128]),
    ],
    ids=str,
)
def test_whole_blocks_equal_the_plain_loops(both_ways, scheme, widths):
    W, stats = problem(18, 256)
    plain, launched, seen = both_ways(lambda: gptq.solve(W, stats, scheme, torch.float16, Options(sweeps=1)))
    assert seen == widths
    same(launched, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("candidates", [1, 5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_the_search_finds(both_ways, candidates, symmetric, dtype):
    W, stats = problem(9, 48)
    W[3, 8:24] = 0
    W[5, :16] *= -1e-6
    options = Options(candidates=candidates)
    plain, launched, _ = both_ways(lambda: gptq.solve(W, stats, Scheme(3, 16, symmetric), dtype, options))
    same(launched, plain)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("scheme", "K", "widths"),
    [
        (Scheme(4, 16), 48, [16, 32, 32, 16, 32, 16]),
        (Scheme(2, 8, symmetric=False), 40, [16, 24, 32, 8, 32, 8]),
        (Scheme(3, -1), 40, [32, 8, 32, 8, 32, 8]),
    ],
    ids=str,
)
def test_descents_end_where_the_plain_ones_do(both_ways, scheme, K, widths):
    W, stats = problem(5, K)
    plain, launched, seen = both_ways(lambda: gptq.solve(W, stats, scheme, torch.float16, Options(sweeps=2)))
    assert seen == widths
    same(launched, plain)


def test_layers_of_one_shape_are_solved_as_each_alone(both_ways):
    problems = [problem(5, 32, seed) for seed in range(3)]
    problems[1][1].H.zero_()
    weights, stats = zip(*problems, strict=True)
    arguments = Scheme(3, 16), torch.float16, Options(sweeps=2)
    plain, launched, seen = both_ways(lambda: gptq.solve_alike(weights, stats, *arguments))
    assert len(seen) <= 3
    for W, known, one, other in zip(weights, stats, plain, launched, strict=True):
        same(other, one)
        same(other, gptq.solve(W, known, *arguments))
    assert "all zero" in launched[1].notes[0]


def test_layers_without_statistics_are_rounded_beside_the_others(both_ways):
    (W, known), (other, _) = problem(5, 32), problem(5, 32, 1)
    spec = LayerSpec(Scheme(3, 16))
    plain, launched, seen = both_ways(lambda: solve_alike([W, other, W], [known, None, known], spec, torch.float16, Options()))
    assert seen == [32]
    for one, expected in zip(launched, plain, strict=True):
        assert torch.equal(one.codes, expected.codes)


@pytest.mark.parametrize(
    ("sparsity", "scheme", "pruner", "widths"),
    [
        (Sparsity(0.5), Scheme(4, 16), "sparsegpt", [32]),
        (Sparsity(0.5, "2:4"), Scheme(4, 16, symmetric=False), "sparsegpt", [4] * 8),
        (Sparsity(0.5), Scheme(3, 16), "alps", [32] * 3),
    ],
    ids=str,
)
def test_zeros_and_codes_equal_the_plain_loops(both_ways, sparsity, scheme, pruner, widths):
    W, stats = problem(8, 32)
    options = Options(sweeps=2 if pruner == "alps" else 0)
    plain, launched, seen = both_ways(lambda: solve(W, stats, LayerSpec(scheme, sparsity), torch.float16, options, pruner=pruner))
    assert seen == widths
    same(launched, plain)


@pytest.mark.slow
def test_coupled_rows_equal_the_plain_loops(both_ways):
    W, stats = problem(18, 16)
    O = torch.randn(18, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE)  # noqa: E741
    known = LayerStats(stats.H, stats.tokens, outputs=O @ O.t() / 80)
    options = Options(sweeps=1, coupled=True)
    plain, launched, seen = both_ways(lambda: coupled.solve(W, known, Scheme(3, 8), torch.float16, options))
    assert len(seen) == 2 * coupled.BLOCKS
    same(launched, plain)


@pytest.mark.parametrize("spec", [LayerSpec(Scheme.of("nvfp4")), LayerSpec(sparsity=Sparsity(0.5))], ids=str)
def test_what_the_kernels_cannot_do_goes_column_by_column(both_ways, spec):
    W, stats = problem(8, 64)
    plain, other, seen = both_ways(lambda: solve(W, stats, spec, torch.float16, Options(), pruner="sparsegpt"))
    assert not seen
    assert torch.equal(plain.error, other.error)


def test_a_cpu_has_no_kernel():
    assert not fused.has_kernel(torch.device("cpu"))
