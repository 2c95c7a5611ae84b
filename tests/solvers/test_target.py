from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.calib.stats import Drift, LayerStats, Pull
from compress.solvers import target
from compress.solvers.options import Options
from compress.solvers.target import corrected
from tests.solvers.problem import layer

LIGHT = Options(damping=1e-5)


def drifted(noise: float, tokens: int, K: int = 24, N: int = 9, seed: int = 0):
    """A layer, its inputs, those of the dense model, and what calibration learns of both with a fifth held out."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g, dtype=torch.float64) / K**0.5
    dense = torch.randn(tokens, K, generator=g, dtype=torch.float64) @ mix
    x = dense @ (torch.eye(K) - 0.2 * torch.eye(K).roll(1, 0)).double()
    x = x + noise * torch.randn(tokens, K, generator=g, dtype=torch.float64)
    held = torch.arange(tokens) % 5 == 1
    step = dense - x
    parts = [(step[part].t() @ x[part] / int(part.sum())).float() for part in (~held, held)]
    stats = LayerStats((x.t() @ x / tokens).float(), tokens, Drift(*map(Pull, parts), float(held.double().mean())))
    return torch.randn(N, K, generator=g), x, dense, stats


def full(W, x, dense):
    """The weights that do on x what W does on the dense inputs, by least squares."""
    return torch.linalg.lstsq(x, dense @ W.double().t()).solution.t()


def test_in_full_it_is_the_least_squares_solution(monkeypatch):
    W, x, dense, stats = drifted(0.1, 600)
    monkeypatch.setattr(target, "_strength", lambda *_: torch.tensor(1.0))
    (found,) = corrected([W], stats, LIGHT)
    torch.testing.assert_close(found.double(), full(W, x, dense), rtol=1e-2, atol=2e-3)


def test_many_rows_are_moved_as_few_are():
    W, _, _, stats = drifted(0.3, 500, N=40)
    together = corrected([W[:30], W[30:]], stats, LIGHT)
    for rows, found in zip((W[:20], W[30:]), (together[0][:20], together[1]), strict=True):
        (alone,) = corrected([rows], stats, LIGHT)
        if len(rows) == 10:
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        else:  # judged by other rows, it has another strength
            cosine = torch.nn.functional.cosine_similarity((found - rows).flatten(), (alone - rows).flatten(), 0)
            assert cosine > 1 - 1e-5


def test_completing_the_square(monkeypatch):
    W, x, dense, stats = drifted(0.3, 500)
    monkeypatch.setattr(target, "_strength", lambda *_: torch.tensor(1.0))
    (found,) = corrected([W], stats, LIGHT)
    Q = torch.randn(3, *W.shape, dtype=torch.float64)
    wanted = dense @ W.double().t()
    error = (wanted - x @ Q.mT).square().sum((1, 2))
    square = ((found.double() - Q) @ x.t()).square().sum((1, 2))
    torch.testing.assert_close(error.diff(), square.diff(), rtol=1e-3, atol=1e-2)


def test_the_strength_is_where_the_held_out_error_is_least():
    W, _, _, stats = drifted(0.6, 90)
    factor = target.gptq.factorise(stats.H, torch.arange(24), 0.01)
    a = float(target._strength(W, stats, factor))
    assert 0.05 < a < 0.95
    D = target._moved(stats.drift.fitted.of(W), factor).double()

    def error(strength):  # of D as far as it depends on the strength: ||W (X~ - X) - a D X||^2 over the tokens held out
        cross = (W.double() @ stats.drift.held_out.cross.double() * D).sum()
        return float(strength**2 * ((D @ stats.H.double()) * D).sum() - 2 * strength * cross)

    assert error(a) < min(error(a - 0.02), error(a + 0.02))


def test_it_moves_less_where_there_is_less_to_learn_from():
    strengths = []
    for tokens in (50, 200, 3000):
        W, _, _, stats = drifted(0.6, tokens)
        strengths.append(float(target._strength(W, stats, target.gptq.factorise(stats.H, torch.arange(24), 0.01))))
    assert strengths == sorted(strengths)
    assert strengths[2] > 0.9


def test_it_comes_closer_to_the_dense_outputs_on_new_tokens():
    W, _, _, stats = drifted(0.2, 400)
    _, x, dense, _ = drifted(0.2, 400)
    (found,) = corrected([W], stats, Options())
    before, after = ((dense @ W.double().t() - x @ V.double().t()).square().sum() for V in (W, found))
    assert after < 0.5 * before


def test_what_the_output_is_added_to_is_brought_along(monkeypatch):
    W, x, dense, stats = drifted(0.3, 500)
    g = torch.Generator().manual_seed(1)
    step = x @ torch.randn(24, 9, generator=g, dtype=torch.float64) + torch.randn(500, 9, generator=g, dtype=torch.float64)
    held = torch.arange(500) % 5 == 1
    parts = [
        Pull(pull.of(W) + (step[part].t() @ x[part] / int(part.sum())).float(), alone=True)
        for pull, part in ((stats.drift.fitted, ~held), (stats.drift.held_out, held))
    ]
    stats = replace(stats, drift=Drift(*parts, stats.drift.share))
    wanted = dense @ W.double().t() + step
    errors = {a: (wanted - x @ V.double().t()).square()[held].sum() for a, V in at_strengths(W, stats, monkeypatch)}
    monkeypatch.undo()
    (found,) = corrected([W], stats, LIGHT)
    assert (wanted - x @ found.double().t()).square()[held].sum() <= min(errors.values()) * (1 + 1e-3)
    assert errors[1.0] < 0.5 * errors[0.0]
    monkeypatch.setattr(target, "_strength", lambda *_: torch.tensor(1.0))
    full = torch.linalg.lstsq(x, wanted).solution.t()
    torch.testing.assert_close(corrected([W], stats, LIGHT)[0].double(), full, rtol=1e-2, atol=5e-3)


def at_strengths(W, stats, monkeypatch):
    """What correction with fixed strengths arrives at."""
    for a in (0.0, 0.5, 0.8, 0.9, 1.0):
        monkeypatch.setattr(target, "_strength", lambda *_, a=a: torch.tensor(a))
        yield a, corrected([W], stats, LIGHT)[0]


def test_layers_that_share_inputs_are_corrected_as_if_alone():
    W, _, _, stats = drifted(0.2, 300, N=12)
    together = corrected([W[:5], W[5:]], stats, Options())
    for part, found in zip((W[:5], W[5:]), together, strict=True):
        torch.testing.assert_close(found, corrected([part], stats, Options())[0])


def test_no_drift_moves_nothing_and_inputs_are_not_changed():
    W, plain = layer(8, 32)
    zero = torch.zeros(32, 32)
    stats = LayerStats(plain.H, plain.tokens, Drift(Pull(zero), Pull(zero), 0.2))
    before = plain.H.clone()
    assert torch.equal(corrected([W], stats, Options())[0], W)
    assert torch.equal(stats.H, before)


def test_a_hopeless_hessian_leaves_the_weights_alone():
    W, _ = layer(4, 32)
    H = torch.eye(32)
    H[0, 1] = H[1, 0] = 5
    drift = Drift(Pull(torch.eye(32)), Pull(torch.eye(32)), 0.2)
    assert torch.equal(corrected([W], LayerStats(H, 32, drift), Options())[0], W)


def test_without_a_comparison_it_refuses():
    W, stats = layer(4, 32)
    with pytest.raises(ValueError, match="not compared"):
        corrected([W], stats, Options())
