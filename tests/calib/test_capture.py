from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.calib import capture
from compress.errors import CompressError


class Block(nn.Module):
    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.as_tuple = as_tuple

    def forward(self, hidden, scale, mask=None):
        y = hidden + self.o(torch.relu(self.q(hidden)) * self.k(hidden)) * scale
        y = y if mask is None else y * mask
        return (y, None) if self.as_tuple else y


class Model(nn.Module):
    """Blocks fed one after the other, each with arguments of its own."""

    def __init__(self, as_tuple: bool = False, by_keyword: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(3))
        self.as_tuple, self.by_keyword, self.broken = as_tuple, by_keyword, broken

    def forward(self, x):
        hidden = self.embed(x)
        mask = (x.sum(-1, keepdim=True) > 0).float()
        for i, block in enumerate(self.blocks):
            if self.broken and i == 2:
                hidden = hidden * 2
            scale = torch.tensor(float(i))
            out = block(hidden=hidden, scale=scale, mask=mask) if self.by_keyword else block(hidden, scale, mask=mask)
            hidden = out[0] if self.as_tuple else out
        return hidden


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_replaying_the_chain_is_running_the_model(as_tuple, by_keyword):
    model = Model(as_tuple, by_keyword)
    batches = [{"x": torch.randn(2, 3, 2)} for _ in range(3)]
    chain = capture.record(model, NAMES, batches)
    for batch, hidden, calls in zip(batches, chain.hidden, chain.calls, strict=True):
        for name, call in zip(NAMES, calls, strict=True):
            hidden = capture.replay(model.get_submodule(name), hidden, call, torch.device("cpu"), torch.float32)
        assert torch.equal(hidden, model(batch["x"]))


def test_recording_leaves_the_model_as_it_was():
    model, x = Model(), torch.randn(1, 2, 2)
    before = model(x)
    capture.record(model, NAMES, [{"x": x}])
    assert torch.equal(model(x), before)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_equal_arguments_are_kept_once():
    model, x = Model(), torch.ones(1, 3, 2)
    chain = capture.record(model, NAMES, [{"x": x}, {"x": x.clone()}])
    masks = {id(call.kwargs["mask"]) for calls in chain.calls for call in calls}
    assert len(masks) == 1


def test_a_model_that_changes_the_hidden_state_between_blocks_is_refused_by_name():
    with pytest.raises(CompressError, match=r"Cannot follow Model at blocks\.2"):
        capture.record(Model(broken=True), NAMES, [{"x": torch.randn(1, 2, 2)}])


def test_a_block_that_is_never_called_is_named():
    model = Model()
    model.extra = Block(False)
    with pytest.raises(CompressError, match="extra is never called"):
        capture.record(model, [*NAMES, "extra"], [{"x": torch.randn(1, 2, 2)}])


def test_layers_that_read_one_tensor_are_together_in_calling_order():
    block = Block(False)
    groups = capture.subsets(block, ["o", "k", "q", "unused"], lambda: block(torch.randn(1, 2, 4), 1.0))
    assert groups == [("q", "k"), ("o",)]


def test_convolutions_share_an_input_only_if_they_unfold_alike():
    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
            self.c = nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x)

    block = Down()
    assert capture.subsets(block, ["a", "b", "c"], lambda: block(torch.randn(1, 2, 5, 5))) == [("a", "b"), ("c",)]


def test_a_layer_that_is_called_twice_belongs_to_its_first_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) + self.a(x * 2)

    block = Twice()
    assert capture.subsets(block, ["a", "b"], lambda: block(torch.randn(1, 4))) == [("a",), ("b",)]
