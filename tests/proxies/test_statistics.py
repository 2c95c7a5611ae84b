"""Samples and totals of models, against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress import models
from compress.errors import CompressError
from compress.mixed import derivatives
from compress.mixed.library import Library, fill
from compress.mixed.methods import Subject
from compress.mixed.units import space
from compress.proxies import passes
from compress.proxies.gathering import bits_of, gather
from compress.proxies.handwritten import HANDWRITTEN
from compress.proxies.operations import INPUTS, SIDE
from compress.proxies.statistics import TOTALS, Statistics, places, scaled, scores, shifted
from compress.qtensor import dense
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme, Sparsity
from tests import tiny
from tests.mixed import toys
from tests.mixed.toys import CPU

OPTIONS = (LayerSpec(Scheme(2, 32)), LayerSpec(Scheme(4, 32)))
SETTINGS = Settings("gptq", "alps", Options(), CPU, torch.float32, torch.float32)


def subject_of(family: str, folder, seed: int = 0) -> Subject:
    model, inputs = tiny.build(family), tiny.inputs(family, samples=4, length=12)
    anatomy = models.anatomy(model)
    choices, library = space(anatomy, OPTIONS), Library(folder / family)
    assert list(fill(library, model, anatomy, inputs, choices.wanted, SETTINGS)) == list(anatomy.blocks)
    return Subject(model, anatomy, choices, library, inputs, SETTINGS, seed=seed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Subject, Statistics]:
    subject = subject_of("llama", tmp_path_factory.mktemp("library"))
    return subject, gather(subject, totals=True)


def test_shapes(llama):
    subject, found = llama
    L, layers = len(found.layers), subject.anatomy.layers
    assert list(found.layers) == [layer.name for layer in layers]
    assert found.weights.tolist() == [layer.N * layer.K for layer in layers]
    assert {name: one.shape for name, one in found.tensors.items()} == {
        **dict.fromkeys("WGVH", (L, 1, SIDE, SIDE)),
        "A": (L, 1, 1, SIDE),
        "D": (L, 1, SIDE, 1),
        "E": (L, 2, SIDE, SIDE),
        "O": (L, 2, SIDE, 1),
    }
    assert found.tensors.keys() == INPUTS.keys()
    assert found.totals.keys() == TOTALS.keys()
    assert found.bits.tolist() == [[2, 4]] * L
    assert [subject.space.units[u].layers.count(layer) for u, layer in zip(found.unit_of, layers, strict=True)] == [1] * L


def test_samples_have_the_moments_of_the_whole(llama):
    subject, found = llama
    for i, layer in enumerate(subject.anatomy.layers):
        W = models.matrix(subject.model.get_submodule(layer.name)).detach()
        assert np.square(found.tensors["W"][i]).mean() == pytest.approx(W.square().mean().item(), rel=1e-5)
        for o, spec in enumerate(OPTIONS):
            E = dense(subject.library.solved(layer, spec)) - W
            assert np.square(found.tensors["E"][i, o]).mean() == pytest.approx(E.square().mean().item(), rel=1e-4)
            entry = subject.library.entry(layer.name, spec)
            assert np.square(found.tensors["O"][i, o]).mean() == pytest.approx(entry.row_errors.mean().item(), rel=1e-4)
            assert found.totals["weight_error"][i, o] == pytest.approx(E.square().sum().item(), rel=1e-4)
            assert found.totals["output_error"][i, o] == pytest.approx(entry.output_error)
        mean = found.tensors["H"][i].mean(dtype=np.float64)
        assert mean * layer.N * layer.K == pytest.approx(found.totals["trace"][i], rel=1e-3, abs=1e-5)


def test_samples_of_one_layer_have_one_place(llama):
    """Every sampled error is the error of some weight that has the sampled value, up to the sample's one scale."""
    subject, found = llama
    layer = subject.anatomy.layers[0]
    W = models.matrix(subject.model.get_submodule(layer.name)).detach()
    E = dense(subject.library.solved(layer, OPTIONS[0])) - W
    rows, columns = (torch.from_numpy(places(size, draw)) for draw in [np.random.default_rng([0, 0])] for size in W.shape)
    for letter, whole in (("W", W), ("E", E)):
        sample, picked = found.tensors[letter][0, 0], whole[rows][:, columns].numpy()
        scale = np.linalg.norm(sample) / np.linalg.norm(picked)
        np.testing.assert_allclose(sample, picked * scale, rtol=1e-4, atol=1e-7)


def test_gradients_and_moments(llama):
    subject, found = llama
    model, layers = subject.model, subject.anatomy.layers
    model.zero_grad()
    ids = subject.inputs["input_ids"]
    entering = {}
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(lambda _m, a, name=layer.name: entering.__setitem__(name, a[0]))
        for layer in layers
    ]
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(layers):
        weight = models.weight_of(model.get_submodule(layer.name))
        assert found.totals["snip"][i] == pytest.approx((weight * weight.grad).abs().sum().item(), rel=1e-3)
        assert np.square(found.tensors["G"][i]).mean() == pytest.approx(weight.grad.square().mean().item(), rel=1e-3)
        squares = entering[layer.name].flatten(0, -2).square().mean(0)
        assert np.square(found.tensors["A"][i]).mean() == pytest.approx(squares.mean().item(), rel=1e-4)
    model.zero_grad()


def test_the_virtual_gradient_is_that_of_all_outputs(llama):
    subject, found = llama
    model, layers = subject.model, subject.anatomy.layers
    model.zero_grad()
    model(inputs_embeds=torch.ones(1, 12, 64)).logits.sum().backward()
    weights = [models.weight_of(model.get_submodule(layer.name)) for layer in layers]
    expected = [weight.grad.square().mean().item() for weight in weights]
    model.zero_grad()
    np.testing.assert_allclose(np.square(found.tensors["V"]).mean((1, 2, 3)), expected, rtol=1e-3)


def test_the_diagonal_of_a_known_hessian():
    A = toys.symmetric(4)
    model, objective = toys.quadratic(torch.diag(torch.diagonal(A)))
    layers, inputs = toys.layers_of(model), {"x": torch.ones(3, 1, dtype=torch.float64)}
    (exact,) = passes.diagonals(model, layers, inputs, objective, CPU, probes=1).values()
    torch.testing.assert_close(exact.flatten(), torch.diagonal(A))
    model, objective = toys.quadratic(A)
    (noisy,) = passes.diagonals(model, layers, inputs, objective, CPU, probes=3000).values()
    torch.testing.assert_close(noisy.flatten(), torch.diagonal(A), rtol=0, atol=0.2)


def test_mean_gradients_weigh_predictions():
    model = tiny.build("llama")
    layers, ids = models.anatomy(model).layers, tiny.inputs("llama", samples=3, length=8)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    objective = derivatives.objective(model, inputs)
    whole = passes.gradients(model, layers, inputs, objective, CPU)
    parts = [
        (count, passes.gradients(model, layers, {name: value[i : i + 1] for name, value in inputs.items()}, objective, CPU))
        for i, count in enumerate((7, 2, 7))
    ]
    for name, one in whole.items():
        mean = sum(count * part[name] for count, part in parts) / 16
        torch.testing.assert_close(one, mean, rtol=1e-3, atol=1e-6)


def test_overlaps_are_those_of_features():
    F, G = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    moments = {name: passes.Moments(torch.zeros(1), 0.0, f @ f.t()) for name, f in {"f": F, "g": G, "f again": 2 * F}.items()}
    orm = ((G.t() @ F).norm() ** 2 / ((F.t() @ F).norm() * (G.t() @ G).norm())).item()
    found = passes.overlaps({**moments, "expert": passes.Moments(torch.zeros(1), 0.0, None)})
    assert found == pytest.approx({"f": (1 + orm) / 2, "f again": (1 + orm) / 2, "g": orm, "expert": 0})


@pytest.mark.parametrize("family", ["gpt2", "bert", "resnet"])
def test_other_families_have_all_statistics(family, tmp_path):
    found = gather(subject_of(family, tmp_path), totals=True)
    for table in (proxy(found) for proxy in HANDWRITTEN.values()):
        assert table.shape == found.bits.shape
        assert np.isfinite(table).all()
        assert (np.diff(found.by_unit(table).sum(0)) <= 0).all(), "more bits never score worse"


def test_only_what_is_asked_for_is_gathered(llama, monkeypatch):
    monkeypatch.setattr(passes, "diagonals", None)
    subject, whole = llama
    few = gather(subject, "OD")
    assert few.tensors.keys() == {"O", "D"}
    assert few.totals == {}
    np.testing.assert_array_equal(few.tensors["O"], whole.tensors["O"])


def test_the_seed_draws_samples(llama):
    subject, whole = llama
    np.testing.assert_array_equal(gather(subject, "W").tensors["W"], whole.tensors["W"])
    assert not np.array_equal(gather(replace(subject, seed=1), "W").tensors["W"], whole.tensors["W"])


def test_a_layer_with_nan_is_named(tmp_path):
    subject = subject_of("llama", tmp_path)
    weight = models.weight_of(subject.model.get_submodule("model.layers.1.mlp.up_proj"))
    with torch.no_grad():
        weight[3, 5] = torch.nan
    with pytest.raises(CompressError, match=r"model.layers.1.mlp.up_proj: the weight \(W\) is NaN"):
        gather(subject, "W")


def test_hand_written_tables(llama):
    _, found = llama
    n = found.weights
    assert HANDWRITTEN["BParams"](found).tolist() == [[-w * 2 / 8, -w * 4 / 8] for w in n]
    assert HANDWRITTEN["HAWQ-v2"](found)[2, 1] == pytest.approx(
        abs(found.totals["trace"][2]) / n[2] * found.totals["weight_error"][2, 1] / 2
    )
    assert HANDWRITTEN["SNIP"](found)[1].tolist() == pytest.approx([-2 * found.totals["snip"][1], -4 * found.totals["snip"][1]])


def test_places_and_scales():
    draw = np.random.default_rng(0)
    assert sorted(places(SIDE, draw)) == list(range(SIDE))
    assert len(set(places(100, draw))) == SIDE
    assert np.bincount(places(5, draw)).tolist() in (
        [7, 7, 6, 6, 6],
        *(np.roll([7, 7, 6, 6, 6], k).tolist() for k in range(5)),
    ) or (sorted(np.bincount(places(5, draw))) == [6, 6, 6, 7, 7])
    sample = draw.standard_normal((4, 4)).astype(np.float32)
    assert np.square(scaled(sample, 7.0)).mean() == pytest.approx(7, rel=1e-5)
    assert scaled(np.zeros((2, 2), np.float32), 7.0).tolist() == [[0, 0], [0, 0]]
    assert shifted(sample, -3.0).mean() == pytest.approx(-3, rel=1e-5)


def test_bits():
    assert bits_of(LayerSpec(Scheme(3, 32))) == 3
    assert bits_of(LayerSpec()) == 16
    assert bits_of(LayerSpec(Scheme(4, 32), Sparsity(0.5))) == 2


def test_scores_are_sums_over_units():
    table = np.array([[1.0, 2.0], [10.0, 20.0]])
    assert scores(table, np.array([[0, 0], [0, 1], [1, 1]])).tolist() == [11, 21, 22]
    statistics = Statistics(("a", "b", "c"), np.array([0, 1, 0]), np.ones(3), np.ones((3, 2)), {}, {})
    assert statistics.by_unit(np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])).tolist() == [[101, 202], [10, 20]]
