from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compress.kernels.packing import pack, unpack, words_per_row

SHAPES = [(1, 1), (3, 33), (5, 31), (2, 32), (7, 96), (1025, 5)]


def random_codes(N: int, K: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(N * K + bits), dtype=torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_unpack_inverts_pack(N, K, bits):
    codes = random_codes(N, K, bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (N, words_per_row(K, bits))
    assert torch.equal(unpack(words, bits, K), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_a_little_endian_bit_stream(bits):
    codes = random_codes(1, 45, bits)
    stream = sum(int(code) << (j * bits) for j, code in enumerate(codes[0]))
    words = [word & 0xFFFFFFFF for word in pack(codes, bits)[0].tolist()]
    assert sum(word << (32 * i) for i, word in enumerate(words)) == stream


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [31, 32, 96])
def test_words_equal_compressed_tensors_own(bits, K):
    codes = random_codes(6, K, bits)
    signed = codes.to(torch.int8) if bits < 8 else codes.to(torch.int16)
    signed = (signed - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size((6, K))), signed)
