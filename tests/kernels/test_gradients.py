"""Products with packed weights have the gradient of the dense product, for every layout, dtype and number of rows."""

from __future__ import annotations

import pytest
import torch

from compress.kernels import dispatch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = {  # N, K, group, bits, symmetric, shuffled
    "nibbles": (48, 128, 64, 4, True, False),
    "nibbles of 8 bits": (48, 128, 64, 8, False, False),
    "bytes": (48, 128, 128, 8, True, False),
    "words": (33, 80, 16, 3, False, False),
    "sorted": (48, 128, 64, 4, False, True),
}


def made(weight, name):
    N, K, group, bits, symmetric, shuffled = LAYOUTS[name]
    codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric)
    g_idx = (torch.arange(K) // group)[torch.randperm(K, generator=torch.Generator().manual_seed(0))].int() if shuffled else None
    packed = dispatch.prepare(codes, scales, zeros, bits=bits, g_idx=g_idx)
    return packed, dispatch.dequantize(packed).double()


def test_the_layouts_are_those_that_are_meant(weight):
    layouts = {name: made(weight, name)[0].layout for name in LAYOUTS}
    assert layouts == {name: name.split()[0].replace("sorted", "nibbles") for name in LAYOUTS}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (65,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_in_inputs_and_bias(weight, name, rows, dtype):
    packed, Q = made(weight, name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, packed.shape[1], generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(packed.shape[0], generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(*rows, packed.shape[0], generator=generator).to(dtype)
    out = dispatch.linear(x, packed, bias)
    out.backward(upstream)
    with torch.no_grad():
        assert torch.equal(out, dispatch.linear(x, packed, bias))  # as without gradients, to the last bit
    wanted, bias_wanted = upstream.double() @ Q, upstream.double().flatten(0, -2).sum(0)
    assert x.grad.dtype == dtype
    assert (x.grad.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert (bias.grad.double() - bias_wanted).norm() <= TOLERANCE[dtype] * bias_wanted.norm()


def test_weights_in_tiles_give_the_same_gradient(weight, monkeypatch):
    packed, Q = made(weight, "words")
    y = torch.randn(5, packed.shape[0])
    monkeypatch.setattr(dispatch.reference, "SCRATCH_CPU", 4 * packed.shape[1])
    torch.testing.assert_close(dispatch.times_weight(y, packed).double(), y.double() @ Q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_float64_are_not_rounded(weight, name):
    packed, Q = made(weight, name)
    y = torch.randn(5, packed.shape[0], dtype=torch.float64)
    torch.testing.assert_close(dispatch.times_weight(y, packed), y @ Q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("rows", [3, 200])
def test_planar_products_have_gradients_in_inputs_and_in_a_bias_alone(weight, monkeypatch, rows, inputs):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "layout_for", lambda *_: "planar")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = dispatch.prepare(*weight(48, 128, 64, 4, symmetric=False), bits=4, device=device)
    x = torch.randn(rows, 128, device=device, requires_grad=inputs)
    bias = torch.zeros(48, device=device, requires_grad=True)
    dispatch.linear(x, packed, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, rows))
    if inputs:
        torch.testing.assert_close(x.grad, dispatch.dequantize(packed).sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
