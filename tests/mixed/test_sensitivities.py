"""The tables' constants, on losses whose increase is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.mixed import gradients, hessian, sensitivities
from compress.mixed.hessian import Eigenvalue, Trace
from compress.models import Layer
from compress.spec import LayerSpec, Scheme
from tests.mixed import toys
from tests.mixed.toys import CPU

ONES = {"x": torch.ones(2, 1, dtype=torch.float64)}
SPEC = LayerSpec(Scheme(4, 32))
OTHER = LayerSpec(Scheme(2, 32))


def increase(A: torch.Tensor, length: float, draws: int = 200_000) -> tuple[float, float]:
    """The mean of d^T A d / 2 over random directions of d, and its standard error."""
    d = torch.randn(draws, len(A), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d *= length / d.norm(dim=1, keepdim=True)
    values = 0.5 * ((d @ A) * d).sum(1)
    return values.mean().item(), (values.std() / draws**0.5).item()


def test_the_trace_predicts_the_mean_increase_of_a_quadratic_over_all_errors():
    diagonal = torch.tensor([0.5, 1.0, 4.0, 7.0], dtype=torch.float64)
    model, objective = toys.quadratic(torch.diag(diagonal))
    layers = toys.layers_of(model)
    traces = hessian.traces(model, layers, ONES, objective, CPU, probes=2)
    table = sensitivities.hawq_v2(layers, traces, {"body.0": {SPEC: 0.3, OTHER: 0.9}})
    expected, error = increase(torch.diag(diagonal), 0.3**0.5)
    assert abs(table["body.0"][SPEC] - expected) < 4 * error
    assert table["body.0"][OTHER] == pytest.approx(3 * table["body.0"][SPEC])


def test_the_top_eigenvalue_does_so_for_a_hessian_of_rank_one():
    a = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    A = a[:, None] * a
    model, objective = toys.quadratic(A)
    layers = toys.layers_of(model)
    tops = hessian.top_eigenvalues(model, layers, ONES, objective, CPU)
    table = sensitivities.hawq_v1(layers, tops, {"body.0": {SPEC: 0.3}})
    expected, error = increase(A, 0.3**0.5)
    assert abs(table["body.0"][SPEC] - expected) < 4 * error


def test_curvatures_that_are_negative_never_pay():
    layers = [Layer("a", "linear", 2, 3)]
    errors = {"a": {SPEC: 6.0}}
    assert sensitivities.hawq_v1(layers, {"a": Eigenvalue(-2.0, 0.0)}, errors) == {"a": {SPEC: 1.0}}
    assert sensitivities.hawq_v2(layers, {"a": Trace(-4.0, 1.0)}, errors) == {"a": {SPEC: 2.0}}


def gaussian(features: int = 3, outputs: int = 4):
    """A linear model with the negative log likelihood of Gaussian labels that follow it, and its inputs; a large sample."""
    torch.manual_seed(0)
    model = toys.toy(nn.Linear(features, outputs, bias=False))
    precision = torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)[:outputs]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, features, dtype=torch.float64, generator=g) * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    noise = torch.randn(20_000, outputs, dtype=torch.float64, generator=g) / precision.sqrt()
    labels = x @ model.get_parameter("body.0.weight").detach().t() + noise

    def loss(work, batch, _draw):
        return (0.5 * precision * (work(x=batch["x"])["logits"] - batch["wanted"]).square()).sum(1).mean()

    objective = toys.Objective(loss, loss, lambda _model, batch, _outputs: len(batch["x"]))
    return model, {"x": x, "wanted": labels}, objective, precision


def test_fisher_and_output_predict_the_increase_of_a_negative_log_likelihood():
    """Its Hessian is the Fisher: x x^T for every output, times the precision of that output."""
    model, inputs, objective, precision = gaussian()
    layers, H = toys.layers_of(model), inputs["x"].t() @ inputs["x"] / 20_000
    d = 0.1 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    row_errors = ((d @ H) * d).sum(1)
    exact = 0.5 * (precision * row_errors).sum().item()  # of this very error
    squares = gradients.output_gradients(model, layers, inputs, objective, CPU)
    torch.testing.assert_close(squares["body.0"], precision, rtol=0.05, atol=0)
    table = sensitivities.output(squares, {"body.0": {SPEC: row_errors.float()}})
    assert table["body.0"][SPEC] == pytest.approx(exact, rel=0.05)

    traces = gradients.fisher_traces(model, layers, inputs, objective, CPU)
    mean = 0.5 * (precision.sum() * H.trace()).item() / 12 * d.square().sum().item()  # over all errors of this size
    assert sensitivities.fisher(layers, traces, {"body.0": {SPEC: d.square().sum().item()}})["body.0"][SPEC] == pytest.approx(
        mean, rel=0.05
    )
    few = {name: value[:3000] for name, value in inputs.items()}
    (trace,) = hessian.traces(model, layers, few, objective, CPU, probes=20).values()
    assert trace.mean == pytest.approx((precision.sum() * H.trace()).item(), rel=0.05)
    assert objective.loss(model, {name: value[:500] for name, value in few.items()}, objective.draw()).item() == pytest.approx(
        2, rel=0.1
    )
