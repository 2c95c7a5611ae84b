"""Codes to 32-bit words and back: a little-endian bit stream along the last dimension, for any width.

Element j of a row occupies bits `j*bits .. j*bits+bits-1` of the stream, which is cut into words, low bits first; elements
straddle words where `bits` does not divide 32. This is compressed-tensors' `pack-quantized` since version 0.18 and, transposed,
GPTQ's `qweight`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

WORD = 32
ROWS_AT_A_TIME = 1024  # bounds the int32 working copy, four times the codes


def words_per_row(K: int, bits: int) -> int:
    """Words that hold `K` codes of `bits` bits."""
    return math.ceil(K * bits / WORD)


def pack(codes: UInt8[Tensor, "N K"], bits: int) -> Int32[Tensor, "N W"]:
    """Pack unsigned codes, each below `2^bits`; unused high bits of the last word are zero. Inverse of `unpack`."""
    N, K = codes.shape
    out = torch.empty(N, words_per_row(K, bits), dtype=torch.int32, device=codes.device)
    for rows in range(0, N, ROWS_AT_A_TIME):
        out[rows : rows + ROWS_AT_A_TIME] = _pack_rows(codes[rows : rows + ROWS_AT_A_TIME], bits)
    return out


def unpack(words: Int32[Tensor, "N W"], bits: int, K: int) -> UInt8[Tensor, "N K"]:
    """The first `K` codes of every row. Inverse of `pack`."""
    out = torch.empty(words.shape[0], K, dtype=torch.uint8, device=words.device)
    for rows in range(0, words.shape[0], ROWS_AT_A_TIME):
        out[rows : rows + ROWS_AT_A_TIME] = _unpack_rows(words[rows : rows + ROWS_AT_A_TIME], bits)[:, :K]
    return out


def _cycle(bits: int) -> tuple[int, int]:
    """The shortest run that ends on a word boundary: (codes, words)."""
    return WORD // math.gcd(WORD, bits), bits // math.gcd(WORD, bits)


def _pack_rows(codes: UInt8[Tensor, "N K"], bits: int) -> Int32[Tensor, "N W"]:
    N, K = codes.shape
    run, words = _cycle(bits)
    u = torch.nn.functional.pad(codes, (0, -K % run)).view(N, -1, run).int()
    out = torch.zeros(N, u.shape[1], words, dtype=torch.int32, device=codes.device)
    for k in range(run):
        word, shift = divmod(k * bits, WORD)
        out[..., word] |= u[..., k] << shift
        if shift + bits > WORD:
            out[..., word + 1] |= u[..., k] >> (WORD - shift)
    return out.view(N, -1)[:, : words_per_row(K, bits)]


def _unpack_rows(packed: Int32[Tensor, "N W"], bits: int) -> UInt8[Tensor, "N padded"]:
    N, W = packed.shape
    run, words = _cycle(bits)
    grouped = torch.nn.functional.pad(packed, (0, -W % words)).view(N, -1, words)
    out = torch.empty(N, grouped.shape[1], run, dtype=torch.uint8, device=packed.device)
    for k in range(run):
        word, shift = divmod(k * bits, WORD)
        value = grouped[..., word] >> shift
        if shift + bits > WORD:  # >> fills with the sign: clear what came from it before joining the next word's low bits
            value = (value & (2 ** (WORD - shift) - 1)) | (grouped[..., word + 1] << (WORD - shift))
        out[..., k] = value & (2**bits - 1)
    return out.view(N, -1)
