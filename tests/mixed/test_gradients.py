"""First derivatives against autograd, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress import experts, models
from compress.errors import CompressError
from compress.fisher import losses
from compress.mixed import derivatives, gradients
from tests import tiny
from tests.mixed import toys
from tests.mixed.toys import CPU

FAMILIES = ["llama", "gpt2", "bert", "vit", "resnet", "mobilenet", "opt"]


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    found = tiny.inputs(family, samples=5, length=8)
    if models.is_causal(tiny.build(family)):
        mask = torch.ones(5, 8, dtype=torch.long)
        mask[2, 5:] = 0
        return {**found, "attention_mask": mask}
    return {**found, "labels": torch.arange(5) % 2}


def one_by_one(model, inputs, objective):
    """Every sample alone with the gradient of its summed loss: (predictions, loss to differentiate)."""
    for i in range(len(next(iter(inputs.values())))):
        sample = {name: value[i : i + 1] for name, value in inputs.items()}
        value = objective.loss(model, sample, objective.draw())
        yield objective.predictions(model, sample, {}), value


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_traces_are_the_squared_gradients_of_single_samples(family):
    model, inputs = tiny.build(family), inputs_of(family)
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs)
    found = gradients.fisher_traces(model, layers, inputs, objective, CPU)
    weights = [models.weight_of(model.get_submodule(layer.name)) for layer in layers]
    total, squares = 0, torch.zeros(len(layers))
    for count, value in one_by_one(model, inputs, objective):
        squares += torch.stack([(count * g).square().sum() for g in torch.autograd.grad(value, weights)])
        total += count
    torch.testing.assert_close(torch.tensor(list(found.values())), squares / total, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_gradients_are_those_of_the_summed_loss(family):
    model, inputs = tiny.build(family), inputs_of(family)
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs)
    found = gradients.output_gradients(model, layers, inputs, objective, CPU)
    outputs = {}
    for layer in layers:
        model.get_submodule(layer.name).register_forward_hook(lambda _m, _a, out, name=layer.name: outputs.__setitem__(name, out))
    total, sums = 0, {layer.name: torch.zeros(layer.N) for layer in layers}
    for count, value in one_by_one(model, inputs, objective):
        for layer, g in zip(layers, torch.autograd.grad(value, list(outputs.values())), strict=True):
            rows = g.movedim(1, -1) if layer.kind == "conv2d" else g
            sums[list(outputs)[layers.index(layer)]] += (count * rows).square().flatten(0, -2).sum(0)
        total += count
    for layer in layers:
        torch.testing.assert_close(found[layer.name].float(), sums[layer.name] / total, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "bert", "resnet", "gpt2"])
def test_moments_of_outputs_are_means_of_products_of_their_gradients(family):
    model, inputs = tiny.build(family), {name: value[[0, 1, 2, 3, 4] * 2] for name, value in inputs_of(family).items()}
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs)
    found = gradients.output_moments(model, layers, inputs, objective, CPU)
    squares = gradients.output_gradients(model, layers, inputs, objective, CPU)
    for layer in layers:
        O, diagonal = found[layer.name], squares[layer.name].float()  # noqa: E741
        torch.testing.assert_close(O.diagonal(), diagonal / diagonal.mean(), rtol=1e-3, atol=1e-4)
        assert torch.equal(O, O.t())
        assert torch.linalg.eigvalsh(O).min() > -1e-3
        assert (O - torch.diag(O.diagonal())).abs().max() > 0.01


def test_experts_that_no_token_reaches_count_apart():
    model, inputs = tiny.build("mixtral"), tiny.inputs("mixtral", samples=1, length=1)
    experts.split(model, every=True)
    layers = models.anatomy(model).layers
    objective = derivatives.objective(model, inputs, asked="kl")
    found = gradients.output_moments(model, layers, inputs, objective, CPU)
    apart = {name for name, one in found.items() if torch.equal(one, torch.eye(len(one)))}
    assert len(apart) == 2 * 2 * 3  # of two blocks two of four experts, with three layers each
    assert all(".experts." in name for name in apart)


def test_outputs_that_the_loss_does_not_reach_count_apart():
    model = toys.Toy(_Twice(flat=False)).eval()
    inputs = {"x": torch.randn(6, 3, 4, dtype=torch.float64)}
    objective = toys.objective(lambda out: out.cos().flatten(1).sum(1).mean())
    found = gradients.output_moments(model, toys.layers_of(model), inputs, objective, CPU)
    assert torch.equal(found["body.unread"], torch.eye(2))
    assert not torch.equal(found["body.first"], torch.eye(4))


def test_both_ways_to_a_squared_norm_agree():
    X, D = torch.randn(3, 20, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    for rows in (3, 1):
        expected = (D[:rows].t() @ X[:rows]).square().sum()
        torch.testing.assert_close(gradients._squared_norm(X[:rows], D[:rows]), expected)
        repeated = X[:rows].repeat(50, 1), D[:rows].repeat(50, 1)
        torch.testing.assert_close(gradients._squared_norm(*repeated), 2500 * expected)


class _Twice(nn.Module):
    """A layer that is called twice, the second time beside an output that nothing reads."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.first, self.again, self.unread = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(self.first(x).tanh()).tanh()
        self.unread(y)
        self.again(x)
        if self.flat:
            return self.again(y.flatten(0, 1)).view_as(y)
        return self.again(y)


@pytest.mark.parametrize("flat", [False, True])
def test_layers_that_are_called_often_or_in_vain_or_on_flattened_samples(flat):
    torch.manual_seed(0)
    model = toys.Toy(_Twice(flat)).eval()
    inputs = {"x": torch.randn(6, 3, 4, dtype=torch.float64)}
    objective = toys.objective(lambda out: out.cos().flatten(1).sum(1).mean())
    layers = toys.layers_of(model)
    found = gradients.fisher_traces(model, layers, inputs, objective, CPU)
    weights = [model.get_submodule(layer.name).weight for layer in layers]
    squares = torch.zeros(3, dtype=torch.float64)
    for _, value in ((1, objective.loss(model, {"x": x[None]}, None)) for x in inputs["x"]):
        found_here = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        squares += torch.stack([g.square().sum() for g in found_here])
    assert list(found.values()) == pytest.approx((squares / 6).tolist(), rel=1e-9)
    assert found["body.unread"] == 0


def test_the_fisher_of_sampled_labels_is_the_hessian_of_the_divergence():
    """Averaged over labels; the gradients of several predictions of a sample do not add up by chance."""
    model, inputs = tiny.build("llama"), tiny.inputs("llama", samples=3, length=3)
    layers = models.anatomy(model).layers[-2:]
    drawn = [
        gradients.fisher_traces(model, layers, inputs, derivatives.objective(model, inputs, asked="kl", seed=seed), CPU)
        for seed in range(30)
    ]
    once = gradients.output_gradients(model, layers, inputs, derivatives.objective(model, inputs, asked="kl"), CPU)
    name = layers[-1].name
    model.requires_grad_(False)
    weight = models.weight_of(model.get_submodule(name)).requires_grad_(True)
    expected = _fisher_trace(model, inputs, weight)
    values = torch.tensor([one[name] for one in drawn])
    assert abs(values.mean() - expected) < 4 * values.std() / 30**0.5
    assert values.std() / 30**0.5 < 0.1 * expected
    assert once[name].shape == (layers[-1].N,)


def _fisher_trace(model, inputs, weight) -> float:
    """sum over classes of p |grad log p|^2, of every prediction by itself."""
    rows = model(**inputs).logits.flatten(0, 1).log_softmax(-1)
    total = 0.0
    for row in rows:
        J = torch.stack([torch.autograd.grad(value, weight, retain_graph=True)[0].flatten() for value in row])
        total += (row.detach().exp() * J.square().sum(1)).sum().item()
    return total / len(rows)


@pytest.mark.parametrize("family", ["llama", "resnet"])
def test_the_model_stays_as_it_is(family):
    model, inputs = tiny.build(family), tiny.inputs(family, samples=4, length=8)
    layers = models.anatomy(model).layers
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = derivatives.objective(model, inputs)
    gradients.output_gradients(model, layers, inputs, objective, CPU)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_losses_that_are_nan_constant_or_not_differentiable_are_refused():
    model = toys.toy(nn.Linear(4, 3))
    layers, inputs = toys.layers_of(model), {"x": torch.ones(4, 4, dtype=torch.float64)}
    for loss, message in (
        (lambda out: out.sum() * torch.nan, "The loss is NaN or infinite"),
        (lambda out: out.argmax(1).double().mean(), "The loss of Toy is not differentiable"),
        (lambda out: (out * 0).mean(), "The gradient of Toy's loss"),
    ):
        with pytest.raises(CompressError, match=message):
            gradients.fisher_traces(model, layers, inputs, toys.objective(loss), CPU)


def test_classification_without_labels_is_refused():
    model, inputs = tiny.build("bert"), tiny.inputs("bert")
    with pytest.raises(CompressError, match="needs labels"):
        derivatives.objective(model, inputs, asked="classification")


@pytest.mark.parametrize(
    ("family", "loss"), [("llama", "causal-lm"), ("llama", "kl"), ("roberta", "masked-lm"), ("mpnet", "kl"), ("bert", "kl")]
)
def test_predictions_are_counted_as_the_loss_counts_them(family, loss):
    """The gradient of a mean with respect to the predictions has as many rows that are not zero."""
    model, inputs = tiny.build(family), tiny.inputs(family, samples=5, length=20)
    inputs["attention_mask"] = torch.ones(5, 20, dtype=torch.long)
    inputs["attention_mask"][1:3, 11:] = 0
    outputs = []
    model.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    draw = losses.Draw(torch.Generator().manual_seed(0), 3)
    value = losses.LOSSES[loss](model, inputs, draw)
    predicted = outputs[0].get("logits")
    (gradient,) = torch.autograd.grad(value, outputs[0][0] if predicted is None else predicted)
    rows = int((gradient.flatten(0, -2) != 0).any(-1).sum())
    assert losses.predictions(loss, model, inputs, outputs[0]) == rows
