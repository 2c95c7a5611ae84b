from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.kernels import dispatch
from compress.nn import QuantConv2d, QuantLinear, Stack, StackedLinear, stack, use_sparse_kernels
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


def two_of_four(N: int, K: int, **options) -> nn.Sequential:
    layer = nn.Linear(K, N, **options).requires_grad_(False)
    layer.weight.view(N, -1, 4)[..., :2] = 0
    return nn.Sequential(layer)


def test_sparse_kernels_are_for_cuda():
    model = two_of_four(64, 128, dtype=torch.float16)
    assert use_sparse_kernels(model, ["0"]) == []
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_kernels_multiply_like_the_dense_weight(dtype):
    model = two_of_four(128, 256, device="cuda", dtype=dtype)
    x = torch.randn(3, 7, 256, device="cuda", dtype=dtype)
    expected = model(x)
    assert use_sparse_kernels(model, ["0"]) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    odd = two_of_four(96, 256, device="cuda", dtype=dtype)
    assert use_sparse_kernels(odd, ["0"]) == []


def attention(shapes=((48, 64), (16, 64), (16, 64)), bias=True, bits=(4, 4, 4)):
    parent = nn.Module()
    for name, (N, K), b in zip(("q_proj", "k_proj", "v_proj"), shapes, bits, strict=True):
        parent.add_module(name, QuantLinear(packed_of(N, K, K, b), Scheme(b, K), torch.randn(N) if bias else None))
    return parent


@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_are_stacked(bias):
    parent, x = attention(bias=bias), torch.randn(2, 5, 64)
    expected = [layer(x) for layer in parent.children()]
    before = [layer.restore() for layer in parent.children()]
    stack(parent)
    assert [type(layer) for layer in parent.children()] == [StackedLinear] * 3
    assert sum(isinstance(module, Stack) for module in parent.modules()) == 1
    for layer, out, restored in zip(parent.children(), expected, before, strict=True):
        torch.testing.assert_close(layer(x), out)
        assert layer.out_features == out.shape[-1]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(layer.restore(), restored, strict=True))
        assert (layer.bias is None) is not bias


def test_a_stack_multiplies_once_for_all_its_parts(monkeypatch):
    parent = attention()
    stack(parent)
    products, once = [], dispatch.linear
    monkeypatch.setattr(dispatch, "linear", lambda x, *rest: products.append(x) or once(x, *rest))
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    for inputs, expected in (((x, x, x), 1), ((y, y, y), 1), ((x, y, y), 2), ((x, x.clone(), x), 3)):
        products.clear()
        for layer, given in zip(parent.children(), inputs, strict=True):
            layer(given)
        assert len(products) == expected
    assert parent.q_proj.stack._product.x is x  # nobody has asked for the last one's other parts
    parent.k_proj(y)
    assert parent.q_proj.stack._product.x is y


def test_an_input_changed_in_place_is_multiplied_again():
    parent, x = attention(), torch.randn(3, 64)
    stack(parent)
    parent.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(parent.k_proj(x), parent.k_proj(x.clone()))


@pytest.mark.parametrize(
    "different",
    [{"shapes": ((48, 64), (16, 32), (16, 64))}, {"bits": (4, 3, 4)}],
)
def test_layers_that_differ_stay_apart(different):
    parent = attention(**different)
    stack(parent)
    assert all(type(layer) is QuantLinear for layer in parent.children())


def test_a_copied_stack_is_its_own():
    parent, x = attention(), torch.randn(3, 64)
    stack(parent)
    twin = copy.deepcopy(parent)
    expected = [layer(x) for layer in parent.children()]
    for tensor in parent.buffers():
        tensor.zero_()
    assert all(torch.equal(layer(x), out) for layer, out in zip(twin.children(), expected, strict=True))
    assert all(tensor.is_meta for tensor in twin.to("meta").buffers())
