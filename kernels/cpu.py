"""Serving on CPUs through torch's own 4- and 8-bit kernels, which need no compile step, and by dequantized tiles for many rows.

Two layouts. "nibbles": one plane of 4-bit codes, or two for 8 bits (high and low halves, whose products add up), each in the
arrangement `_weight_int4pack_mm_for_cpu` reads; 2- and 3-bit codes are widened to 4. "bytes": signed 8-bit codes with one scale
per row for `_weight_int8pack_mm`. Both kernels are fast with bfloat16 activations only: 60 times slower with any other.

The arrangement of a plane depends on the processor and is documented nowhere. It is found by packing known codes and reading
where they went, once per process, and checked on random codes; where that fails the caller keeps plain words.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from jaxtyping import BFloat16, Float, Shaped, UInt8
from torch import Tensor

from compress.kernels.reference import SCRATCH_CPU, compute_dtype

Tensors = Mapping[str, Tensor]
Tile = tuple[int, int, int]  # first row, end, and how many rows are interleaved

GROUPS = (256, 128, 64, 32)  # inputs per scale that the 4-bit kernel takes
MULTIPLE = 16  # of output rows, in both kernels; nibbles are padded up to it
HALF = 16  # levels of a plane
CENTRE = 8  # the code that a plane's kernel takes for zero
PROBE_K = 32
# The most rows that a layout's kernel serves faster than dequantized tiles and a bfloat16 product do (AMD EPYC, Zen 5, one
# thread, torch 2.13, 2026-11-21; benchmarks/serving.py prints the table).
FEW_ROWS = MappingProxyType({"nibbles": 64, "bytes": 16})


def kernel_group(group: int) -> int | None:
    """The largest group of the 4-bit kernel that divides `group`; a coarser scale is repeated. None where there is none."""
    return next((g for g in GROUPS if group % g == 0), None)


def nibbles_fit(group: int) -> bool:
    """Whether the 4-bit kernel can serve groups of this size on this machine."""
    return kernel_group(group) is not None and block_rows() is not None


def bytes_fit(N: int, K: int, G: int) -> bool:
    """Whether the 8-bit kernel can serve this shape; it reads beyond its input for other multiples instead of refusing."""
    return G == 1 and N % MULTIPLE == 0 and K % MULTIPLE == 0


def _arrange(codes: Tensor) -> Tensor:
    """One call of torch's packing: int32 codes below 16, [N, K], to bytes [N, K/2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


@functools.cache
def _halves(block: int) -> tuple[slice, slice]:
    """Which rows of a block the low and the high nibbles of a column hold, each at a regular distance."""
    row = torch.arange(block, dtype=torch.int32)[:, None].expand(block, PROBE_K)
    digits = [_arrange(digit.contiguous()).view(-1)[: block // 2].long() for digit in (row % HALF, row // HALF)]
    low, high = (digits[0] % HALF + digits[1] % HALF * HALF).tolist(), (digits[0] // HALF + digits[1] // HALF * HALF).tolist()
    return slice(low[0], low[-1] + 1, max(1, low[1] - low[0])), slice(high[0], high[-1] + 1, max(1, high[1] - high[0]))


@functools.cache
def block_rows() -> int | None:
    """Find how many rows this machine's packing interleaves; None, with a warning, when no known arrangement can be inverted.

    Processors differ: 64 rows with AVX-512, 32 without.
    """
    for block in (64, 32, 16):
        if _inverts(block):
            return block
    warnings.warn("torch's 4-bit packing is unknown on this processor; weights are served from plain words.", stacklevel=2)
    return None


def _inverts(block: int) -> bool:
    """Whether random codes that torch packs are read back unchanged when `block` rows are taken to be interleaved."""
    generator = torch.Generator().manual_seed(0)
    try:
        if sorted(row for half in _halves(block) for row in range(block)[half]) != list(range(block)):
            return False
        for N in range(2 * block, 3 * block, MULTIPLE):
            codes = torch.randint(0, HALF, (N, 3 * PROBE_K), generator=generator, dtype=torch.uint8)
            if not torch.equal(_codes(_arrange(codes.int()), block), codes):
                return False
    except RuntimeError:  # torch cannot pack here, or what it packs has another shape
        return False
    return True


def _tiles(N: int, K: int, block: int) -> Iterator[Tile]:
    """Cut N rows into (start, stop, block): whole blocks within the scratch bound, then the rows that fill none."""
    whole = N - N % block
    step = max(block, SCRATCH_CPU // K // block * block)
    yield from ((start, min(start + step, whole), block) for start in range(0, whole, step))
    if whole < N:
        yield whole, N, N - whole


def _rows(plane: UInt8[Tensor, "N half"], tile: Tile, dtype: torch.dtype) -> Shaped[Tensor, "n K"]:
    """The codes of some rows of a plane."""
    start, stop, block = tile
    K = 2 * plane.shape[1]
    columns = plane[start:stop].reshape(-1, K, block // 2)
    out = torch.empty(len(columns), block, K, dtype=dtype)
    low, high = _halves(block)
    out[:, low] = (columns & (HALF - 1)).transpose(1, 2)
    out[:, high] = (columns >> 4).transpose(1, 2)
    return out.view(stop - start, K)


def _codes(plane: UInt8[Tensor, "N half"], block: int) -> UInt8[Tensor, "N K"]:
    """All codes of a plane."""
    N, K = plane.shape[0], 2 * plane.shape[1]
    return torch.cat([_rows(plane, tile, torch.uint8) for tile in _tiles(N, K, block)])


def _plane(codes: UInt8[Tensor, "N K"], block: int) -> UInt8[Tensor, "N half"]:
    """Codes below 16 in the kernel's arrangement, converted by tiles because torch's packing wants int32 codes."""
    N, K = codes.shape
    return torch.cat([_arrange(codes[start:stop].int()) for start, stop, _ in _tiles(N, K, block)])


def _offset(bits: int) -> int:
    """What widening to 4 bits adds to a code, so that a symmetric grid's zero lands on the kernel's."""
    return CENTRE - 2 ** (bits - 1) if bits < 4 else 0


def to_nibbles(
    codes: UInt8[Tensor, "N K"], scales: Float[Tensor, "N G"], zeros: UInt8[Tensor, "N G"] | None, bits: int
) -> dict[str, Tensor]:
    """The "nibbles" layout: planes, the kernel's scales and offsets, and whatever these do not give back exactly."""
    N, K = codes.shape
    block, group = block_rows(), kernel_group(K // scales.shape[1])
    if block is None or group is None:
        raise ValueError(f"the 4-bit kernel cannot serve groups of {K // scales.shape[1]} inputs on this machine")
    pad, repeats = -N % MULTIPLE, K // group // scales.shape[1]
    u = torch.nn.functional.pad(codes, (0, 0, 0, pad))
    s = scales.float()
    z = torch.full_like(s, 2 ** (bits - 1)) if zeros is None else zeros.float()

    def kernel_scales(scale: Tensor, offset: Tensor) -> Tensor:  # value = (code - 8) * scale + offset
        pair = torch.stack([scale, offset], -1).to(torch.bfloat16).repeat_interleave(repeats, 1)
        return torch.nn.functional.pad(pair, (0, 0, 0, 0, 0, pad)).transpose(0, 1).contiguous()

    if bits == 8:  # s (u - z) = 16 s (high - 8) + (136 - z) s  +  s (low - 8)
        tensors = {
            "plane": _plane(u & (HALF - 1), block),
            "kernel_scales": kernel_scales(s, torch.zeros_like(s)),
            "high_plane": _plane(u >> 4, block),
            "high_kernel_scales": kernel_scales(HALF * s, (HALF * CENTRE + CENTRE - z) * s),
        }
    else:
        tensors = {
            "plane": _plane(u + _offset(bits), block),
            "kernel_scales": kernel_scales(s, (CENTRE - _offset(bits) - z) * s),
        }
    if scales.dtype != torch.bfloat16:
        tensors["scales"] = scales
    return tensors if zeros is None else {**tensors, "zeros": zeros}


def from_nibbles(tensors: Tensors, N: int, G: int, bits: int) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N G"]]:
    """Codes and scales, as given to `to_nibbles`."""
    block = _block()
    codes = _codes(tensors["plane"], block)[:N]
    if bits == 8:
        codes += _codes(tensors["high_plane"], block)[:N] << 4
    return codes - _offset(bits), _scales(tensors, N, G).contiguous()


def linear_nibbles(x: Float[Tensor, "M K"], tensors: Tensors, N: int) -> Float[Tensor, "M N"]:
    """`x Q^T` by the 4-bit kernel: bfloat16 operands, float32 sums, one rounding to bfloat16 per plane."""
    inputs = x.to(torch.bfloat16).contiguous()
    out = _kernel(inputs, tensors["plane"], tensors["kernel_scales"])
    if "high_plane" in tensors:
        out = out + _kernel(inputs, tensors["high_plane"], tensors["high_kernel_scales"])
    return out[:, :N].to(x.dtype)


def tiled_nibbles(x: Float[Tensor, "M K"], tensors: Tensors, N: int, G: int, bits: int) -> Float[Tensor, "M N"]:
    """`x Q^T` with exact weights, dequantized a tile of rows at a time."""
    M, K = x.shape
    compute, zeros = compute_dtype(x), tensors.get("zeros")
    inputs, out = x.to(compute), torch.empty(M, N, dtype=x.dtype)
    for tile in _tiles(tensors["plane"].shape[0], K, _block()):
        levels = _rows(tensors["plane"], tile, torch.float32)
        if bits == 8:
            levels += _rows(tensors["high_plane"], tile, torch.float32).mul_(HALF)
        part = slice(tile[0], min(tile[1], N))
        s = _scales(tensors, N, G)[part, :, None].float()
        z = 2.0 ** (bits - 1) if zeros is None else zeros[part, :, None].float()
        Q = levels[: len(s)].view(len(s), G, -1).sub_(z + _offset(bits)).mul_(s).view(-1, K)
        out[:, part] = inputs @ Q.to(compute).t()
    return out


def to_bytes(codes: UInt8[Tensor, "N K"], scales: Float[Tensor, "N 1"]) -> dict[str, Tensor]:
    """The "bytes" layout of symmetric 8-bit codes."""
    kernel_scales = {} if scales.dtype == torch.bfloat16 else {"kernel_scales": scales.flatten().to(torch.bfloat16)}
    return {"bytes": (codes ^ 128).view(torch.int8), "scales": scales, **kernel_scales}


def from_bytes(tensors: Tensors) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N 1"]]:
    """Codes and scales, as given to `to_bytes`."""
    return tensors["bytes"].view(torch.uint8) ^ 128, tensors["scales"]


def linear_bytes(x: Float[Tensor, "M K"], tensors: Tensors) -> Float[Tensor, "M N"]:
    """`x Q^T` by the 8-bit kernel: bfloat16 operands, float32 sums, one rounding to bfloat16."""
    scales = tensors.get("kernel_scales", tensors["scales"].flatten())
    out: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), tensors["bytes"], scales)
    return out.to(x.dtype)


def tiled_bytes(x: Float[Tensor, "M K"], tensors: Tensors) -> Float[Tensor, "M N"]:
    """`x Q^T` with exact codes, converted a tile of rows at a time; the row scales multiply the sums."""
    M, K = x.shape
    compute, codes = compute_dtype(x), tensors["bytes"]
    inputs, out = x.to(compute), torch.empty(M, codes.shape[0], dtype=x.dtype)
    rows = max(1, SCRATCH_CPU // K)
    for tile in (slice(start, start + rows) for start in range(0, codes.shape[0], rows)):
        Q = codes[tile].float().mul_(tensors["scales"][tile].float())
        out[:, tile] = inputs @ Q.to(compute).t()
    return out


def _kernel(x: BFloat16[Tensor, "M K"], plane: UInt8[Tensor, "N half"], scales: BFloat16[Tensor, "groups N 2"]) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, plane, x.shape[1] // scales.shape[0], scales)
    return out


def _scales(tensors: Tensors, N: int, G: int) -> Float[Tensor, "N G"]:
    """The stored scales; bfloat16 ones are not kept twice but read from the kernel's."""
    if "scales" in tensors:
        return tensors["scales"]
    kernel_scales = tensors["kernel_scales"]
    return kernel_scales[:: kernel_scales.shape[0] // G, :N, 0].t()


def _block() -> int:
    block = block_rows()
    if block is None:
        raise ValueError("these tensors hold 4-bit planes, which this machine cannot read; move them as words")
    return block
