"""Exchanged layers: what the loss is, that everything goes back, and that shorter passes find the same."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import compress
from compress import evaluate, models
from compress.errors import CompressError
from compress.mixed import measure
from compress.mixed.measure import Swaps
from compress.models import from_matrix, weight_of
from compress.qtensor import dense
from compress.spec import LayerSpec, Scheme
from tests.mixed import searched
from tests.mixed.searched import Opened, opened

TWO, FOUR = LayerSpec(Scheme(2, 32)), LayerSpec(Scheme(4, 32))
FAMILIES = ["llama", "gemma3", "gpt2", "bloom", "qwen3_moe", "roberta", "mpnet", "resnet", "vit"]


@pytest.fixture(scope="module")
def models_by_family(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("measure"), {}

    def of(family: str) -> Opened:
        if family not in made:
            made[family] = opened(family, folder / family)
            made[family].space([TWO, FOUR])
        return made[family]

    return of


@pytest.fixture(scope="module")
def llama(models_by_family) -> Opened:
    return models_by_family("llama")


def exchanged(there: Opened, specs) -> nn.Module:
    """The model with these layers put in by hand."""
    model, layers = copy.deepcopy(there.model), {layer.name: layer for layer in there.anatomy.layers}
    for name, spec in specs.items():
        weight = weight_of(model.get_submodule(name))
        with torch.no_grad():
            weight.copy_(from_matrix(dense(there.library.solved(layers[name], spec)), layers[name].kind, weight.shape))
    return model


def fitted(there: Opened, spec: LayerSpec, part: str = "") -> dict[str, LayerSpec]:
    return {name: LayerSpec(spec.scheme.fit(K)) for name, K in there.anatomy.in_features.items() if part in name}


@pytest.mark.parametrize("part", ["", "layers.1.mlp", "q_proj"])
def test_the_loss_is_the_divergence_that_eval_reports(llama, part):
    specs = fitted(llama, TWO, part)
    expected = evaluate.compare(exchanged(llama, specs), llama.model, llama.judged["input_ids"])
    swaps = llama.swaps()
    assert swaps.loss(specs) == pytest.approx(expected.kl, rel=1e-4)
    base, after = swaps.nll({}), swaps.nll(specs)
    assert base == pytest.approx(math.log(expected.base_perplexity), rel=1e-5)
    assert after == pytest.approx(math.log(expected.perplexity), rel=1e-5)
    some = evaluate.compare(exchanged(llama, specs), llama.model, llama.judged["input_ids"][:3])
    assert swaps.loss(specs, 3) == pytest.approx(some.kl, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_that_begin_later_find_what_whole_passes_do(models_by_family, family):
    there = models_by_family(family)
    swaps = there.swaps()
    block = there.anatomy.blocks[-1]
    last = fitted(there, TWO, block)
    model = exchanged(there, last)
    with torch.no_grad():
        after, before = (one(**there.judged) for one in (model, there.model))
    expected = reference(after, before)
    assert swaps.loss(last) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert swaps.loss(last) > 1e-7
    blocks = len(there.anatomy.blocks)
    assert swaps.forwards == pytest.approx(2 / blocks)


def reference(after, before) -> float:
    if "logits" not in before:
        return ((after[0] - before[0]).square().sum() / before[0].square().sum()).item()
    log_q, log_p = (one.logits.double().flatten(0, -2).log_softmax(-1) for one in (after, before))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_back_is_exactly_as_it_was(models_by_family, family):
    there = models_by_family(family)
    before = {name: tensor.clone() for name, tensor in there.model.state_dict().items()}
    swaps = there.swaps()
    with torch.no_grad():
        whole = swaps.model(**there.judged)[0].clone()
        swaps.loss(fitted(there, TWO))
        swaps.loss({})
        assert torch.equal(swaps.model(**there.judged)[0], whole)
    for name, tensor in swaps.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in there.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert swaps.loss({}) == pytest.approx(0, abs=1e-6)


def test_one_exchange_after_another_is_as_if_it_were_the_first(llama):
    steps = [fitted(llama, TWO, "layers.1"), fitted(llama, FOUR), fitted(llama, TWO, "mlp"), fitted(llama, TWO, "layers.1"), {}]
    swaps = llama.swaps()
    found = [swaps.loss(specs) for specs in steps]
    assert found == [llama.swaps().loss(specs) for specs in steps]
    assert found[0] == found[3]


def test_without_a_cache_it_is_the_same(llama, monkeypatch):
    specs = fitted(llama, TWO)
    cached = llama.swaps()
    found = cached.loss(specs)
    assert len(cached.cache) == len(specs)
    monkeypatch.setattr(measure, "free_memory", lambda _: 4 * 64 * 96 * 4)
    small = llama.swaps()
    assert small.loss(specs) == found
    assert 0 < len(small.cache) < len(specs)
    assert sum(one.nbytes for one in small.cache.values()) <= 64 * 96 * 4
    assert small.loss({}) == pytest.approx(0, abs=1e-6)
    assert small.loss(specs) == found


def test_padding_does_not_count(llama):
    """Padded windows are judged as if each were run alone without its padding."""
    specs, ids = fitted(llama, TWO), llama.judged["input_ids"][:4]
    lengths = [16, 9, 12, 5]
    mask = torch.tensor([[1] * n + [0] * (16 - n) for n in lengths])
    swaps = llama.swaps({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
    alone = [llama.swaps({"input_ids": row[None, :n]}) for row, n in zip(ids, lengths, strict=True)]
    losses = [one.loss(specs) for one in alone]
    assert swaps.loss(specs) == pytest.approx(
        sum(n * one for n, one in zip(lengths, losses, strict=True)) / sum(lengths), rel=1e-4
    )
    nll = sum((n - 1) * one.nll(specs) for n, one in zip(lengths, alone, strict=True)) / (sum(lengths) - 4)
    assert swaps.nll(specs) == pytest.approx(nll, rel=1e-4)


def test_samples_are_taken_over_batches(llama, monkeypatch):
    whole = llama.swaps()
    specs = fitted(llama, TWO)
    real = measure.batches_of
    monkeypatch.setattr(measure, "batches_of", lambda inputs: real(inputs, 3 * 16))
    split = llama.swaps()
    assert split.samples == [3, 3, 2]
    assert (whole.tokens, split.tokens) == (16, 16)
    for samples in (None, 1, 3, 4, 8, 99):
        assert split.loss(specs, samples) == pytest.approx(whole.loss(specs, samples), rel=1e-4)
    later = fitted(llama, TWO, "layers.1")
    assert split.loss(later, 5) == pytest.approx(whole.loss(later, 5), rel=1e-4)
    before = split.forwards
    split.loss(later, 4)
    assert split.forwards - before == pytest.approx(4 / 8 / 2)


def test_it_runs_in_the_dtype_of_the_settings(llama):
    swaps = Swaps(llama.model, llama.anatomy, llama.judged, llama.library, searched.settings(torch.bfloat16))
    assert {parameter.dtype for parameter in swaps.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in llama.model.parameters()} == {torch.float32}
    specs = fitted(llama, TWO)
    assert swaps.loss(specs) == pytest.approx(llama.swaps().loss(specs), rel=0.1)


def test_a_quantized_folder_measures_the_same(tmp_path):
    """The search's promise is about the checkpoint that comes out."""
    there = opened("llama", tmp_path)
    specs = there.space([FOUR]).plan([0] * 8)
    compress.quantize(tmp_path / "model", out=tmp_path / "out", plan=specs, method="rtn")
    folder = compress.load(tmp_path / "out")
    nearest = opened("llama", tmp_path / "again")
    nearest.settings = replace(nearest.settings, quantizer="rtn")
    nearest.space([FOUR])
    expected = evaluate.compare(folder, there.model, there.judged["input_ids"]).kl
    assert nearest.swaps().loss(specs.layers) == pytest.approx(expected, rel=1e-3)


def test_images_are_judged_one_by_one(models_by_family):
    swaps = models_by_family("resnet").swaps()
    assert swaps.tokens == 1
    with pytest.raises(CompressError, match="does not predict the next token"):
        swaps.nll({})


def test_a_model_that_predicts_no_numbers_is_named(llama):
    broken = copy.deepcopy(llama.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    with pytest.raises(CompressError, match="LlamaForCausalLM predicts NaN or infinite values"):
        Swaps(broken, models.anatomy(broken), llama.judged, llama.library, llama.settings)


def test_an_exchange_that_overflows_is_infinitely_bad(llama, monkeypatch):
    swaps = llama.swaps()
    monkeypatch.setattr(Swaps, "_weight", lambda _self, layer, _spec: torch.full((layer.N, layer.K), torch.nan))
    assert swaps.loss(fitted(llama, TWO, "up_proj")) == math.inf
