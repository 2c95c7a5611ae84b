from __future__ import annotations

import copy
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from torch import nn

from compress import evaluate, models, passes, sequential, solvers
from compress.calib import data
from compress.calib.capture import hooks
from compress.calib.stats import LayerStats, rows_of
from compress.errors import CompressError
from compress.mixed import derivatives, gradients
from compress.qtensor import dequantize
from compress.sequential import Settings, SolvedLayer
from compress.solvers import gptq
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
FOUR_BITS = Scheme(4, 32)
EFFORTS = [Options(), Options.of("default")]


def solve(
    model: nn.Module,
    inputs: dict[str, torch.Tensor] | None,
    plan: Plan | None = None,
    method: str = "gptq",
    options: Options = SETTINGS.options,
) -> dict[str, SolvedLayer]:
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    plan = plan or Plan.uniform(anatomy.in_features, FOUR_BITS)
    settings = replace(SETTINGS, quantizer=method, options=options)
    return {one.layer.name: one for block in sequential.run(model, anatomy, plan, inputs, settings) for one in block.layers}


def compressed(model: nn.Module, solved: dict[str, SolvedLayer]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, one in solved.items():
        weight = models.weight_of(model.get_submodule(name))
        weight.data = models.from_matrix(dequantize(one.solved), one.layer.kind, weight.shape).contiguous()
    return model


def seen_by(model: nn.Module, names, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows that every layer multiplies."""
    seen: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, args):
            seen[name] = rows_of(args[0], module).double()

        return hook

    with hooks([model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]), torch.no_grad():
        model(**inputs)
    return seen


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("options", EFFORTS, ids=["fast", "default"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "bloom", "resnet"])
def test_every_layer_is_solved_on_what_it_will_see_in_the_compressed_model(family, options):
    model, inputs = tiny.build(family), tiny.inputs(family)
    solved = solve(model, inputs, options=options)
    finished = compressed(model, solved)
    seen = seen_by(finished, solved, inputs)
    for name, one in solved.items():
        W = models.matrix(model.get_submodule(name)).detach().double()
        x = seen[name]
        assert len(x) == 16 * 24 or family == "resnet"
        error = ((W - dequantize(one.solved).double()) @ x.t()).square().sum() / (W @ x.t()).square().sum()
        assert one.output_error == pytest.approx(float(error), rel=1e-3), name


@pytest.mark.parametrize("options", EFFORTS, ids=["fast", "default"])
def test_starting_passes_again_for_want_of_memory_changes_nothing(monkeypatch, options):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    monkeypatch.setattr(sequential, "TOKENS_AT_A_TIME", 48)  # several batches
    paused = solve(model, inputs, options=options)
    monkeypatch.setattr(passes, "free_memory", lambda _device: 0)
    restarted = solve(model, inputs, options=options)
    assert paused.keys() == restarted.keys()
    for name in paused:
        assert torch.equal(paused[name].solved.codes, restarted[name].solved.codes)
        assert paused[name].output_error == restarted[name].output_error


@pytest.mark.parametrize("options", EFFORTS, ids=["fast", "default"])
def test_the_model_is_left_alone_and_the_result_repeats(options):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (solve(model, inputs, options=options) for _ in range(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(first[k].solved.codes, second[k].solved.codes) for k in first)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "resnet"])
def test_drift_is_that_between_the_dense_and_the_compressed_model(family, monkeypatch):
    model, inputs = tiny.build(family), tiny.inputs(family)
    found: list[tuple[torch.Size, LayerStats]] = []
    correct = sequential.corrected

    def note(weights, stats, options):
        found.append((weights[0].shape, stats))
        return correct(weights, stats, options)

    monkeypatch.setattr(sequential, "corrected", note)
    solved = solve(model, inputs, options=Options.of("default"))
    finished = compressed(model, solved)
    assert not any(one.solved.notes for one in solved.values())
    mine, theirs = (seen_by(m, solved, inputs) for m in (finished, model))
    wanted = []
    for name in solved:
        x, dense = mine[name], theirs[name]
        if not torch.equal(x, dense):
            wanted.append((dense - x).t() @ x / len(x))
    pulls = [stats.drift.whole() for _, stats in found]
    assert len(pulls) >= 3
    for pull in (pull for pull in pulls if not pull.alone):
        C = pull.cross.double()
        nearest = min(float((C - other).norm() / other.norm()) for other in wanted if other.shape == C.shape)
        assert nearest < 1e-3


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", ["llama", "opt", "bert", "gpt_neox"])
def test_what_outputs_are_added_to_is_compared_along_the_way(family, monkeypatch):
    model, inputs = tiny.build(family), tiny.inputs(family)
    norms = {
        "llama": "post_attention_layernorm",
        "opt": "final_layer_norm",
        "bert": "intermediate",
        "gpt_neox": "input_layernorm",
    }
    found: list[LayerStats] = []
    correct = sequential.corrected

    def note(weights, stats, options):
        found.append(stats)
        return correct(weights, stats, options)

    monkeypatch.setattr(sequential, "corrected", note)
    solved = solve(model, inputs, options=Options.of("default"))
    last = models.anatomy(model).blocks[-1]
    name = [layer for layer in solved if layer.startswith(last)][-1]
    attention = f"{last}.attention.dense" if family == "gpt_neox" else None  # added at once with the MLP

    def stream(m: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        seen = seen_by(m, [f"{last}.{norms[family]}", *filter(None, [attention]), name], inputs)
        y, *rest, x = seen.values()
        return (y + m.get_submodule(attention).double()(rest[0]).detach() if attention else y), x

    (y, x), (dense_y, dense_x) = stream(compressed(model, solved)), stream(copy.deepcopy(model))
    step = dense_y - y + (dense_x - x) @ models.matrix(model.get_submodule(name)).detach().double().t()
    torch.testing.assert_close(found[-1].drift.whole().cross.double(), step.t() @ x / len(x), rtol=1e-3, atol=1e-6)
    assert sum(stats.drift.whole().alone for stats in found) == 2 * len(models.anatomy(model).blocks)


@pytest.mark.parametrize(
    ("bits", "last", "narrow"), [(4, Scheme(4, 32), True), (8, Scheme(8, 32), False), (4, Scheme(8, 32), False), (4, None, False)]
)
def test_passes_multiply_in_bfloat16_if_no_layer_keeps_more_than_four_bits(bits, last, narrow, monkeypatch):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    plan = Plan.uniform(models.anatomy(model).in_features, Scheme(bits, 32))
    plan = Plan({**plan.layers, list(plan.layers)[-1]: LayerSpec(last)})
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: False)
    exact = solve(model, inputs, plan)
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: True)
    found = solve(model, inputs, plan)
    assert all(torch.equal(found[name].solved.codes, exact[name].solved.codes) for name in exact) != narrow
    for name in exact:
        assert found[name].output_error == pytest.approx(exact[name].output_error, rel=0.1)


def output_error(model: nn.Module, options: Options, inputs: dict[str, torch.Tensor]) -> float:
    three = Plan.uniform(models.anatomy(model).in_features, Scheme(3, 32))
    finished = compressed(model, solve(model, inputs, three, options=options))
    with torch.no_grad():
        return float((finished(**inputs).logits - model(**inputs).logits).square().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_part_of_the_effort_brings_the_outputs_closer_to_the_dense_models(family):
    model, inputs = tiny.build(family), tiny.inputs(family, samples=64)
    fast, descended, both = (output_error(model, o, inputs) for o in (Options(), Options(sweeps=2), Options.of("default")))
    assert both < descended < fast


class Chosen(nn.Module):
    """A layer that sees the tokens that its input chooses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[..., 0] > x[..., 1]
        out = x.new_zeros(*x.shape[:-1], self.inner.out_features)
        out[chosen] = self.inner(x[chosen])
        return out


def test_a_layer_that_sees_chosen_tokens_is_solved_without_correction_and_says_so():
    model = tiny.build("llama")
    for block in model.model.layers:
        block.mlp.up_proj = Chosen(block.mlp.up_proj)
    solved = solve(model, tiny.inputs("llama"), options=Options.of("default"))
    for name, one in solved.items():
        said = one.solved.notes == ("not corrected for drift: which tokens reach it depends on the layers before",)
        assert said == ("inner" in name)


def test_padding_does_not_count():
    model = tiny.build("llama")
    ids = tiny.inputs("llama", samples=4, length=20)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((4, 6), 5)], 1),
        "attention_mask": torch.cat([torch.ones(4, 20), torch.zeros(4, 6)], 1).long(),
    }
    plain, masked = solve(model, {"input_ids": ids}), solve(model, padded)
    for name in plain:
        assert masked[name].output_error == pytest.approx(plain[name].output_error, rel=0.05), name
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(plain[first].solved.codes, masked[first].solved.codes)


def test_layers_with_one_input_may_have_different_schemes():
    model = tiny.build("llama")
    names = models.anatomy(model).in_features
    plan = {name: LayerSpec(FOUR_BITS) for name in names}
    plan["model.layers.0.self_attn.k_proj"] = LayerSpec(Scheme(8, -1))
    plan["model.layers.0.self_attn.v_proj"] = LayerSpec(None)
    solved = solve(model, tiny.inputs("llama"), Plan(plan))
    assert solved.keys() == names.keys() - {"model.layers.0.self_attn.v_proj"}
    assert solved["model.layers.0.self_attn.k_proj"].solved.scheme == Scheme(8, -1)
    assert solved["model.layers.0.self_attn.k_proj"].output_error < solved["model.layers.0.self_attn.q_proj"].output_error


def test_rounding_to_nearest_needs_no_calibration():
    solved = solve(tiny.build("llama"), None, method="rtn")
    assert len(solved) == 14
    assert all(one.output_error is None and 0 < one.weight_error < 0.05 for one in solved.values())


def test_a_layer_that_is_never_called_stays_dense():
    model = tiny.build("llama")
    model.model.layers[1].spare = nn.Linear(64, 64)
    solved = solve(model, tiny.inputs("llama"))
    assert len(solved) == 14
    assert "model.layers.1.spare" not in solved


def test_nan_in_a_weight_names_the_layer():
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(CompressError, match=r"weight of model\.layers\.1\.mlp\.up_proj has NaN"):
        solve(model, tiny.inputs("llama"))


def test_infinite_activations_name_the_layer():
    model = tiny.build("llama")
    model.model.layers[0].post_attention_layernorm.weight.data[0] = torch.inf
    with pytest.raises(CompressError, match=r"inputs of model\.layers\.0\.mlp\.gate_proj are NaN or infinite"):
        solve(model, tiny.inputs("llama"))


def test_moments_go_to_the_layers_they_are_of(monkeypatch):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    moments = {layer.name: torch.full((layer.N, layer.N), i + 1.0) for i, layer in enumerate(anatomy.layers)}
    seen: list[torch.Tensor] = []

    def spy(W, stats, *rest):
        seen.append(stats.outputs)
        assert stats.outputs.shape == (len(W), len(W))
        return gptq.solve(W, stats, *rest)

    monkeypatch.setattr(solvers.coupled, "solve", spy)
    plan = Plan.uniform(anatomy.in_features, FOUR_BITS)
    solved = [one for block in sequential.run(model, anatomy, plan, inputs, SETTINGS, repeat(moments)) for one in block.layers]
    assert [one.layer.name for one in solved] == [layer.name for layer in anatomy.layers]
    assert len(seen) == 8  # q/k/v, o, gate/up, down
    assert torch.equal(seen[0], torch.block_diag(*(moments[layer.name] for layer in anatomy.layers[:3])))


@pytest.mark.slow
def test_weighing_outputs_by_the_loss_brings_the_model_closer_to_the_dense_one():
    model = models.load(models.REFERENCE).float()
    anatomy, tokenizer = models.anatomy(model), models.tokenizer(models.REFERENCE)
    ids = data.text(None, tokenizer, samples=96, seq_len=128, seed=0).inputs["input_ids"]
    inputs, judged = {"input_ids": ids[:64]}, ids[64:]
    moments = gradients.output_moments(
        model, anatomy.layers, inputs, derivatives.objective(model, inputs, asked="kl"), SETTINGS.device
    )
    plan = Plan.uniform(anatomy.in_features, Scheme(2, 32))
    settings = replace(SETTINGS, options=Options.of("default"))
    divergence = []
    for given in (sequential.NO_MOMENTS, repeat(moments)):
        run = sequential.run(model, anatomy, plan, inputs, settings, given)
        solved = compressed(model, {one.layer.name: one for block in run for one in block.layers})
        divergence.append(evaluate.compare(solved, model, judged).kl)
    assert divergence[1] < 0.97 * divergence[0]
