"""Weights that an earlier run pruned stay zero when their layer is put on a grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.qtensor import dense
from compress.solvers import masks, solve, solve_alike
from compress.solvers.masks import weights_to_keep
from compress.solvers.options import Options
from compress.spec import FIXED, LayerSpec, Scheme, Sparsity
from tests.solvers.problem import layer, loss

SCHEMES = [Scheme(bits, 32, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
SCHEMES += [Scheme.of(grid, group_size=fixed.group_size or 32) for grid, fixed in FIXED.items()]


def pruned(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a 2:4 pattern, and where they are not zero."""
    keep = ~masks.by_cost(torch.rand(N, K, generator=torch.Generator().manual_seed(3)), Sparsity.of("2:4", None))
    return layer(N, K)[0] * keep, keep


def drifted(W: torch.Tensor) -> torch.Tensor:
    """A target that makes up for earlier layers, in which no weight is zero."""
    return W + 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("how", ["gptq", "fast", "coupled", "rtn", "uncalibrated"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_outside_the_mask_leaves_zero(scheme, how):
    (W, keep), stats = pruned(24, 96), layer(24, 96)[1]
    O = torch.randn(24, 40, generator=torch.Generator().manual_seed(5))  # noqa: E741
    known = {"uncalibrated": None, "coupled": replace(stats, outputs=O @ O.t())}.get(how, stats)
    options = Options() if how == "fast" else Options(sweeps=2)
    solved = solve(drifted(W), known, LayerSpec(scheme), torch.float16, options, "rtn" if how == "rtn" else "gptq", keep=keep)
    Q = dense(solved)
    assert not Q[~keep].any()
    assert Q[keep].count_nonzero() > 0.3 * keep.sum()
    if how == "gptq":  # and the other weights make up for the zeros: less is lost than by rounding alone
        plain = dense(solve(drifted(W), None, LayerSpec(scheme), torch.float16, options, keep=keep))
        assert loss(drifted(W) - Q, stats.H) < loss(drifted(W) - plain, stats.H)


@pytest.mark.parametrize("broken", ["silent", "outputs"])
def test_fallbacks_keep_zeros_too(broken):
    (W, keep), stats = pruned(24, 96), layer(24, 96)[1]
    outputs = torch.full((24, 24), torch.nan) if broken == "outputs" else torch.eye(24)
    known = replace(stats, H=torch.zeros_like(stats.H) if broken == "silent" else stats.H, outputs=outputs)
    solved = solve(drifted(W), known, LayerSpec(Scheme(3, 32)), torch.float16, Options(sweeps=1), keep=keep)
    assert solved.notes
    assert not dense(solved)[~keep].any()


def test_layers_solved_at_once_have_masks_of_their_own():
    (W, keep), stats = pruned(16, 64), layer(16, 64)[1]
    together = solve_alike([W, W], [stats, stats], LayerSpec(Scheme(4, 32)), torch.float16, Options(), keeps=[keep, None])
    assert not dense(together[0])[~keep].any()
    assert torch.equal(together[1].codes, solve(W, stats, LayerSpec(Scheme(4, 32)), torch.float16, Options()).codes)
    assert not torch.equal(together[0].codes, together[1].codes)


def test_layers_that_were_pruned_are_told_from_those_that_were_not():
    W = layer(16, 64)[0]
    assert weights_to_keep(W) is None
    some = W.clone()
    some[:, :12] = 0  # 19 %
    assert weights_to_keep(some) is None
    some[:, 12] = 0  # 20.3 %
    assert torch.equal(weights_to_keep(some), some != 0)
    for every in (4, 8, 16):  # one zero in each group of so many: 6.25 % are enough where they are a pattern
        patterned = W.clone()
        patterned[:, ::every] = 0
        assert torch.equal(weights_to_keep(patterned), patterned != 0)
        patterned[3, :16] = 1
        assert weights_to_keep(patterned) is None or every == 4  # 25 % are many without a pattern, too
    assert weights_to_keep(layer(4, 33)[0]) is None
