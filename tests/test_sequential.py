from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress import models, sequential
from compress.calib.capture import hooks
from compress.calib.stats import rows_of
from compress.errors import CompressError
from compress.qtensor import dequantize
from compress.sequential import Settings, SolvedLayer
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
FOUR_BITS = Scheme(4, 32)


def solve(
    model: nn.Module, inputs: dict[str, torch.Tensor] | None, plan: Plan | None = None, method: str = "gptq"
) -> dict[str, SolvedLayer]:
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    plan = plan or Plan.uniform(anatomy.in_features, FOUR_BITS)
    settings = Settings(method, *list(vars(SETTINGS).values())[1:])
    return {one.layer.name: one for block in sequential.run(model, anatomy, plan, inputs, settings) for one in block.layers}


def compressed(model: nn.Module, solved: dict[str, SolvedLayer]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, one in solved.items():
        weight = models.weight_of(model.get_submodule(name))
        weight.data = models.from_matrix(dequantize(one.solved), one.layer.kind, weight.shape).contiguous()
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "bloom", "resnet"])
def test_every_layer_is_solved_on_what_it_will_see_in_the_compressed_model(family):
    model, inputs = tiny.build(family), tiny.inputs(family)
    solved = solve(model, inputs)
    finished = compressed(model, solved)
    seen: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, args):
            seen[name] = rows_of(args[0], module)

        return hook

    with hooks([finished.get_submodule(n).register_forward_pre_hook(note(n)) for n in solved]), torch.no_grad():
        finished(**inputs)
    for name, one in solved.items():
        W = models.matrix(model.get_submodule(name)).detach().double()
        x = seen[name].double()
        assert len(x) == 16 * 24 or family == "resnet"
        error = ((W - dequantize(one.solved).double()) @ x.t()).square().sum() / (W @ x.t()).square().sum()
        assert one.output_error == pytest.approx(float(error), rel=1e-3), name


def test_starting_passes_again_for_want_of_memory_changes_nothing(monkeypatch):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    monkeypatch.setattr(sequential, "TOKENS_AT_A_TIME", 48)  # several batches
    paused = solve(model, inputs)
    monkeypatch.setattr(sequential, "free_memory", lambda _device: 0)
    restarted = solve(model, inputs)
    assert paused.keys() == restarted.keys()
    for name in paused:
        assert torch.equal(paused[name].solved.codes, restarted[name].solved.codes)
        assert paused[name].output_error == restarted[name].output_error


def test_the_model_is_left_alone_and_the_result_repeats():
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = solve(model, inputs), solve(model, inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(first[k].solved.codes, second[k].solved.codes) for k in first)


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


def test_a_layer_that_is_never_called_is_rounded_and_says_so():
    model = tiny.build("llama")
    model.model.layers[1].spare = nn.Linear(64, 32)
    spare = solve(model, tiny.inputs("llama"))["model.layers.1.spare"]
    assert spare.solved.notes == ("solved without calibration: never called on the calibration data",)


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
