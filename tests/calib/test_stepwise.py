from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import nn

from compress.calib.capture import hooks
from compress.calib.stepwise import Stepwise, pause_at


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)


def test_a_pass_sees_weights_as_they_are_when_it_goes_on():
    model, x = net(), torch.randn(3, 4)
    middle = model[1](model[0](x))
    one = Stepwise(lambda: model(x))
    with hooks([pause_at(model[2])]):
        assert torch.equal(one.advance(), middle)
    model[2].weight.zero_()
    model[2].bias.fill_(1)
    assert one.advance() is None
    assert torch.equal(one.output, model[3](torch.ones(3, 4)))


def test_many_passes_pause_at_one_module_and_then_at_the_next():
    model, xs = net(), [torch.randn(1, 4) for _ in range(5)]
    passes = [Stepwise(lambda x=x: model(x)) for x in xs]
    for module in (model[0], model[2]):
        with hooks([pause_at(module)]):
            assert all(one.advance() is not None for one in passes)
    assert all(one.advance() is None for one in passes)
    for one, x in zip(passes, xs, strict=True):
        assert torch.equal(one.output, model(x))


def test_a_pass_that_waits_at_a_module_has_reached_it():
    model, x = net(), torch.randn(3, 4)
    one = Stepwise(lambda: model(x))
    for module in (model[0], model[2]):
        with hooks([pause_at(module)]):
            first = one.reach(module)
            assert one.at is module
            assert one.reach(module) is first
    assert one.reach(model[0]) is None
    assert one.at is one.seen is None
    assert torch.equal(one.output, model(x))


def test_cancelling_ends_the_thread_wherever_it_is():
    model = net()
    before = threading.active_count()
    fresh, paused = Stepwise(lambda: model(torch.ones(1, 4))), Stepwise(lambda: model(torch.ones(1, 4)))
    with hooks([pause_at(model[2])]):
        paused.advance()
    fresh.cancel()
    paused.cancel()
    paused.cancel()
    assert threading.active_count() == before
    assert paused.output is None


def test_errors_reach_the_caller():
    def fail() -> torch.Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        Stepwise(fail).advance()


def test_a_hook_does_not_touch_ordinary_passes():
    model = net()
    with hooks([pause_at(model[2])]):
        assert model(torch.ones(1, 4)).shape == (1, 2)
    assert not model[2]._forward_pre_hooks


def test_a_cancelled_pass_holds_nothing():
    model = net()
    one = Stepwise(lambda: model(torch.ones(1, 4)))
    with hooks([pause_at(model[2])]):
        held = weakref.ref(one.advance())
    assert held() is not None
    one.cancel()
    assert held() is None
