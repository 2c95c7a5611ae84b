from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.kernels import dispatch
from compress.nn import QuantConv2d, QuantLinear
from compress.spec import Scheme


def packed_of(N, K, group, bits=4, dtype=torch.float16):
    generator = torch.Generator().manual_seed(N * K)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    return dispatch.prepare(codes, (torch.rand(N, K // group, generator=generator) * 0.01).to(dtype), None, bits=bits)


def linear(dtype=torch.float32):
    return QuantLinear(packed_of(48, 64, 64), Scheme(4, 64), torch.randn(48, dtype=dtype))


def test_linear_multiplies_by_the_dequantized_weight_and_adds_the_bias():
    layer, x = linear(), torch.randn(2, 5, 64)
    expected = nn.functional.linear(x, dispatch.dequantize(layer.packed), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert not isinstance(layer, nn.Linear)


def test_casts_reach_the_bias_and_nothing_else():
    layer = linear()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for cast in (layer.half, layer.bfloat16, layer.double, lambda: layer.to(torch.float32)):
        cast()
        assert {name: tensor.dtype for name, tensor in layer.named_buffers()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
    assert layer.half().bias.dtype == torch.float16
    assert layer(torch.randn(1, 64).half()).dtype == torch.float16


def test_moving_moves_the_packed_tensors():
    layer = linear().to("meta")
    assert all(tensor.is_meta for tensor in (*layer.buffers(), *layer.parameters()))
    assert layer.packed.tensors["plane"].is_meta


def test_a_deep_copy_owns_its_tensors():
    layer, x = linear(), torch.randn(3, 64)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    for tensor in layer.buffers():
        tensor.zero_()
    assert torch.equal(twin(x), expected)


def test_the_state_dict_restores_the_layer():
    layer, x = linear(), torch.randn(3, 64)
    other = QuantLinear(packed_of(48, 64, 64), Scheme(4, 64), torch.zeros(48))
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": 2, "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same", "groups": 2},
        {"kernel_size": 1, "bias": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolution_equals_the_dense_one(options, dtype):
    dense = nn.Conv2d(4, 6, **options)
    N, K = dense.weight.flatten(1).shape
    packed = packed_of(N, K, K, bits=8)
    dense.weight.data = dispatch.dequantize(packed).view_as(dense.weight)
    x = torch.randn(2, 4, 9, 8).to(dtype)
    out = QuantConv2d(packed, Scheme(8, -1), dense, dense.bias)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), dense(x.float()), rtol=1e-3, atol=1e-3)


def test_it_says_what_it_holds():
    assert repr(linear()) == "QuantLinear(64, 48, bias=True, int4 g64, layout=nibbles)"
