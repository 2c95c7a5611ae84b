from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.calib.stats import DriftSum, HessianSum, LayerStats, Seen, rows_of, unfolding
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


def test_shrinking_keeps_the_diagonal_and_scales_the_rest_by_the_tokens():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    H = x.t() @ x / 24
    stats = LayerStats(H, 24)
    shrunk = stats.shrunk()
    off = ~torch.eye(16, dtype=torch.bool)
    assert torch.equal(shrunk.H.diagonal(), H.diagonal())
    torch.testing.assert_close(shrunk.H[off], 24 / 32 * H[off])
    assert (shrunk.tokens, stats.H is H) == (24, True)
    assert torch.equal(H, x.t() @ x / 24)


def test_nothing_added_changes_nothing():
    total = HessianSum(8, torch.device("cpu"))
    total.add(torch.empty(0, 8))
    assert total.tokens == 0
    assert not total.stats().H.any()


def compared(batches, shape, module=None, mask=None):
    total = DriftSum(torch.device("cpu"))
    for x, dense in batches:
        total.add(Seen(x), Seen(dense), module or nn.Linear(8, 3), mask, torch.Size(shape))
    return total.drift()


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("flat", [False, True], ids=["by sequence", "flat"])
@pytest.mark.parametrize(("size", "last"), [(1, [1, 6]), (2, [1, 7]), (5, [4, 9]), (10, [8, 9])])
def test_drift_is_apart_for_one_sequence_in_five_the_last_of_their_batches(flat, size, last):
    x, dense = torch.randn(10, 4, 8), torch.randn(10, 4, 8)
    pairs = [(x[i : i + size], dense[i : i + size]) for i in range(0, 10, size)]
    if flat:
        pairs = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in pairs]
    drift, notes = compared(pairs, (size, 4, 64))
    assert notes == ()
    held = torch.isin(torch.arange(10), torch.tensor(last))
    for found, part in ((drift.fitted, ~held), (drift.held_out, held)):
        rows, step = x[part].flatten(0, 1), (dense - x)[part].flatten(0, 1)
        torch.testing.assert_close(found.cross, step.t() @ rows / len(rows))
    assert drift.share == 0.2


@pytest.mark.usefixtures("exact_products")
def test_what_outputs_are_added_to_drifts_along():
    x, dense, y, dense_y = (torch.randn(10, 4, width) for width in (8, 8, 6, 6))
    mask = torch.rand(10, 4) < 0.7
    module = nn.Linear(8, 6)
    W = module.weight.detach()
    total = DriftSum(torch.device("cpu"), W)
    for cut in (slice(0, 3), slice(3, 10)):
        seen = Seen(x[cut], y[cut]), Seen(dense[cut].flatten(0, 1), dense_y[cut])
        total.add(*seen, module, mask[cut], torch.Size((cut.stop - cut.start, 4, 5)))
    found, _ = total.drift()
    held = torch.isin(torch.arange(10), torch.tensor([2, 9]))
    for pull, part in ((found.fitted, ~held), (found.held_out, held)):
        rows = x[part][mask[part]]
        step = (dense_y - y)[part][mask[part]] + (dense - x)[part][mask[part]] @ W.t()
        torch.testing.assert_close(pull.of(W), step.t() @ rows / len(rows))
    every = ((dense_y - y)[mask] + (dense - x)[mask] @ W.t()).t() @ x[mask] / mask.sum()
    torch.testing.assert_close(found.whole().of(W), every)
    torch.testing.assert_close(found.whole().of(W, 2), every[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_in_bfloat16_is_close(dtype, monkeypatch):
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: True)
    x = torch.randn(10, 400, 8).to(dtype)
    dense = (x + 0.1 * torch.randn(10, 400, 8)).to(dtype)
    drift, _ = compared([(x, dense)], (10, 400, 8))
    part = torch.arange(10) < 8
    rows, step = x[part].flatten(0, 1).double(), (dense.double() - x.double())[part].flatten(0, 1)
    exact = step.t() @ rows / len(rows)
    assert (drift.fitted.cross - exact).norm() < 0.01 * exact.norm()


def test_drift_leaves_padding_out():
    x, dense = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    mask = torch.ones(5, 4).bool()
    mask[:, 3] = False
    found, _ = compared([(x, dense)], (5, 4, 8), mask=mask)
    short, _ = compared([(x[:, :3], dense[:, :3])], (5, 3, 8))
    torch.testing.assert_close(found.fitted.cross, short.fitted.cross)
    torch.testing.assert_close(found.held_out.cross, short.held_out.cross)


def test_equal_inputs_have_no_drift():
    x = torch.randn(5, 4, 8)
    assert compared([(x, x.clone())], (5, 4, 8)) == (None, ())


@pytest.mark.usefixtures("exact_products")
def test_unfolded_patches_are_compared_too():
    x, dense = torch.randn(6, 2, 5, 5), torch.randn(6, 2, 5, 5)
    drift, notes = compared([(x, dense)], (6, 2, 5, 5), nn.Conv2d(2, 3, 2))
    assert notes == ()
    rows = rows_of(x[5:], nn.Conv2d(2, 3, 2))
    step = rows_of(dense[5:], nn.Conv2d(2, 3, 2)) - rows
    torch.testing.assert_close(drift.held_out.cross, step.t() @ rows / len(rows))


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.randn(7, 8), torch.randn(7, 8)),  # some of the tokens: they may be others
        (torch.randn(7, 8), torch.randn(9, 8)),
        (torch.randn(5, 8), torch.randn(5, 8)),  # as many as there are sequences
        (torch.randn(5, 4, 8), None),
        (None, torch.randn(5, 4, 8)),
    ],
)
def test_selected_tokens_are_not_compared_and_that_is_said(x, dense):
    drift, notes = compared([(x, dense)], (5, 4, 8))
    assert drift is None
    assert notes == ("not corrected for drift: which tokens reach it depends on the layers before",)


def test_one_sequence_cannot_be_held_out():
    drift, notes = compared([(torch.randn(1, 4, 8), torch.randn(1, 4, 8))], (1, 4, 8))
    assert drift is None
    assert notes == ("not corrected for drift: no calibration sample could be held out",)
