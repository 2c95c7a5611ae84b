from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.calib.replay import Replay, stopping


class Attention(nn.Module):
    """A submodule that is run in parts, by stops inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return self.o(torch.softmax(self.q(x), -1) * x), None


class Block(nn.Module):
    """Attention and an MLP on a residual stream, which may be added to in place; `up` is called twice."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.norm, self.attention = nn.LayerNorm(4), Attention()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(self.norm(x), scale=1)[0]
        y = y.add_(x) if self.in_place else y + x
        h = self.up(y)
        h = self.up(h.relu_() if self.in_place else h.relu())
        return y + self.down(h)


def layers(block: Block) -> list[nn.Linear]:
    return [block.attention.q, block.attention.o, block.up, block.down]


@pytest.mark.parametrize("in_place", [False, True])
def test_every_layer_is_reached_with_what_the_changed_layers_before_it_make(in_place):
    """Bit for bit as in passes that are run whole, with the weights of each layer changed once it was reached."""
    block, x = Block(in_place), torch.randn(3, 5, 4)
    one = Replay(lambda: block(x))
    for layer in layers(block):
        with stopping(block, layer) as advance:
            found = advance(one)
        expected: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=expected: seen.append(args[0].clone()))
        whole = block(x)
        handle.remove()
        assert one.at is layer
        assert torch.equal(found, expected[0])
        assert one.output is None
        layer.weight += torch.randn(4, 4)
    with stopping(block, None) as advance:
        assert advance(one) is None
    assert not torch.equal(one.output, whole)
    assert torch.equal(one.output, block(x))


def test_what_ended_is_not_run_again():
    block, x = Block(in_place=False), torch.randn(1, 5, 4)
    runs: Counter[nn.Module] = Counter()
    for layer in layers(block):
        forward = layer.forward
        layer.forward = lambda *args, layer=layer, forward=forward: (runs.update([layer]), forward(*args))[1]
    one = Replay(lambda: block(x))
    for layer in [*layers(block), None]:
        with stopping(block, layer) as advance:
            advance(one)
    assert runs == {block.attention.q: 1, block.attention.o: 1, block.up: 2, block.down: 1}


def test_an_output_that_was_written_to_is_computed_again():
    """The block adds to what attention returned; a run that took the sum for attention's output would add twice."""
    block = Block(in_place=True)
    x = torch.randn(1, 5, 4)
    one = Replay(lambda: block(x))
    for _ in range(3):
        with stopping(block, block.down) as advance:
            advance(one)
    with stopping(block, None) as advance:
        advance(one)
    assert torch.equal(one.output, block(x))


def test_inputs_and_outputs_that_were_asked_for_are_noted():
    block, x = Block(in_place=False), torch.randn(1, 5, 4)
    one = Replay(lambda: block(x))
    with stopping(block, block.up, [block.norm], [block.attention.o]) as advance:
        advance(one)
    assert torch.equal(one.inputs[block.norm], x)
    assert torch.equal(one.outputs[block.attention.o] + x, one.seen)


def test_what_a_pass_holds_is_known():
    block, x = Block(in_place=False), torch.randn(3, 5, 4)
    one = Replay(lambda: block(x))
    for layer, tensors in ((block.attention.q, 0), (block.attention.o, 1), (block.down, 3)):
        with stopping(block, layer) as advance:
            advance(one)
        assert one.nbytes == tensors * x.nbytes  # q; then attention as a whole and both outputs of up


def test_a_module_that_is_not_called_lets_the_pass_end():
    block, x = Block(in_place=False), torch.randn(1, 5, 4)
    one = Replay(lambda: block(x))
    with stopping(block, nn.Linear(4, 4)) as advance:
        assert advance(one) is None
    assert one.at is None
    assert torch.equal(one.output, block(x))


def test_errors_reach_the_caller_and_the_block_is_as_it_was():
    block = Block(in_place=False)
    with pytest.raises(RuntimeError, match="normalized_shape"), stopping(block, block.down) as advance:
        advance(Replay(lambda: block(torch.randn(1, 5, 3))))
    assert not any("forward" in vars(module) for module in block.modules())
    assert torch.equal(block(torch.ones(1, 1, 4)), block(torch.ones(1, 1, 4)))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_many_passes_take_no_threads():
    block, xs = Block(in_place=False), [torch.randn(64, 64, 4) for _ in range(40)]
    block(xs[0])
    before = len(os.listdir("/proc/self/task")), threading.active_count()  # noqa: PTH208
    passes = [Replay(lambda x=x: block(x)) for x in xs]
    for layer in (block.attention.o, block.down):
        with stopping(block, layer) as advance:
            for one in passes:
                advance(one)
    assert (len(os.listdir("/proc/self/task")), threading.active_count()) == before  # noqa: PTH208
