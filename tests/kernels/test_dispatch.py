from __future__ import annotations

import dataclasses

import pytest
import torch

from compress.kernels import cpu, dispatch, reference

SHAPES = [  # N, K, group
    (64, 128, 128),
    (80, 256, 64),
    (33, 96, 32),
    (5, 96, 96),
    (17, 80, 16),
    (7, 33, 33),
    (200, 512, 512),
    (48, 48, 48),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def shuffled_groups(K, group):
    return (torch.arange(K) // group)[torch.randperm(K, generator=torch.Generator().manual_seed(K))].int()


def filled(zeros, scales, bits):
    return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_restore_inverts_prepare(weight, bits, symmetric, dtype, shuffled):
    for N, K, group in SHAPES:
        codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric, dtype=dtype)
        g_idx = shuffled_groups(K, group) if shuffled else None
        packed = dispatch.prepare(codes, scales, zeros, bits=bits, g_idx=g_idx)
        assert packed.shape == (N, K)
        given = (codes, scales, filled(zeros, scales, bits), g_idx)
        for back, tensor in zip(dispatch.restore(packed), given, strict=True):
            assert (back is None) == (tensor is None)
            assert tensor is None or (torch.equal(back, tensor) and back.dtype == tensor.dtype)


def test_groups_of_unequal_size_keep_their_index(weight):
    codes, scales, zeros = weight(6, 64, 16, 4, symmetric=False)
    g_idx = torch.tensor([0] * 20 + [1] * 12 + [3] * 32).int()
    packed = dispatch.prepare(codes, scales, zeros, bits=4, g_idx=g_idx)
    assert torch.equal(dispatch.restore(packed)[3], g_idx)
    x = torch.randn(3, 64)
    torch.testing.assert_close(dispatch.linear(x, packed), x @ reference.dequantize(codes, scales, zeros, g_idx).t())


def test_groups_that_do_not_divide_the_inputs_need_an_index(weight):
    codes, scales, _ = weight(4, 48, 16, 4)
    with pytest.raises(ValueError, match="3 groups do not divide 47 inputs"):
        dispatch.prepare(codes[:, :47].contiguous(), scales, None, bits=4)


def test_layouts(weight):
    def layout(N, K, group, bits, symmetric=True):
        codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric)
        return dispatch.prepare(codes, scales, zeros, bits=bits).layout

    assert layout(64, 128, 128, 4) == layout(33, 128, 128, 2) == layout(64, 128, 32, 8) == "nibbles"
    assert layout(64, 128, 128, 8) == "bytes"
    assert layout(64, 128, 128, 8, symmetric=False) == layout(33, 128, 128, 8) == "nibbles"
    assert layout(64, 80, 16, 4) == layout(64, 80, 80, 3) == "words"


@pytest.mark.parametrize("M", [0, 1, 2, 7, 16, 17, 64, 65, 130, 300])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (2, 64, True),
        (3, 32, False),
        (4, 128, True),
        (4, 128, False),
        (8, 128, True),
        (8, 128, False),
        (8, 256, True),
        (4, 16, True),
    ],
)
def test_error_is_within_twice_that_of_a_dense_product_in_the_same_precision(weight, q64, bits, group, symmetric, M):
    N, K = 112, 256
    codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric)
    packed, Q, bias = dispatch.prepare(codes, scales, zeros, bits=bits), q64(codes, scales, zeros, bits), torch.randn(N)
    for dtype in DTYPES:
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        truth = x.double() @ Q.t() + bias.to(dtype)
        out = dispatch.linear(x, packed, bias.to(dtype))
        assert out.dtype == dtype
        assert out.shape == (M, N)
        if M:
            dense = torch.nn.functional.linear(x.bfloat16(), Q.bfloat16(), bias.bfloat16())
            budget = 1e-6 if dtype == torch.float32 else 2 * ((dense - truth).norm() / truth.norm()).item()
            assert (out - truth).norm() / truth.norm() <= budget


@pytest.mark.parametrize("group", [64, 16])
def test_shuffled_groups_give_the_product_of_the_shuffled_weight(weight, group):
    codes, scales, zeros = weight(40, 128, group, 4, symmetric=False)
    g_idx = shuffled_groups(128, group)
    packed = dispatch.prepare(codes, scales, zeros, bits=4, g_idx=g_idx)
    Q = reference.dequantize(codes, scales, zeros, g_idx)
    assert torch.equal(dispatch.dequantize(packed), Q)
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(dispatch.linear(x, packed), x @ Q.t())


def test_many_tiles_and_a_part_of_one(weight, monkeypatch):
    monkeypatch.setattr(cpu, "SCRATCH_CPU", 64 * 128)
    for bits, group in ((4, 64), (8, 64), (8, 128)):
        codes, scales, zeros = weight(208, 128, group, bits)
        packed = dispatch.prepare(codes, scales, zeros, bits=bits)
        x = torch.randn(3, 128)
        torch.testing.assert_close(dispatch.linear(x, packed), x @ dispatch.dequantize(packed).t())
        assert torch.equal(dispatch.restore(packed)[0], codes)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 128)])
def test_float64_activations_are_not_rounded(weight, bits, group):
    packed = dispatch.prepare(*weight(32, 128, group, bits), bits=bits)
    x = torch.randn(2, 128, dtype=torch.float64)
    torch.testing.assert_close(dispatch.linear(x, packed), x @ dispatch.dequantize(packed).double().t())


def test_inputs_may_be_strided(weight):
    packed = dispatch.prepare(*weight(32, 64, 64, 4), bits=4)
    x = torch.randn(64, 5, dtype=torch.bfloat16).t()
    assert torch.equal(dispatch.linear(x, packed), dispatch.linear(x.contiguous(), packed))


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(4, 128, torch.float16), (4, 128, torch.bfloat16), (8, 1024, torch.float16), (8, 128, torch.float16)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_is_at_most_15_percent_above_the_stored_size(weight, bits, group, dtype, symmetric):
    N, K = 256, 1024
    codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric, dtype=dtype)
    packed = dispatch.prepare(codes, scales, zeros, bits=bits)
    stored = N * K * bits / 8 + scales.nbytes + (0 if zeros is None else zeros.numel() * bits / 8)
    assert packed.layout != "words"
    assert sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors.values()) <= 1.15 * stored


def test_moving_to_another_kind_of_device_lays_out_anew(weight):
    packed = dispatch.prepare(*weight(32, 64, 64, 4), bits=4)
    elsewhere = dispatch.move(packed, torch.device("meta"))
    assert all(tensor.is_meta for tensor in elsewhere.tensors.values())
    assert dataclasses.replace(elsewhere, tensors={}) == dataclasses.replace(packed, tensors={})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_and_back(weight, bits):
    packed = dispatch.prepare(*weight(64, 128, 64, bits, symmetric=False), bits=bits)
    there = dispatch.move(packed, torch.device("cuda"))
    x = torch.randn(9, 128)
    torch.testing.assert_close(dispatch.linear(x.cuda(), there).cpu(), dispatch.linear(x, packed), rtol=1e-4, atol=1e-5)
    back = dispatch.move(there, torch.device("cpu"))
    assert back.layout == packed.layout
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in packed.tensors.items())
