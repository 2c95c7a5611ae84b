from __future__ import annotations

import pytest
import torch

from compress.kernels import dispatch, planar

SHAPES = [(64, 128, 128), (5, 96, 32), (130, 256, 64), (33, 320, 320), (7, 45, 45), (1, 192, 96)]  # N, K, group


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_codes_scales_and_zeros_come_back(weight, N, K, group, bits, symmetric):
    codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric)
    tensors = planar.to_planar(codes, scales, zeros, bits)
    packed = dispatch.Packed("planar", bits, (N, K), K // group, tensors)
    back = dispatch.restore(packed)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)
    assert torch.equal(back[2], torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros)
    assert ("zeros" in tensors) is not symmetric
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_where_every_code_lies(bits):
    N, K = 70, 600
    codes = torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    tensors = planar.to_planar(codes, torch.ones(N, 1), None, bits)
    S, width = planar.slices(bits), planar.plane_bits(bits)
    for n, k in ((0, 0), (69, 599), (64, 33), (63, 511), (12, 300)):
        block, inside = divmod(k, 32 * S)
        s, i = divmod(inside, 32)
        code = int(tensors["low"][n // 64, block, n % 64, i]) >> (s * width) & (2**width - 1)
        if bits == 3:
            code += (int(tensors["high"][n // 64, block, n % 64, i]) >> s & 1) << 2
        assert code == codes[n, k]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_blocks_cost_exactly_their_bits(bits):
    codes = torch.zeros(256, 1024, dtype=torch.uint8)
    tensors = planar.to_planar(codes, torch.ones(256, 8, dtype=torch.float16), None, bits)
    stored = sum(tensors[name].nbytes for name in ("low", "high") if name in tensors)
    assert stored * 8 == codes.numel() * bits
    assert tensors["scales"].shape == (8, 256)


def test_groups_that_slices_would_straddle_are_refused(weight):
    codes, scales, _ = weight(4, 96, 48, 4)
    assert not planar.fits(96, 2)
    with pytest.raises(ValueError, match="48 inputs"):
        planar.to_planar(codes, scales, None, 4)


def test_gpus_get_this_layout_where_it_fits(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    cuda = torch.device("cuda")
    assert dispatch.layout_for(cuda, 100, 512, 4, 4, True) == "planar"
    assert dispatch.layout_for(cuda, 100, 77, 1, 3, False) == "planar"
    assert dispatch.layout_for(cuda, 100, 512, 32, 4, True) == "words"
    assert dispatch.layout_for(torch.device("cpu"), 100, 512, 4, 4, True) != "planar"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.layout_for(cuda, 100, 512, 4, 4, True) == "words"
