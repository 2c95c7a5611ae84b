"""From a budget to a plan: within it, the best by prediction, the same twice, and for every kind of model."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress import evaluate, models
from compress.errors import CompressError
from compress.mixed import search as search_module
from compress.mixed.methods import METHODS
from compress.mixed.tables import loss_of
from compress.spec import LayerSpec, Scheme, Sparsity
from tests.mixed.searched import OPTIONS, Opened, opened

ZEROS = (LayerSpec(), LayerSpec(None, Sparsity(0.5)), LayerSpec(None, Sparsity(0.75)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Opened:
    return opened("llama", tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of one library for all."""
    return tmp_path_factory.mktemp("library")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_spends_the_budget_and_no_more(llama, folder, method):
    found = llama.search(folder, method=method, limits={"avg_bits": 3.5})
    bits = [unit_bits(found, u) for u in range(len(found.space.units))]
    weights = [unit.weights for unit in found.space.units]
    average = sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights)
    assert 3.2 < average <= 3.5
    assert float(found.spent["avg_bits"]) == pytest.approx(average, abs=1e-3)
    assert found.point.predicted <= found.uniform[0].predicted
    assert found.point.measured is None
    assert found.frontier == ()
    assert set(found.errors) == (set(llama.anatomy.in_features) if method == "hawq-v2" else set())
    assert found.plan.layers.keys() == llama.anatomy.in_features.keys()


def unit_bits(found, u: int) -> float:
    spec = found.plan.layers[found.space.units[u].layers[0].name]
    assert all(found.plan.layers[layer.name] == spec for layer in found.space.units[u].layers)
    return 16 if spec.dense else spec.scheme.bits + 32 / spec.scheme.group_size


def test_the_choice_is_the_best_by_its_scores(llama, folder):
    found = llama.search(folder, limits={"avg_bits": 3.5})
    weights = [unit.weights for unit in found.space.units]
    limit = 3.5 * sum(weights)
    fits = (
        choice
        for choice in itertools.product(range(4), repeat=len(weights))
        if sum((OPTIONS[o].scheme.bits + 1) * w for o, w in zip(choice, weights, strict=True)) <= limit
    )
    assert found.point.predicted == pytest.approx(min(loss_of(found.scores, choice) for choice in fits))


def test_the_same_search_finds_the_same(llama, folder):
    for method in ("kl", "interlayer"):
        one, two = (llama.search(folder, method=method, limits={"avg_bits": 3.2}, refine=2) for _ in range(2))
        assert (one.plan, one.scores, one.point, one.uniform) == (two.plan, two.scores, two.point, two.uniform)


def test_verified_losses_are_those_of_eval(llama, folder):
    found = llama.search(folder, limits={"avg_bits": 4.0}, verify=True)
    swaps = search_module.Swaps(llama.model, llama.anatomy, llama.judged, found.library, llama.settings)
    swaps.loss(found.plan.layers)
    expected = evaluate.compare(swaps.model, llama.model, llama.judged["input_ids"]).kl
    assert found.point.measured == pytest.approx(expected, rel=1e-4)
    uniform = {point.name: point for point in found.uniform}
    assert list(uniform) == ["int2 g32", "int3 g32", "int4 g32", "int8 g32"]
    losses = [point.measured for point in found.uniform]
    assert losses == sorted(losses, reverse=True)
    assert [point.size for point in found.uniform] == sorted(point.size for point in found.uniform)
    assert found.frontier[0].size == uniform["int2 g32"].size
    assert found.frontier[0].measured == uniform["int2 g32"].measured
    assert [point.size for point in found.frontier] == sorted(point.size for point in found.frontier)
    assert [point.predicted for point in found.frontier] == sorted((p.predicted for p in found.frontier), reverse=True)
    assert found.forwards > 0


def test_refining_is_never_worse(llama, folder):
    limits = {"avg_bits": 3.0}
    plain = llama.search(folder, method="hawq-v1", limits=limits, verify=True)
    refined = llama.search(folder, method="hawq-v1", limits=limits, refine=1)
    assert refined.point.measured <= plain.point.measured
    assert float(refined.spent["avg_bits"]) <= 3.0


def test_a_target_is_measured_on_all_judged_samples(llama, folder):
    uniform = llama.search(folder, verify=True).uniform
    target = (uniform[0].measured * uniform[1].measured) ** 0.5
    found = llama.search(folder, limits={"max_kl": target})
    assert found.point.measured <= target
    assert uniform[0].size < found.point.size < uniform[2].size
    with pytest.raises(CompressError, match=r"--max-kl cannot be kept: the most precise plan measures"):
        llama.search(folder, limits={"max_kl": 1e-12})


def test_a_rise_of_perplexity_is_that_of_eval(llama, folder):
    found = llama.search(folder, limits={"max_ppl_increase": 0.005})
    swaps = search_module.Swaps(llama.model, llama.anatomy, llama.judged, found.library, llama.settings)
    swaps.loss(found.plan.layers)
    compared = evaluate.compare(swaps.model, llama.model, llama.judged["input_ids"])
    assert compared.perplexity <= 1.005 * compared.base_perplexity * (1 + 1e-6)
    assert float(found.spent["avg_bits"]) < 9


def test_pins_hold(llama, folder):
    found = llama.search(folder, pins=["layers.0=8", "1.*down=dense"], limits={"avg_bits": 9.5})
    for name, spec in found.plan.layers.items():
        if "layers.0" in name:
            assert spec == OPTIONS[3]
    assert found.plan.layers["model.layers.1.mlp.down_proj"].dense
    assert float(found.spent["avg_bits"]) <= 9.5
    with pytest.raises(CompressError, match=r"--avg-bits 4 cannot be kept with --pin 'layers\.0=8'"):
        llama.search(folder, pins=["layers.0=8"])


def test_sparsities_are_options_like_bits(llama, folder):
    found = llama.search(folder, ZEROS, "dense", {"avg_sparsity": 0.5})
    assert float(found.spent["avg_sparsity"]) >= 0.5
    zeros = sum(spec.sparsity.fraction for spec in found.plan.layers.values() if spec.sparsity)
    assert zeros > 0
    assert not any(spec.scheme for spec in found.plan.layers.values())
    assert found.point.predicted <= found.uniform[1].predicted + 1e-9


def test_bits_and_zeros_have_a_budget_each(llama, folder):
    options = tuple(LayerSpec(Scheme(bits, 32), zeros) for bits in (3, 8) for zeros in (None, Sparsity(0.5)))
    found = llama.search(folder, options, limits={"avg_bits": 6.0, "avg_sparsity": 0.3})
    assert float(found.spent["avg_bits"]) <= 6
    assert float(found.spent["avg_sparsity"]) >= 0.3
    with pytest.raises(CompressError, match=r"--avg-sparsity 0\.6 is out of reach: plans range from 0\.5 to 0"):
        llama.search(folder, options, limits={"avg_bits": 6.0, "avg_sparsity": 0.6})


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "resnet",
        "qwen3_moe",
        pytest.param("mobilenet", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_other_models(tmp_path, family):
    there = opened(family, tmp_path, samples=4)
    options = (LayerSpec(Scheme(2, 16)), LayerSpec(Scheme(8, 16)))
    found = there.search(tmp_path, options, limits={"size": middle(there, tmp_path, options)})
    bits = {spec.scheme.bits for spec in found.plan.layers.values()}
    assert bits == {2, 8}
    assert found.blocks == there.anatomy.blocks
    assert found.uniform[0].size < found.point.size < found.uniform[1].size


def middle(there, folder, options) -> int:
    """The size half way between the smallest and the largest plan, as the error says them."""
    with pytest.raises(CompressError) as error:
        there.search(folder, options, limits={"size": 1})
    low, high = (float(word.rstrip("MB")) for word in str(error.value).partition("from ")[2].split(" with")[0].split(" to "))
    return round((low + high) / 2 * 1e6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(limits={"avg_bits": 2.0}), "--avg-bits 2 is out of reach"),
        (dict(limits={"latency": 0.5}), "--latency needs times of this machine"),
        (dict(pins=["nowhere=8"]), "matches no layer"),
        (
            dict(options=(LayerSpec(), LayerSpec(None, Sparsity.of("2:5", None))), limits={"avg_sparsity": 0.3}),
            "Pattern 2:5 does not fit",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_work(llama, tmp_path, given, said):
    with pytest.raises(CompressError, match=said):
        llama.search(tmp_path, **given)
    assert not (tmp_path / "library").exists()


def test_perplexity_is_for_causal_models(tmp_path):
    there = opened("bert", tmp_path, samples=2)
    with pytest.raises(CompressError, match="does not predict the next token"):
        there.search(tmp_path, limits={"max_ppl_increase": 0.1})
    assert not (tmp_path / "library").exists()


def test_searching_again_solves_nothing(llama, folder, monkeypatch):
    llama.search(folder)
    monkeypatch.setattr(search_module.library, "solve", None)
    found = llama.search(folder, limits={"avg_bits": 5.0}, pins=["q_proj=4"])
    assert float(found.spent["avg_bits"]) <= 5


def test_the_model_is_as_it_was(tmp_path):
    there = opened("llama", tmp_path, samples=2)
    before = {name: tensor.clone() for name, tensor in there.model.state_dict().items()}
    there.search(tmp_path, method="interlayer", refine=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in there.model.state_dict().items())
    assert models.anatomy(there.model) == there.anatomy
