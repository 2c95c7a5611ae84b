"""Whole models pruned on their loss: counts, schedules, determinism, and what cannot be done."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from compress import models
from compress.errors import CompressError
from compress.fisher import prune, units
from compress.fisher.factor import factorise
from compress.fisher.prune import Options
from compress.sequential import Settings, SolvedLayer
from compress.solvers.options import Options as SolverOptions
from compress.spec import LayerSpec, Plan, Scheme, Sparsity
from tests import tiny

SETTINGS = Settings("gptq", "alps", SolverOptions(), torch.device("cpu"), torch.float32, torch.float32)
SMALL = Options(gradients=8, recompute=2, block=32, greedy=False)
WHOLE = {"obert": 32, "mfac": 0}  # blocks by method
FFN = "bert.encoder.layer.1.output.dense"


def inputs(family: str = "bert") -> dict[str, torch.Tensor]:
    found = tiny.inputs(family, samples=16, length=8)
    return {**found, "labels": torch.arange(16) % 2} if family == "bert" else found


def solve(
    model: nn.Module, sparsity: Sparsity, options: Options = SMALL, data: dict[str, torch.Tensor] | None = None
) -> dict[str, SolvedLayer]:
    anatomy = models.anatomy(model)
    plan = Plan.uniform(anatomy.in_features, None, sparsity)
    blocks = list(prune.run(model, anatomy, plan, inputs() if data is None else data, SETTINGS, options))
    assert tuple(block.name for block in blocks) == anatomy.blocks
    found = {one.layer.name: one for block in blocks for one in block.layers}
    assert list(found) == [layer.name for layer in anatomy.layers]
    return found


def zeros(found: dict[str, SolvedLayer]) -> dict[str, int]:
    return {name: int((one.solved.weight == 0).sum()) for name, one in found.items()}


@pytest.mark.parametrize(("method", "greedy"), [("obert", True), ("obert", False), ("mfac", False)])
@pytest.mark.parametrize("fraction", [0.3, 0.777])
def test_all_layers_together_have_the_zeros_that_were_asked_for(method, greedy, fraction):
    options = replace(SMALL, method=method, block=WHOLE[method], greedy=greedy)
    found = solve(tiny.build("bert"), Sparsity(fraction), options)
    counts = zeros(found)
    sizes = {name: one.layer.N * one.layer.K for name, one in found.items()}
    assert sum(counts.values()) == sum(round(fraction * size) for size in sizes.values())
    assert len({counts[name] / sizes[name] for name in counts}) > 1, "the threshold is global"
    for name, one in found.items():
        assert one.spec.sparsity.pruned(one.layer.N, one.layer.K) == counts[name]
        assert one.output_error is None
        assert 0 < one.weight_error < 2
        assert one.solved.notes == ()


def test_a_threshold_by_layer_keeps_to_the_plan():
    found = solve(tiny.build("bert"), Sparsity(0.6), replace(SMALL, threshold="layer"))
    assert zeros(found) == {name: round(0.6 * one.layer.N * one.layer.K) for name, one in found.items()}


@pytest.mark.parametrize(
    ("pattern", "per_group", "method", "greedy"),
    [("2:4", 2, "obert", True), ("2:4", 2, "obert", False), ("2:4", 2, "mfac", False), ("1:4", 3, "obert", False),
     ("4:8", 4, "mfac", False)],
)  # fmt: skip
def test_nm_groups_have_their_zeros(pattern, per_group, method, greedy):
    sparsity = Sparsity.of(pattern, None)
    options = replace(SMALL, method=method, block=WHOLE[method], greedy=greedy)
    for one in solve(tiny.build("bert"), sparsity, options).values():
        groups = (one.solved.weight == 0).view(one.layer.N, -1, sparsity.nm[1]).sum(-1)
        assert bool((groups == per_group).all())
        assert one.spec.sparsity == sparsity


@pytest.mark.parametrize(("method", "greedy"), [("obert", True), ("obert", False), ("mfac", False)])
def test_blocks_are_zero_as_a_whole(method, greedy):
    options = replace(SMALL, method=method, block=WHOLE[method], greedy=greedy)
    found = solve(tiny.build("bert"), Sparsity(0.5, "block:1x4"), options)
    blocks = torch.cat([(one.solved.weight == 0).view(-1, 4) for one in found.values()])
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert int(blocks.all(-1).sum()) == len(blocks) // 2


@pytest.mark.parametrize("family", ["gpt2", "resnet", "distilbert", "roberta"])
def test_other_families(family):
    found = solve(tiny.build(family), Sparsity(0.5), SMALL, inputs(family))
    assert sum(zeros(found).values()) == sum(round(0.5 * one.layer.N * one.layer.K) for one in found.values())
    for one in found.values():
        assert one.solved.weight.shape == (one.layer.N, one.layer.K)


def test_every_step_keeps_the_same_fraction():
    found = [1.0, *prune.densities(0.2, 4)]
    assert found[-1] == 0.2
    assert [b / a for a, b in pairwise(found)] == pytest.approx([0.2**0.25] * 4)
    assert prune.densities(0.3, 1) == [0.3]


def test_the_steps_of_a_run_follow_the_schedule(monkeypatch):
    model, seen = tiny.build("bert"), []
    update = prune.METHODS["obert"].update

    def spy(w, G, pruned, damping, block):
        seen.append((len(w), int(pruned.sum())))
        return update(w, G, pruned, damping, block)

    monkeypatch.setattr(prune.METHODS["obert"], "update", spy)
    layers = len(solve(model, Sparsity(0.8), replace(SMALL, recompute=3)))
    for step, density in enumerate([0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2]):
        sizes, pruned = zip(*seen[step * layers : (step + 1) * layers], strict=True)
        assert abs(sum(pruned) - (1 - density) * sum(sizes)) <= layers  # a spec rounds layer by layer
    assert len(seen) == 3 * layers


def test_what_is_pruned_in_a_step_stays_pruned(monkeypatch):
    masks: dict[int, list[torch.Tensor]] = {}
    update = prune.METHODS["obert"].update

    def spy(w, G, pruned, damping, block):
        assert not G[:, w == 0].any(), "the gradients of pruned weights are masked"
        masks.setdefault(len(seen) % 12, []).append(pruned.clone())
        seen.append(None)
        return update(w, G, pruned, damping, block)

    seen: list[None] = []
    monkeypatch.setattr(prune.METHODS["obert"], "update", spy)
    assert len(solve(tiny.build("bert"), Sparsity(0.7), replace(SMALL, recompute=3))) == 12
    for each in masks.values():
        for before, after in pairwise(each):
            assert not bool((before & ~after).any())


def test_both_methods_agree_where_their_blocks_do():
    model = tiny.build("bert")
    anatomy = models.anatomy(model)
    plan = Plan({name: LayerSpec(None, Sparsity(0.5) if name == FFN else None) for name in anatomy.in_features})
    found = []
    for method in ("obert", "mfac"):
        options = replace(SMALL, method=method, block=512, greedy=False)
        (one,) = [one for block in prune.run(model, anatomy, plan, inputs(), SETTINGS, options) for one in block.layers]
        found.append(one.solved.weight)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["obert", "mfac"])
def test_the_model_is_left_alone_and_the_result_repeats(method):
    model = tiny.build("bert", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = replace(SMALL, method=method, block=WHOLE[method])
    first, second = solve(model, Sparsity(0.6), options), solve(model, Sparsity(0.6), options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(first[name].solved.weight, second[name].solved.weight) for name in first)
    other = solve(model, Sparsity(0.6), replace(options, seed=1))
    assert any(not torch.equal(first[name].solved.weight, other[name].solved.weight) for name in first)


def test_the_loss_rises_less_than_with_the_smallest_weights_gone():
    """The whole chain does what it is for: on a model whose loss has been trained down on the data."""
    model, data = tiny.build("bert"), inputs()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    dense = model(**data).loss.item()
    found = solve(model, Sparsity(0.8), replace(SMALL, gradients=16, recompute=4), data)
    weights = {name: models.weight_of(model.get_submodule(name)) for name in found}
    everything = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    smallest = everything.kthvalue(sum(zeros(found).values())).values
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    losses = []
    ours, simple = {n: one.solved.weight for n, one in found.items()}, {n: w * (w.abs() > smallest) for n, w in kept.items()}
    for replaced in (ours, simple):
        for name, weight in weights.items():
            weight.data = replaced[name]
        losses.append(model(**data).loss.item() - dense)
    assert losses[0] < 0.5 * losses[1]


def test_a_layer_that_the_loss_does_not_reach_is_named():
    model = tiny.build("bert")
    model.bert.encoder.layer[1].spare = nn.Linear(64, 32)
    with pytest.raises(CompressError, match=r"classification loss does not reach bert\.encoder\.layer\.1\.spare: .* --skip"):
        solve(model, Sparsity(0.5))


def test_a_fisher_of_zeros_is_refused():
    model = tiny.build("bert")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(CompressError, match="All gradients of the classification loss are zero, and so is the Fisher"):
        solve(model, Sparsity(0.5))


def test_labels_that_are_missing_are_asked_for():
    with pytest.raises(CompressError, match="The classification loss needs labels, and the data has none"):
        solve(tiny.build("bert"), Sparsity(0.5), replace(SMALL, loss="classification"), tiny.inputs("bert"))


@pytest.mark.parametrize("pattern", ["block:2x4", "row"])
def test_patterns_over_several_rows_are_refused(pattern):
    with pytest.raises(CompressError, match=f"cannot do pattern {pattern}"):
        solve(tiny.build("bert"), Sparsity(0.5, pattern))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "There is no method magic; choose one of obert, mfac"),
        ({"threshold": "row"}, "The threshold is row; choose global or layer"),
        ({"damping": 0.0}, "damping is 0; it is a fraction of the Fisher's mean diagonal"),
        ({"recompute": 0}, "recompute 0; use at least 1 of each"),
        ({"block": 0}, "The Fisher block is 0"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(CompressError, match=message):
        replace(SMALL, **changes)


def test_damping_that_is_too_small_is_said():
    with pytest.raises(CompressError, match="The Fisher is not positive definite to working precision"):
        factorise(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).expand(3, 2, 2))


def test_blocks_are_whole_units_where_nobody_chose_them():
    assert Options(method="obert").block_of(1000, 6) == 60
    assert Options(method="mfac").block_of(1000, 1) == 2048
    assert Options(method="mfac", block=0).block_of(1000, 4) == 1000


def test_what_does_not_fit_together_is_said_before_any_work():
    model = tiny.build("bert")
    anatomy = models.anatomy(model)
    with pytest.raises(CompressError, match=r"blocks of 30 weights cut through units of 4 weights\. Use a multiple of 4"):
        solve(model, Sparsity(0.5, "2:4"), replace(SMALL, block=30))
    with pytest.raises(CompressError, match="17 gradients of 1 samples need 17 samples, and there are 16"):
        solve(model, Sparsity(0.5), replace(SMALL, gradients=17))
    for spec, message in [(LayerSpec(Scheme(4, 32), Sparsity(0.5)), "obert only prunes"), (LayerSpec(), "prunes nothing")]:
        plan = Plan(dict.fromkeys(anatomy.in_features, spec))
        with pytest.raises(CompressError, match=message):
            next(prune.run(model, anatomy, plan, inputs(), SETTINGS, SMALL))


def test_a_layer_that_stays_dense_is_left_out():
    model = tiny.build("bert")
    anatomy = models.anatomy(model)
    specs = dict.fromkeys(anatomy.in_features, LayerSpec(None, Sparsity(0.5)))
    plan = Plan(specs | {FFN: LayerSpec()})
    blocks = list(prune.run(model, anatomy, plan, inputs(), SETTINGS, SMALL))
    assert FFN not in [one.layer.name for block in blocks for one in block.layers]


def test_units_are_counted_as_the_pattern_says():
    assert units.count(Sparsity(0.5, "2:4"), 3, 8) == 6
    assert units.count(Sparsity(0.5, "block:1x4"), 3, 8) == 3
    assert units.count(Sparsity(0.25), 3, 8) == 6
