from __future__ import annotations

import copy
import itertools

import pytest
import torch

from compress import finetune, models, sequential
from compress.errors import CompressError
from compress.progress import silent
from compress.qtensor import dense
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme, Sparsity
from tests import tiny

SETTINGS = Settings("gptq", "magnitude", Options(refit=False), torch.device("cpu"), torch.float32, torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.load(tiny.save("llama", tmp_path_factory.mktemp("llama")))


def tuned(model, steps, sparsity=0.6, pattern="unstructured", track=silent):
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    plan = Plan.uniform(anatomy.in_features, None, Sparsity.of(pattern, None if ":" in pattern else sparsity))

    def prune(student, at):
        return sequential.run(student, anatomy, at, None, SETTINGS)

    inputs = tiny.inputs("llama")
    blocks = finetune.gradual(model, anatomy, plan, inputs, SETTINGS, prune, steps, seed=0, track=track)
    return {one.layer.name: one for block in blocks for one in block.layers}


def test_sparsity_grows_by_a_cubic_schedule():
    plans = finetune.schedule(Plan({"a": LayerSpec(None, Sparsity(0.8)), "b": LayerSpec()}))
    fractions = [plan.layers["a"].sparsity.fraction for plan in plans]
    assert fractions[0] == pytest.approx(0.8 * finetune.FIRST_SPARSITY)
    assert fractions[-1] == 0.8
    rises = [later - earlier for earlier, later in itertools.pairwise(fractions)]
    assert rises == sorted(rises, reverse=True)
    assert all(plan.layers["b"].dense for plan in plans)


def test_an_nm_pattern_is_there_from_the_first_round():
    plan = Plan({"a": LayerSpec(None, Sparsity(0.5, "2:4"))})
    assert finetune.schedule(plan) == [plan]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_and_other_weights_move(llama, pattern):
    before = copy.deepcopy(llama.state_dict())
    solved = tuned(llama, 6, pattern=pattern)
    assert len(solved) == 14
    for name, one in solved.items():
        W, V = models.matrix(llama.get_submodule(name)), dense(one.solved)
        assert int((V == 0).sum()) == one.spec.sparsity.zeros(*V.shape)
        assert not torch.equal(V[V != 0], W[V != 0])
        if pattern == "2:4":
            assert ((V.view(len(V), -1, 4) == 0).sum(-1) == 2).all()
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


def test_the_same_seed_gives_the_same_weights(llama):
    one, two = (tuned(llama, 4) for _ in range(2))
    assert all(torch.equal(dense(one[name].solved), dense(two[name].solved)) for name in one)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_every_step_is_tracked(llama, steps):
    seen = []

    def track(numbers, total, _name):
        assert total == steps
        for number in numbers:
            seen.append(number)
            yield number

    tuned(llama, steps, track=track)
    assert seen == list(range(steps))


def test_a_grid_is_refused(llama):
    anatomy = models.anatomy(llama)
    plan = Plan.uniform(anatomy.in_features, Scheme(4, 32), Sparsity(0.5))
    with pytest.raises(CompressError, match="moves weights off the grid"):
        finetune.gradual(llama, anatomy, plan, tiny.inputs("llama"), SETTINGS, lambda *_: [], 4, seed=0)


def test_hidden_states_teach_a_model_without_logits(tmp_path):
    model = models.load(tiny.save("mpnet", tmp_path))
    anatomy = models.anatomy(model)
    plan = Plan.uniform(anatomy.in_features, None, Sparsity(0.5))
    inputs = tiny.inputs("mpnet")

    def prune(student, at):
        return sequential.run(student, anatomy, at, None, SETTINGS)

    distances = []
    for steps in (0, 30):
        student = copy.deepcopy(model)
        for block in finetune.gradual(model, anatomy, plan, inputs, SETTINGS, prune, steps, seed=0):
            for one in block.layers:
                student.get_submodule(one.layer.name).weight.data = dense(one.solved)
        with torch.no_grad():
            distances.append(float((student(**inputs)[0] - model(**inputs)[0]).square().mean()))
    assert distances[1] < 0.9 * distances[0]
