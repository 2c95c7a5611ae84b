"""Hessians against their exact ones: quadratics, small networks, and real classes with attention and convolutions."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from compress import models
from compress.errors import CompressError
from compress.mixed import derivatives, hessian
from compress.models import Layer
from tests import tiny
from tests.mixed import toys
from tests.mixed.toys import CPU

ONES = {"x": torch.ones(6, 1, dtype=torch.float64)}


def data(samples: int = 30, features: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(samples, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


def mlp():
    torch.manual_seed(3)
    model = toys.toy(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, toys.objective(lambda out: (out.logsumexp(1) - out[:, 0] + out.sum(1).sin()).mean())


@pytest.fixture
def small_batches(monkeypatch):
    """Ten samples of five features: several graphs."""
    monkeypatch.setattr(hessian, "TOKENS_AT_A_TIME", 35)


@pytest.mark.usefixtures("small_batches")
def test_products_are_those_of_the_exact_hessians_of_the_mean_loss():
    model, objective = mlp()
    layers = toys.layers_of(model)
    with derivatives.differentiable(model, layers, CPU) as (work, weights):
        vectors = {name: torch.randn_like(weight) for name, weight in weights.items()}
        found = hessian.own_products(work, weights, vectors, data(), objective)
    for layer in layers:
        expected = toys.exact_hessian(model, layer, data(), objective) @ vectors[layer.name].flatten()
        torch.testing.assert_close(found[layer.name].flatten(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_batches")
def test_top_eigenvalues_are_those_of_the_exact_hessians():
    model, objective = mlp()
    found = hessian.top_eigenvalues(model, toys.layers_of(model), data(), objective, CPU, tolerance=1e-9, iterations=2000)
    for layer in toys.layers_of(model):
        values = torch.linalg.eigvalsh(toys.exact_hessian(model, layer, data(), objective))
        assert found[layer.name].value == pytest.approx(values[values.abs().argmax()].item(), rel=1e-5)
        assert found[layer.name].change < 1e-9


def test_a_top_eigenvalue_keeps_its_sign_and_an_iteration_cut_short_shows_it():
    model, objective = toys.quadratic(torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)))
    layers = toys.layers_of(model)
    (found,) = hessian.top_eigenvalues(model, layers, ONES, objective, CPU, tolerance=1e-8).values()
    assert found.value == pytest.approx(-3, rel=1e-5)
    (short,) = hessian.top_eigenvalues(model, layers, ONES, objective, CPU, tolerance=1e-8, iterations=2).values()
    assert short.change > 1e-8


def test_the_trace_of_a_diagonal_quadratic_is_exact():
    diagonal = torch.arange(1.0, 8.0, dtype=torch.float64)
    model, objective = toys.quadratic(torch.diag(diagonal))
    (found,) = hessian.traces(model, toys.layers_of(model), ONES, objective, CPU, probes=2).values()
    assert found.mean == pytest.approx(28, rel=1e-12)
    assert found.standard_error < 1e-12


def test_the_trace_of_a_quadratic_lies_within_its_standard_error_which_is_that_of_rademacher_signs():
    A = toys.symmetric(12)
    model, objective = toys.quadratic(A)
    (found,) = hessian.traces(model, toys.layers_of(model), ONES, objective, CPU, probes=400, seed=1).values()
    assert abs(found.mean - A.trace().item()) < 3 * found.standard_error
    variance = 2 * (A.square().sum() - A.diagonal().square().sum())  # arXiv 1911.03852, appendix; Hutchinson 1989
    assert found.standard_error == pytest.approx((variance / 400).sqrt().item(), rel=0.15)


@pytest.mark.usefixtures("small_batches")
def test_all_traces_come_from_the_same_products_within_their_standard_errors():
    model, objective = mlp()
    layers = toys.layers_of(model)
    found = hessian.traces(model, layers, data(), objective, CPU, probes=200)
    for layer in layers:
        exact = toys.exact_hessian(model, layer, data(), objective).trace().item()
        assert abs(found[layer.name].mean - exact) < 3 * found[layer.name].standard_error < 0.2
    one, again, other = (hessian.traces(model, layers, data(), objective, CPU, probes=2, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_batches_count_by_their_predictions(monkeypatch):
    """The last batch is smaller, and the loss depends on the sample."""
    monkeypatch.setattr(hessian, "TOKENS_AT_A_TIME", 4)
    model = toys.toy(nn.Linear(1, 1, bias=False))
    objective = toys.objective(lambda out: 0.5 * out.square().mean())
    inputs = {"x": torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], dtype=torch.float64)}
    (found,) = hessian.traces(model, toys.layers_of(model), inputs, objective, CPU, probes=2).values()
    assert found.mean == pytest.approx(91 / 6, rel=1e-12)


def test_the_second_derivative_of_attention_is_that_of_its_plain_form():
    model, inputs = tiny.build("gpt2"), tiny.inputs("gpt2", samples=4, length=12)
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs)
    assert model.config._attn_implementation == "sdpa"
    fused = hessian.traces(model, layers, inputs, objective, CPU, probes=2)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    plain = hessian.traces(eager, layers, inputs, objective, CPU, probes=2)
    for name, one in fused.items():
        assert one.mean == pytest.approx(plain[name].mean, rel=1e-3, abs=1e-4)
    assert any(abs(one.mean) > 0.01 for one in plain.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "resnet", "mobilenet", "distilbert"])
def test_real_classes_have_positive_curvature_of_their_divergence_and_stay_as_they_are(family):
    model, inputs = tiny.build(family), tiny.inputs(family, samples=4, length=8)
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs, asked="kl")
    traces = hessian.traces(model, layers, inputs, objective, CPU, probes=2)
    tops = hessian.top_eigenvalues(model, layers[-2:], inputs, objective, CPU, iterations=3)
    assert sum(one.mean for one in traces.values()) > 0  # z^T H z for the whole z
    assert all(one.value > 0 for one in tops.values())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_bfloat16_is_worked_on_in_float32():
    model, inputs = tiny.build("llama", torch.bfloat16), tiny.inputs("llama", samples=2, length=8)
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs)
    found = hessian.traces(model, layers, inputs, objective, CPU, probes=2)
    assert found == hessian.traces(model.float(), layers, inputs, objective, CPU, probes=2)


def test_layers_beside_those_asked_for_add_nothing():
    model, objective = mlp()
    middle = [layer for layer in toys.layers_of(model) if layer.name == "body.2"]
    (found,) = hessian.traces(model, middle, data(), objective, CPU, probes=300).values()
    exact = toys.exact_hessian(model, middle[0], data(), objective)
    assert abs(found.mean - exact.trace().item()) < 3 * found.standard_error
    variance = 2 * (exact.square().sum() - exact.diagonal().square().sum())
    assert found.standard_error == pytest.approx((variance / 300).sqrt().item(), rel=0.2)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_loss_without_a_second_derivative_names_the_methods_that_still_work():
    model = toys.toy(nn.Linear(5, 4))
    objective = toys.objective(lambda out: _Once.apply(out).square().mean())
    message = "cannot be differentiated twice, which hawq-v1 and hawq-v2 need.*fisher and output.*kl and interlayer"
    with pytest.raises(CompressError, match=message):
        hessian.traces(model, toys.layers_of(model), data(), objective, CPU)
    with pytest.raises(CompressError, match=message):
        hessian.top_eigenvalues(model, toys.layers_of(model), data(), objective, CPU)


def test_fused_attention_would_have_no_second_derivative(monkeypatch):
    """What plain matrix products are for; and the error where a function's second derivative is not implemented."""
    monkeypatch.setattr(hessian, "sdpa_kernel", lambda _backend: nullcontext())
    model, inputs = tiny.build("gpt2"), tiny.inputs("gpt2", samples=2, length=8)
    with pytest.raises(CompressError, match=r"GPT2LMHeadModel cannot be differentiated twice.* is not implemented"):
        hessian.traces(model, models.anatomy(model).layers, inputs, derivatives.objective(model, inputs), CPU)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature_to_go_by():
    model = toys.toy(nn.Linear(5, 4))
    with pytest.raises(CompressError, match="The second derivative of Toy's loss on the calibration data is zero for all layers"):
        hessian.traces(model, toys.layers_of(model), data(), toys.objective(torch.mean), CPU)


def test_a_loss_without_any_derivative_is_refused():
    model = toys.toy(nn.Linear(5, 4))
    objective = toys.objective(lambda out: out.argmax(1).double().mean())
    with pytest.raises(CompressError, match="The loss of Toy is not differentiable"):
        hessian.traces(model, toys.layers_of(model), data(), objective, CPU)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert all(flags)


def test_one_probe_and_nan_losses_are_refused():
    model, objective = mlp()
    with pytest.raises(CompressError, match="1 probes have no standard error"):
        hessian.traces(model, toys.layers_of(model), data(), objective, CPU, probes=1)
    with pytest.raises(CompressError, match="The loss is NaN or infinite"):
        hessian.traces(model, toys.layers_of(model), {"x": torch.full((3, 5), torch.nan)}, objective, CPU)


def test_the_hessian_of_the_divergence_is_the_exact_fisher():
    """diag(p) - p p^T of the logits, through a linear layer: x x^T times that."""
    model = toys.toy(nn.Linear(3, 4, bias=False))

    objective = derivatives.objective(model, {}, asked="kl")
    layer = Layer("body.0", "linear", 4, 3)
    inputs = data(7, 3)
    p = (inputs["x"] @ model.get_parameter("body.0.weight").t()).softmax(1)
    expected = (inputs["x"].square().sum(1) * (1 - p.square().sum(1))).mean()
    (found,) = hessian.traces(model, [layer], inputs, objective, CPU, probes=1000).values()
    assert abs(found.mean - expected.item()) < 3 * found.standard_error < 0.1 * expected.item()
