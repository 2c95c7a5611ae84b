from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.calib.stats import HessianSum, rows_of, unfolding
from compress.models import matrix


def test_hessian_is_the_mean_outer_product_however_the_tokens_come():
    x = torch.randn(300, 40)
    whole, parts = HessianSum(40, torch.device("cpu")), HessianSum(40, torch.device("cpu"))
    whole.add(x)
    for part in x.split(7):
        parts.add(part)
    assert whole.tokens == parts.tokens == 300
    torch.testing.assert_close(whole.stats().H, x.t() @ x / 300)
    torch.testing.assert_close(parts.stats().H, whole.stats().H)


def test_hessian_of_bfloat16_inputs_is_accumulated_in_float32():
    x = torch.randn(4000, 16).bfloat16()
    total = HessianSum(16, torch.device("cpu"))
    total.add(x)
    exact = x.double().t() @ x.double() / 4000
    assert (total.stats().H - exact).abs().max() < 1e-5


def test_no_tokens_give_a_zero_hessian():
    assert not HessianSum(4, torch.device("cpu")).stats().H.any()


def test_padding_is_left_out():
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    rows = rows_of(x, nn.Linear(8, 3), mask)
    assert torch.equal(rows, torch.cat([x[0, :2], x[1, :4]]))
    assert len(rows_of(x, nn.Linear(8, 3))) == 10


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(4, 2, (3, 1), stride=2, padding=(1, 0)),
        nn.Conv2d(2, 6, 3, padding=2, dilation=2, bias=False),
    ],
    ids=str,
)
def test_unfolded_rows_times_the_matrix_are_the_convolution(conv):
    x = torch.randn(2, conv.in_channels, 9, 8)
    expected = conv(x)
    rows = rows_of(x, conv)
    product = rows @ matrix(conv).t() + (conv.bias if conv.bias is not None else 0)
    torch.testing.assert_close(product, expected.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-5)


def test_convolutions_that_unfold_alike_compare_equal():
    assert unfolding(nn.Conv2d(3, 5, 3, padding=1)) == unfolding(nn.Conv2d(3, 9, 3, padding=1))
    assert unfolding(nn.Conv2d(3, 5, 3, padding=1)) != unfolding(nn.Conv2d(3, 5, 3, padding=1, stride=2))
    assert unfolding(nn.Linear(3, 5)) == unfolding(nn.Linear(3, 2)) == ()
