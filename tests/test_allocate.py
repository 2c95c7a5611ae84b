from __future__ import annotations

import math

import pytest
import torch

from compress import allocate, models, sequential
from compress.calib.capture import hooks
from compress.calib.stats import rows_of
from compress.errors import CompressError
from compress.models import Anatomy, Layer
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import Plan, Sparsity
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
FRACTIONS = [0.0, 0.013, 1 / 3, 0.5, 0.7, 0.987]


@pytest.fixture(scope="module")
def llama() -> models.PreTrainedModel:
    model = tiny.build("llama")
    model.config.use_cache = False
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)  # blocks that differ
        model.model.layers[0].self_attn.q_proj.weight[:3, :5].mul_(40)
    return model


def shapes(*pairs: tuple[int, int]) -> Anatomy:
    return Anatomy(("b",), tuple(Layer(f"b.{i}", "linear", N, K) for i, (N, K) in enumerate(pairs)), {})


def counts(plan: Plan, anatomy: Anatomy) -> list[int]:
    return [plan.layers[layer.name].sparsity.pruned(layer.N, layer.K) for layer in anatomy.layers]


def total(plan: Plan, anatomy: Anatomy) -> int:
    return sum(counts(plan, anatomy))


def units(anatomy: Anatomy, sparsity: Sparsity) -> int:
    return sum(sparsity.units(layer.N, layer.K) for layer in anatomy.layers)


def allocated(method: str, model: models.PreTrainedModel, anatomy: Anatomy, sparsity: Sparsity) -> Plan:
    inputs = tiny.inputs("llama", 4)
    if method == "uniform":
        return allocate.uniform(anatomy, sparsity)
    if method == "owl":
        return allocate.owl(model, anatomy, inputs, sparsity, SETTINGS)
    if method == "ecoflap":
        return allocate.ecoflap(model, anatomy, inputs, sparsity, SETTINGS)
    return allocate.global_threshold(model, anatomy, None if method == "magnitude" else inputs, sparsity, SETTINGS, method)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("pattern", ["unstructured", "block:1x4", "block:8x2"])
@pytest.mark.parametrize("method", ["uniform", "magnitude", "wanda", "obs", "owl", "ecoflap"])
def test_the_total_is_exact(method, pattern, fraction, llama):
    anatomy, sparsity = models.anatomy(llama), Sparsity(fraction, pattern)
    plan = allocated(method, llama, anatomy, sparsity)
    assert total(plan, anatomy) == round(fraction * units(anatomy, sparsity))
    plan.check(anatomy.shapes)
    assert all(spec.scheme is None and spec.sparsity.pattern == pattern for spec in plan.layers.values())


@pytest.mark.parametrize("fraction", [*FRACTIONS, 0.25, 0.999])
def test_uniform_over_odd_shapes_is_next_to_the_fraction_in_every_layer(fraction):
    anatomy = shapes((3, 7), (11, 13), (1, 2), (17, 1), (5, 5), (101, 103))
    sparsity = Sparsity(fraction)
    if round(fraction * units(anatomy, sparsity)) > units(anatomy, sparsity) - 6:
        with pytest.raises(CompressError, match="Ask for less"):
            allocate.uniform(anatomy, sparsity)
        return
    found = counts(allocate.uniform(anatomy, sparsity), anatomy)
    assert sum(found) == round(fraction * units(anatomy, sparsity))
    for layer, count in zip(anatomy.layers, found, strict=True):
        U = layer.N * layer.K
        assert count < U
        assert abs(count - fraction * U) <= 1 + 6 * fraction or U < 30  # tiny layers keep one weight, others make up for it


def test_a_billion_weights_are_counted_exactly():
    anatomy = shapes((57344, 8191), (28672, 8192), (1023, 4099))
    plan = allocate.uniform(anatomy, Sparsity(0.6180339887))
    assert total(plan, anatomy) == round(0.6180339887 * units(anatomy, Sparsity(0.5)))


def hessians(model: models.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """H of every layer, seen in plain forward passes."""
    found: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, args):
            x = rows_of(args[0], module).double()
            found[name] = x.t() @ x / len(x)

        return hook

    names = models.anatomy(model).in_features
    with hooks([model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]), torch.no_grad():
        model(**inputs)
    return found


def scores(model: models.PreTrainedModel, score: str) -> list[torch.Tensor]:
    H = hessians(model, tiny.inputs("llama", 4))
    found = []
    for layer in models.anatomy(model).layers:
        W = models.matrix(model.get_submodule(layer.name)).detach().double()
        if score == "magnitude":
            found.append(W.square().flatten())
            continue
        h = H[layer.name]
        column = h.diagonal()
        if score == "obs":
            column = 1 / torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).diagonal()
        found.append((W.square() * column / (torch.trace(W @ h @ W.t()) / W.numel())).flatten())
    return found


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "obs"])
def test_the_global_threshold_is_that_of_sorting_all_scores(score, fraction, llama):
    anatomy = models.anatomy(llama)
    every = scores(llama, score)
    threshold = torch.cat(every).sort().values[round(fraction * sum(map(len, every))) - 1]
    expected = [int((one <= threshold).sum()) for one in every]
    inputs = None if score == "magnitude" else tiny.inputs("llama", 4)
    plan = allocate.global_threshold(llama, anatomy, inputs, Sparsity(fraction), SETTINGS, score, cap=1.0)
    differences = [abs(a - b) for a, b in zip(counts(plan, anatomy), expected, strict=True)]
    assert max(differences) <= (0 if score == "magnitude" else 2)  # the others are in float32


def test_one_threshold_by_brute_force_with_ties_and_caps():
    g = torch.Generator().manual_seed(0)
    for trial in range(30):
        layers = [torch.randint(0, 6, (n,), generator=g).float().square() * 1e-3 for n in (7, 1, 20, 13)]
        caps = [int(torch.randint(0, len(one) + 1, (1,), generator=g)) for one in layers]
        for wanted in range(0, sum(caps) + 1, 3):
            found = allocate._below_one_threshold(lambda layers=layers: [one.view(torch.int32) for one in layers], caps, wanted)
            assert sum(found) == wanted, trial
            assert all(count <= cap for count, cap in zip(found, caps, strict=True))
            # no layer may prune above the threshold while another that has room prunes less than all below it
            tops = [one.sort().values[count - 1].item() if count else -math.inf for one, count in zip(layers, found, strict=True)]
            for one, count, cap in zip(layers, found, caps, strict=True):
                if count < cap:
                    assert one.sort().values[count].item() >= max(tops)


def test_no_layer_loses_more_than_the_cap(llama):
    model, anatomy = tiny.build("llama"), models.anatomy(llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1e-6)
    plan = allocate.global_threshold(model, anatomy, None, Sparsity(0.5), SETTINGS, "magnitude")
    small = {name: spec.sparsity.fraction for name, spec in plan.layers.items() if "v_proj" in name}
    assert all(fraction == math.floor(0.99 * 64 * 32) / (64 * 32) for fraction in small.values())
    assert total(plan, anatomy) == round(0.5 * units(anatomy, Sparsity(0.5)))
    with pytest.raises(CompressError, match="Ask for less"):
        allocate.global_threshold(model, anatomy, None, Sparsity(0.995), SETTINGS, "magnitude")


def test_owl_is_the_formula(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    H = hessians(llama, inputs)
    ratios = []
    for block in anatomy.blocks:
        parts = [
            models.matrix(llama.get_submodule(layer.name)).detach().double().abs() * H[layer.name].diagonal().sqrt()
            for layer in anatomy.of_block(block)
        ]
        every = torch.cat([part.flatten() for part in parts])
        ratios.append(float((every > 5 * every.mean()).double().mean()))
    assert ratios[0] != ratios[1]
    scaled = [(r - min(ratios)) / (max(ratios) - min(ratios)) * 0.16 for r in ratios]
    plan = allocate.owl(llama, anatomy, inputs, Sparsity(0.6), SETTINGS)
    for block, more in zip(anatomy.blocks, scaled, strict=True):
        for layer in anatomy.of_block(block):
            expected = 1 - (more - sum(scaled) / 2 + 0.4)
            assert plan.layers[layer.name].sparsity.fraction == pytest.approx(expected, abs=1 / (layer.N * layer.K))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:8", "1:4", "7:8"])
def test_owl_gives_every_block_a_whole_n_of_m(pattern, llama):
    anatomy = models.anatomy(llama)
    plan = allocate.owl(llama, anatomy, tiny.inputs("llama", 4), Sparsity.of(pattern, None), SETTINGS)
    N, M = Sparsity.of(pattern, None).nm
    kept = []
    for block in anatomy.blocks:
        specs = {plan.layers[layer.name].sparsity for layer in anatomy.of_block(block)}
        assert len(specs) == 1
        (n, m) = specs.pop().nm
        assert m == M
        kept.append(n)
    assert sum(kept) == N * len(kept)
    if 1 < N < M - 1:
        assert len(set(kept)) == 2


def test_owl_falls_short_by_less_than_a_step_where_blocks_differ_in_size():
    layers = tuple(Layer(f"b{i}.x", "linear", N, 8) for i, N in enumerate((3, 10, 7, 29)))
    anatomy = Anatomy(tuple(f"b{i}" for i in range(4)), layers, {})
    plan = allocate._owl_nm(anatomy, (4, 8), [0.0, 1.0, 0.3, 0.5])
    kept = sum(plan.layers[layer.name].sparsity.nm[0] * layer.N for layer in layers)
    assert 0 <= 4 * 49 - kept < 29


def test_ecoflap_repeats_and_follows_its_seed(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    first, again, other = (
        allocate.ecoflap(llama, anatomy, inputs, Sparsity(0.5), SETTINGS, seed=seed).to_json() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_ecoflap_keeps_more_of_the_block_that_matters(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    target = llama.model.layers[1].mlp.up_proj.weight

    def loss(model, _batch):
        return (model.get_submodule("model.layers.1.mlp.up_proj").weight * target.detach()).sum()

    plan = allocate.ecoflap(llama, anatomy, inputs, Sparsity(0.5), SETTINGS, loss)
    fraction = {block: plan.layers[f"{block}.mlp.up_proj"].sparsity.fraction for block in anatomy.blocks}
    assert fraction["model.layers.0"] == pytest.approx(0.6, abs=1e-3)  # its floor: the request and 0.1
    assert fraction["model.layers.1"] == pytest.approx(0.4, abs=1e-3)


def test_ecoflap_measures_the_derivative_along_its_noise(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    found = allocate._importance(llama, anatomy, inputs, SETTINGS, allocate.next_token_loss, seed=5)
    generator = torch.Generator().manual_seed(5)
    loss = allocate.next_token_loss(llama, inputs)
    for block, value in zip(anatomy.blocks, found, strict=True):
        weights = [models.weight_of(llama.get_submodule(layer.name)) for layer in anatomy.of_block(block)]
        noise = [torch.randn(weight.shape, generator=generator) for weight in weights]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        slope = sum((g * z).sum() for g, z in zip(gradients, noise, strict=True))
        assert value == pytest.approx(abs(float(slope)), rel=0.05, abs=1e-3)


def test_shares_fill_up_without_overshoot():
    kept = allocate._filled([100, 100, 100, 100], 0.5, [8.0, 1.0, 1.0, 0.0])
    assert kept == pytest.approx([72, 44, 44, 40])  # 40 each, and of the other 40 eight, one and one tenths
    assert allocate._filled([100, 10, 100], 0.2, [1.0, 9.0, 1.0]) == pytest.approx([79, 10, 79])  # the second is full


def test_what_is_refused(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    with pytest.raises(CompressError, match=r"cannot give every layer pattern 2:4; use uniform or owl"):
        allocate.global_threshold(llama, anatomy, inputs, Sparsity.of("2:4", None), SETTINGS)
    with pytest.raises(CompressError, match=r"cannot be given to pattern 2:4; use uniform or owl"):
        allocate.ecoflap(llama, anatomy, inputs, Sparsity.of("2:4", None), SETTINGS)
    with pytest.raises(CompressError, match="Pattern row takes the same number"):
        allocate.uniform(anatomy, Sparsity(0.5, "row"))
    with pytest.raises(CompressError, match=r"Pattern block:1x5 does not fit model\.layers\.0\.self_attn\.q_proj"):
        allocate.owl(llama, anatomy, inputs, Sparsity(0.5, "block:1x5"), SETTINGS)
    one = shapes((8, 8))
    with pytest.raises(CompressError, match="only one"):
        allocate.owl(llama, one, inputs, Sparsity(0.5), SETTINGS)
    bert = tiny.build("bert")
    with pytest.raises(CompressError, match="BertForSequenceClassification predicts no next token"):
        allocate.ecoflap(bert, models.anatomy(bert), inputs, Sparsity(0.5), SETTINGS)


def test_a_loss_that_does_not_react_is_named(llama):
    anatomy, inputs = models.anatomy(llama), tiny.inputs("llama", 4)
    with pytest.raises(CompressError, match="does not react"):
        allocate.ecoflap(llama, anatomy, inputs, Sparsity(0.5), SETTINGS, lambda _model, _batch: torch.tensor(1.0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_dense_statistics_are_those_of_plain_forward_passes(family):
    model, inputs = tiny.build(family), tiny.inputs(family, 4)
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    expected = hessians(model, inputs)
    seen = []
    for layer, W, stats in sequential.dense_stats(model, anatomy, inputs, SETTINGS):
        seen.append(layer.name)
        torch.testing.assert_close(stats.H.double(), expected[layer.name], rtol=1e-3, atol=1e-4)
        assert torch.equal(W, models.matrix(model.get_submodule(layer.name)))
    assert sorted(seen) == sorted(anatomy.in_features)
