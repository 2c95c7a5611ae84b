from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.calib.narrow import narrow_


@pytest.fixture
def fast_bfloat16(monkeypatch):
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: True)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 48, bias=False))


@pytest.mark.usefixtures("fast_bfloat16")
def test_outputs_keep_their_dtype_and_are_close():
    plain, x = block(), torch.randn(3, 40, 64)
    narrow = copy.deepcopy(plain)
    narrow_(narrow)
    y, exact = narrow(x), plain(x)
    assert y.dtype == torch.float32
    error = (y - exact).norm() / exact.norm()
    assert 1e-4 < error < 1e-2
    assert torch.equal(narrow[0](x[0]), narrow[0](x)[0])


@pytest.mark.usefixtures("fast_bfloat16")
def test_the_weights_stay_and_are_read_anew():
    one, x = block(), torch.randn(5, 64)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    narrow_(one)
    assert before.keys() == one.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    first = one(x)
    with torch.no_grad():
        one[2].weight.neg_()
    assert torch.equal(one(x), -first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_without_instructions_for_bfloat16_or_float32_nothing_changes(dtype, monkeypatch):
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: dtype != torch.float32)
    one, x = block().to(dtype), torch.randn(5, 64).to(dtype)
    expected = one(x)
    narrow_(one)
    assert torch.equal(one(x), expected)
