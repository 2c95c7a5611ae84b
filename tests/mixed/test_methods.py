"""Every method on one tiny model: what it is made of, and that none is confused with another."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError
from compress.mixed import derivatives, gradients, methods
from compress.mixed.measure import Swaps
from compress.mixed.methods import METHODS, SWAPPED, Subject
from compress.progress import silent
from compress.spec import LayerSpec, Scheme
from tests import tiny
from tests.mixed.searched import OPTIONS, opened

DERIVED = [method for method in METHODS if method not in SWAPPED]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    there = opened("llama", tmp_path_factory.mktemp("methods"))
    return there, there.space(OPTIONS, ["1.*down=dense"])


def subject(there, choices, seed: int = 0) -> Subject:
    return Subject(there.model, there.anatomy, choices, there.library, there.judged, there.settings, seed=seed)


@pytest.fixture(scope="module")
def tables(llama):
    return {method: methods.derived(method, subject(*llama)) for method in DERIVED}


@pytest.mark.parametrize("method", DERIVED)
def test_fewer_bits_are_predicted_to_lose_more(llama, tables, method):
    _, choices = llama
    table, errors = tables[method]
    assert [len(row) for row in table] == [len(options) for options in choices.options]
    for row in table[:-1]:
        assert row == sorted(row, reverse=True)
        assert row[-1] > 0
    assert table[-1] == [0.0]  # pinned to dense
    assert set(errors) == (set(there_names(llama)) if method == "hawq-v2" else set())


def there_names(llama) -> list[str]:
    return list(llama[0].anatomy.in_features)


def test_a_units_prediction_is_the_sum_of_its_layers(llama, tables):
    """By hand for method output: half of the squared gradients times the squared errors of the rows."""
    there, choices = llama
    objective = derivatives.objective(there.model, there.judged)
    squares = gradients.output_gradients(there.model, there.anatomy.layers, there.judged, objective, there.settings.device)
    table, _ = tables["output"]
    expected = sum(
        (squares[layer.name] * there.library.entry(layer.name, OPTIONS[1]).row_errors.double()).sum().item() / 2
        for layer in choices.units[0].layers
    )
    assert len(choices.units[0].layers) == 3
    assert table[0][1] == pytest.approx(expected, rel=1e-6)


def test_fisher_spreads_the_trace_over_the_weights_error(llama, tables):
    there, choices = llama
    objective = derivatives.objective(there.model, there.judged)
    traces = gradients.fisher_traces(there.model, there.anatomy.layers, there.judged, objective, there.settings.device)
    (layer,) = choices.units[1].layers
    error = there.library.entry(layer.name, OPTIONS[0]).weight_error
    expected = traces[layer.name] / (layer.N * layer.K) * error / 2
    assert tables["fisher"][0][1][0] == pytest.approx(expected, rel=1e-6)


def test_the_same_seed_gives_the_same_predictions(llama, tables):
    assert methods.derived("hawq-v2", subject(*llama)) == tables["hawq-v2"]
    assert methods.derived("hawq-v2", subject(*llama, seed=1)) != tables["hawq-v2"]


def test_no_method_changes_the_model(llama, tables):  # noqa: ARG001 - they have been run
    there, _ = llama
    fresh = tiny.build("llama")
    for (name, before), after in zip(fresh.named_parameters(), there.model.parameters(), strict=True):
        assert torch.equal(before, after), name
        assert after.requires_grad
        assert after.grad is None


def test_exchanges_are_measured_unit_by_unit(llama):
    there, choices = llama
    swaps = there.swaps()
    table = methods.swapped(swaps, choices, 4, silent)
    assert [len(row) for row in table] == [len(options) for options in choices.options]
    for u, o in ((0, 0), (3, 2), (6, 1)):
        specs = {layer.name: choices.options[u][o] for layer in choices.units[u].layers}
        assert table[u][o] == there.swaps().loss(specs, 4)
    assert table[-1] == [pytest.approx(0, abs=1e-6)]


def test_interactions_are_measured_for_near_pairs_or_all(llama):
    there, choices = llama
    swaps = there.swaps()
    table = methods.swapped(swaps, choices, 4, silent)
    near = methods.interactions(swaps, choices, table, 4, silent, reach=0)
    assert set(near) == {(i, j) for i in range(8) for j in range(i + 1, 8) if i // 4 == j // 4}
    whole = methods.interactions(swaps, choices, table, 4, silent, None)
    assert len(whole) == 28
    assert methods.interactions(swaps, choices, table, 4, silent) == whole  # two blocks are adjacent
    both = choices.with_options({0: OPTIONS[0], 5: OPTIONS[0]})
    assert max(range(4), key=table[0].__getitem__) == max(range(4), key=table[5].__getitem__) == 0
    assert whole[0, 5] == pytest.approx(swaps.loss(both, 4) - table[0][0] - table[5][0])
    assert {pair: whole[pair] for pair in near} == near
    assert whole[0, 7] == pytest.approx(0, abs=1e-6)  # with a unit that stays dense


def test_an_option_that_overflows_is_named(llama, monkeypatch):
    there, choices = llama
    monkeypatch.setattr(Swaps, "_weight", lambda _self, layer, _spec: torch.full((layer.N, layer.K), torch.nan))
    with pytest.raises(CompressError, match=r"With model\.layers\.0\.self_attn\.qkv_proj as int2 g32 the model predicts NaN"):
        methods.swapped(there.swaps(), choices, 4, silent)


def test_a_loss_without_derivative_says_what_works(llama, monkeypatch):
    there, choices = llama
    real = derivatives.objective

    def flat(*given, **more):
        found = real(*given, **more)
        return derivatives.Objective(lambda *a: found.loss(*a).detach(), lambda *a: found.curved(*a).detach(), found.predictions)

    monkeypatch.setattr(derivatives, "objective", flat)
    for method in DERIVED:
        with pytest.raises(CompressError, match=r"is not differentiable.*kl and interlayer need no derivative"):
            methods.derived(method, subject(there, choices))


@pytest.mark.parametrize("family", ["roberta", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mpnet", "resnet"))])
def test_other_models_have_every_method(tmp_path, family):
    there = opened(family, tmp_path, samples=4)
    options = (LayerSpec(Scheme(2, 32)), LayerSpec(Scheme(8, 32)))
    choices = there.space(options)
    for method in DERIVED:
        table, _ = methods.derived(method, subject(there, choices))
        assert sum(row[0] for row in table) > 10 * sum(row[1] for row in table) > 0
