"""The layout that the GPU kernels read: words of codes 32 inputs apart, so that one shift and one mask decode a run of 32.

A row is cut into blocks of 32 16-bit words. Word i of a block holds the codes of its inputs i, i + 32, i + 64, ..., low bits
first: shifted by `s * bits` and masked, the words are slice s, inputs 32 s .. 32 s + 31 of the block. 3-bit codes are split: the
two low bits are such words, and bit s of byte i in a second tensor is the high bit in slice s. Blocks of 64 rows lie together,
[N / 64, blocks, 64, 32], so that what a program loads is one run of memory. Rows are padded to whole tiles with zeros, and so are
scales and zeros, which are transposed: neighbouring rows are read together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

Tensors = Mapping[str, Tensor]

SLICE = 32  # inputs that one shift uncovers
TILE = 64  # rows stored together
ROWS = 128  # rows are padded to a multiple: the most that a program takes
WORD = 16
TILES_AT_A_TIME = 16  # bounds the working copy while packing


def plane_bits(bits: int) -> int:
    """Bits of a code that the 16-bit words hold."""
    return 2 if bits == 3 else bits


def slices(bits: int) -> int:
    """Slices in a block."""
    return WORD // plane_bits(bits)


def blocks(K: int, bits: int) -> int:
    """Blocks in a row of K inputs."""
    return -(-K // (SLICE * slices(bits)))


def fits(K: int, G: int) -> bool:
    """Whether these groups can be laid out: slices must not straddle them."""
    return G == 1 or (K % G == 0 and K // G % SLICE == 0)


def to_planar(
    codes: UInt8[Tensor, "N K"], scales: Float[Tensor, "N G"], zeros: UInt8[Tensor, "N G"] | None, bits: int
) -> dict[str, Tensor]:
    """The layout's tensors: "low", for 3 bits "high", "scales" and, unless symmetric, "zeros". Inverse of `from_planar`."""
    (N, K), G = codes.shape, scales.shape[1]
    if not fits(K, G):
        raise ValueError(f"groups of {K // G} inputs are no multiple of {SLICE}")
    B, S, T = blocks(K, bits), slices(bits), -(-N // ROWS) * (ROWS // TILE)
    low = torch.empty(T, B, TILE, SLICE, dtype=torch.int16, device=codes.device)
    high = torch.empty(T, B, TILE, SLICE, dtype=torch.uint8, device=codes.device)
    for first in range(0, T, TILES_AT_A_TIME):
        part = codes[first * TILE : (first + TILES_AT_A_TIME) * TILE]
        tiles = min(TILES_AT_A_TIME, T - first)
        padded = torch.nn.functional.pad(part, (0, B * S * SLICE - K, 0, tiles * TILE - len(part)))
        u = padded.view(tiles, TILE, B, S, SLICE).permute(3, 0, 2, 1, 4)
        low[first : first + tiles] = _join(u & (2 ** plane_bits(bits) - 1), plane_bits(bits))
        if bits == 3:
            high[first : first + tiles] = _join(u >> 2, 1)
    tensors = {"low": low, "scales": _spread(scales, K, bits)}
    tensors |= {"high": high} if bits == 3 else {}
    return tensors if zeros is None else {**tensors, "zeros": _spread(zeros, K, bits)}


def from_planar(tensors: Tensors, N: int, K: int, G: int, bits: int) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N G"]]:
    """Codes and scales, as given to `to_planar`."""
    low, S, width = tensors["low"], slices(bits), plane_bits(bits)
    codes = torch.empty(N, K, dtype=torch.uint8, device=low.device)
    for first in range(0, len(low), TILES_AT_A_TIME):
        tiles = slice(first, first + TILES_AT_A_TIME)
        u = _cut(low[tiles], width, S)
        if bits == 3:
            u |= _cut(tensors["high"][tiles], 1, S) << 2
        rows = u.permute(1, 3, 2, 0, 4).reshape(-1, low.shape[1] * S * SLICE)
        part = codes[first * TILE : (first + TILES_AT_A_TIME) * TILE]
        part.copy_(rows[: len(part), :K])
    return codes, tensors["scales"][:G, :N].t().contiguous()


def _join(u: UInt8[Tensor, "S T B rows inputs"], width: int) -> Int16[Tensor, "T B rows inputs"]:
    """Slices side by side in words, each `width` bits."""
    out = torch.zeros(u.shape[1:], dtype=torch.int16, device=u.device)
    for s, part in enumerate(u):
        out |= part.short() << (s * width)
    return out


def _cut(words: Tensor, width: int, S: int) -> UInt8[Tensor, "S T B rows inputs"]:
    """Inverse of `_join`."""
    return torch.stack([((words >> (s * width)) & (2**width - 1)).to(torch.uint8) for s in range(S)])


def _spread(values: Tensor, K: int, bits: int) -> Tensor:
    """[N, G] to [G', N'], padded with zeros as far as programs read."""
    N, G = values.shape
    group = K // G
    most = 1 if G == 1 else -(-blocks(K, bits) * slices(bits) * SLICE // group)
    padded = torch.nn.functional.pad(values, (0, most - G, 0, -N % ROWS))
    return padded.t().contiguous()
