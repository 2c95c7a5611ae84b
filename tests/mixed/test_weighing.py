"""Moments of outputs by one backward pass and by several, and what memory they are said to need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from compress import experts, models
from compress.errors import CompressError
from compress.mixed import derivatives, gradients, weighing
from compress.mixed.weighing import Weighing
from compress.progress import silent
from tests import tiny
from tests.mixed import toys
from tests.mixed.toys import CPU


def blocks_of(model):
    anatomy = models.anatomy(model)
    return [anatomy.of_block(name) for name in anatomy.blocks]


def build(family, **changes):
    model = tiny.build(family, **changes)
    experts.split(model, every=True)
    model.config.use_cache = False
    return model


def test_every_block_gets_the_same_moments_whatever_fits_at_a_time(monkeypatch):
    for family in ("llama", "gpt2", "mixtral", "gemma3", "vit"):
        model, inputs = build(family), tiny.inputs(family, samples=6, length=12)
        blocks = blocks_of(model)
        goal = derivatives.objective(model, inputs, asked="kl")
        expected = gradients.output_moments(model, [layer for block in blocks for layer in block], inputs, goal, CPU)
        for at_a_time in (1, 2, len(blocks)):
            monkeypatch.setattr(Weighing, "_fitting", lambda _self, left, count=at_a_time: min(count, len(left)))
            weighed = Weighing.of(model, models.anatomy(model), inputs, CPU, silent)
            found = list(weighed.moments(model, blocks, inputs))
            assert [list(one) for one in found] == [[layer.name for layer in block] for block in blocks]
            assert all(torch.equal(moment, expected[name]) for one in found for name, moment in one.items())
            assert weighed.passes == -(-len(blocks) // at_a_time)
            assert len(weighed.notes) == (weighed.passes > 1)


def test_a_pass_waits_until_its_blocks_are_asked_for(monkeypatch):
    model, inputs = build("gemma3"), tiny.inputs("gemma3")
    monkeypatch.setattr(Weighing, "_fitting", lambda _self, left: min(4, len(left)))
    seen: list[str] = []

    def track(steps, total, name):
        seen.append(name)
        steps = list(steps)
        assert len(steps) == total
        return steps

    weighed = Weighing.of(model, models.anatomy(model), inputs, CPU, track)
    moments = weighed.moments(model, blocks_of(model), inputs)
    assert seen == []
    for _ in range(4):
        next(moments)
        assert seen == ["weighing outputs by the loss, blocks 1 to 4 of 6"]
    assert len(list(moments)) == 2
    assert seen[1:] == ["weighing outputs by the loss, blocks 5 to 6 of 6"]
    assert weighed.notes == ("Memory did not hold what gradients say about all blocks at once: that took 2 backward passes.",)


def test_layers_that_are_not_asked_for_cost_no_pass():
    model, inputs = build("llama"), tiny.inputs("llama")
    weighed = Weighing.of(model, models.anatomy(model), inputs, CPU, silent)
    assert list(weighed.moments(model, [[], []], inputs)) == [{}, {}]
    assert (weighed.passes, weighed.notes) == (0, ())


def test_blocks_go_together_as_far_as_memory_goes(monkeypatch):
    model = build("gemma3")
    blocks = blocks_of(model)
    one = 4 * sum(layer.N**2 for layer in blocks[0])
    largest = 4 * max(layer.N for layer in blocks[0]) ** 2
    for free, machine, expected in (
        (1000 + largest + 3 * one, 1 << 40, 3),
        (1000 + largest + 3 * one - 1, 1 << 40, 2),
        (1 << 40, 2 * (largest + 5 * one), 5),
        (1 << 40, 1 << 40, 6),
        (0, 0, 1),
    ):
        memory = {"cpu": machine, "meta": free}
        monkeypatch.setattr(weighing, "free_memory", lambda device, memory=memory: memory[device.type])
        assert Weighing(torch.device("meta"), silent, 1000)._fitting(blocks) == expected


def test_a_model_that_does_not_fit_is_refused_with_numbers_before_it_is_copied(monkeypatch):
    model, inputs = build("llama").bfloat16(), tiny.inputs("llama")
    anatomy = models.anatomy(model)
    copied = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert derivatives.copied_bytes(model, CPU) == copied
    assert derivatives.copied_bytes(model.float(), CPU) == 0
    model.bfloat16()
    goal = derivatives.objective(model, inputs, asked="kl")
    graph = gradients.graph_bytes(model, anatomy.layers, inputs, goal, CPU)
    block = 4 * (3 * 64**2 + 2 * 32**2 + 2 * 96**2) + 4 * 96**2
    copies: list[nn.Module] = []
    deepcopy = derivatives.copy.deepcopy

    def spy(model, *memo):
        copies.extend([] if memo else [model])
        return deepcopy(model, *memo)

    monkeypatch.setattr(derivatives.copy, "deepcopy", spy)
    for free, more in ((copied + block - 1, True), (copied + graph + block - 1, False)):
        monkeypatch.setattr(weighing, "free_memory", lambda _device, free=free: free)
        with pytest.raises(CompressError, match=r"--effort best needs .*GB.* on cpu: .*float32.*--effort default") as error:
            Weighing.of(model, anatomy, inputs, CPU, silent)
        assert ("more than" in str(error.value)) == more
        assert len(copies) == (not more)
    monkeypatch.setattr(weighing, "free_memory", lambda _device: copied + graph + block)
    assert Weighing.of(model, anatomy, inputs, CPU, silent).needed == copied + graph


def test_a_loss_without_a_gradient_is_refused_and_the_lower_level_named(monkeypatch):
    model, inputs = toys.toy(nn.Linear(4, 3)), {"x": torch.ones(4, 4, dtype=torch.float64)}
    layers = toys.layers_of(model)
    anatomy = models.Anatomy(("",), tuple(layers), {})
    made = weighing.derivatives.objective

    def without_gradient(*args, **kwargs):
        goal = toys.objective(lambda out: out.argmax(1).double().mean())
        return replace(made(*args, **kwargs), loss=goal.loss)

    monkeypatch.setattr(weighing.derivatives, "objective", without_gradient)
    with pytest.raises(CompressError, match=r"loss of Toy is not differentiable\. Use --effort default"):
        Weighing.of(model, anatomy, inputs, CPU, silent)


def test_the_graph_is_what_is_saved_beside_the_weights_and_three_of_the_largest():
    torch.manual_seed(0)
    model = toys.toy(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    inputs = {"x": torch.randn(3, 4, dtype=torch.float64)}
    goal = toys.objective(lambda out: out.square().sum(1).mean())
    layers = toys.layers_of(model)
    first, second = 8 * 3 * 6, 8 * 3 * 5  # what tanh saves; the second one's is what the square saves, too
    mean = 8
    assert gradients.graph_bytes(model, layers, inputs, goal, CPU) == first + second + mean + 3 * first
    assert gradients.graph_bytes(model, layers[1:], inputs, goal, CPU) == second + mean + 3 * second
