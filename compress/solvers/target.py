"""The target of a layer whose inputs drifted: weights that do on them what the dense weights did on the dense model's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import matmul_nt
from compress.solvers import gptq
from compress.solvers.columns import Factor
from compress.solvers.options import Options

MOST_JUDGED = 256  # rows of a layer that its strength is computed from


def corrected(weights: Sequence[Float[Tensor, "_ K"]], stats: LayerStats, options: Options) -> list[Float[Tensor, "_ K"]]:
    """W + a (W C + R) (H + damping)^-1 for every layer, with a strength `a` of its own; unchanged where H cannot be factorised.

    Completing the square, `||Y~ + W X~ - Y - Q X||^2 = ||(W' - Q) X||^2 + const` for `W' = W + (W C + R) H^-1`, with the W C +
    R of `Pull`: solving for W' brings what the layer's output is added to along with it as close to the dense model as the inputs
    that it gets allow. Without R that is the objective of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695); LoaQ (arXiv
    2509.06297) has R. They set a = 1.
    """
    drift = stats.drift
    if drift is None:
        raise ValueError("the inputs were not compared with the dense model's")
    factor = gptq.factorise(stats.H, torch.arange(len(stats.H), device=stats.H.device), options.damping)
    if isinstance(factor, str):
        return list(weights)
    pull = drift.whole()
    strengths = [_strength(W, stats, factor) for W in weights]
    if not pull.alone and sum(len(W) for W in weights) > len(pull.cross):  # then one solution for all is less work
        solved = _solved(pull.cross.t(), factor)
        return [torch.addcmul(W, matmul_nt(W, solved), a) for W, a in zip(weights, strengths, strict=True)]
    return [torch.addcmul(W, _moved(pull.of(W), factor), a) for W, a in zip(weights, strengths, strict=True)]


def _strength(W: Float[Tensor, "N K"], stats: LayerStats, factor: Factor) -> Float[Tensor, ""]:
    """The `a` in 0 .. 1 that minimises ||Y~ - Y + W (X~ - X) - a D X||^2 over the sequences held out, D fitted to the others.

    What is fitted is a mean over few tokens, and on the tokens that it was taken from the best strength is always about 1. The
    Hessian is that of all tokens on both sides, so that one is enough.
    """
    assert stats.drift is not None
    step = -(-len(W) // MOST_JUDGED)
    D = _moved(stats.drift.fitted.of(W, step), factor)
    gain = (stats.drift.held_out.of(W, step) * D).sum()
    size = (matmul_nt(D, stats.H) * D).sum()
    return torch.where(size > 0, gain / size, 0).clamp(0, 1)


def _moved(pulled: Float[Tensor, "N K"], factor: Factor) -> Float[Tensor, "N K"]:
    """pulled (Ut D Ut^T)^-1, for a factor in the order of the inputs."""
    return _solved(pulled.t(), factor).t()


def _solved(B: Float[Tensor, "K C"], factor: Factor) -> Float[Tensor, "K C"]:
    """(Ut D Ut^T)^-1 B."""
    halfway = torch.linalg.solve_triangular(factor.Ut, B, upper=True, unitriangular=True)
    solved: Tensor = torch.linalg.solve_triangular(factor.Ut.t(), halfway / factor.D[:, None], upper=False, unitriangular=True)
    return solved
