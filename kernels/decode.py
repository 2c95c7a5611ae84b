"""From words to numbers in a kernel: by writing codes into the mantissa of a constant where that is known to work, else by casts.

Where the last bit of a constant's mantissa counts one (1024 in float16, 128 in bfloat16), constant plus code is its bits OR the
code, and subtracting constant and zero point together is exact. It takes PTX to do this to both halves of a 32-bit register at
once: 1.5 instructions an element, 2.5 for 3 bits, where a cast takes more than five. 8-bit codes do not fit a bfloat16's mantissa
and go through a float32's.
"""

from __future__ import annotations

import functools
import warnings
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.planar import SLICE, from_planar, plane_bits, slices, to_planar

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PAIR = 0x0001_0001  # the same 16 bits in both halves of a register
MANTISSA = {torch.float16: (1024, 0x6400), torch.bfloat16: (128, 0x4300)}  # the constant, and its bits
WIDE = 1 << 23  # float32's
SUBTRACT = {
    torch.float16: "add.rn.f16x2 $0, t, {minus};",
    torch.bfloat16: "mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, t, one, {minus};",  # bfloat16 has add from compute 9.0 on only
}
CAPABILITY = (8, 0)  # that the PTX needs


@functools.cache
def assembly(bits: int, dtype: torch.dtype) -> str:
    """PTX that decodes two elements: $1 words, for 3 bits $2 the high bits, then twice the shifts of these, then minus zero."""
    if bits == 8 and dtype == torch.bfloat16:  # prmt puts a byte of the words under float32's exponent
        return (
            "{ .reg .b32 which, a, b; .reg .f32 u, v;"
            " shr.u32 which, $2, 3; add.u32 which, which, 0x7540; prmt.b32 a, $1, 0x4b000000, which;"
            " add.u32 which, which, 2; prmt.b32 b, $1, 0x4b000000, which;"
            " mov.b32 u, a; mov.b32 v, b; add.rn.f32 u, u, $4; add.rn.f32 v, v, $5;"
            " cvt.rn.bf16x2.f32 $0, v, u; }"
        )
    mask, magic = PAIR * (2 ** plane_bits(bits) - 1), PAIR * MANTISSA[dtype][1]
    if bits == 3:
        cut = f"shr.u32 t, $1, $3; lop3.b32 t, t, {mask}, {magic}, 0xea; add.u32 h, $5, 30; shf.r.wrap.b32 h, $2, $2, h;"
        cut += f" lop3.b32 t, h, {PAIR * 4}, t, 0xea;"  # turned until bit s is bit 2
        minus = "$7"
    else:
        cut, minus = f"shr.u32 t, $1, $2; lop3.b32 t, t, {mask}, {magic}, 0xea;", "$4"  # 0xea is (a and b) or c
    return f"{{ .reg .b32 t, h, one; {cut} {SUBTRACT[dtype].format(minus=minus)} }}"


def constant(bits: int, dtype: torch.dtype, code: str) -> int:
    """What a decoded code is too large by before the zero point is subtracted."""
    if not code:
        return 0
    return WIDE if bits == 8 and dtype == torch.bfloat16 else MANTISSA[dtype][0]


@triton.jit
@no_type_check
def minus_zero(zero, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """The third operand of `decode` from zero points."""
    minus = -(zero.to(tl.float32) + FIRST)
    if FIRST != 8388608:  # WIDE, whose sum with a zero point fits no smaller float; the PTX adds it in float32
        minus = minus.to(DTYPE)
    return minus


@triton.jit
@no_type_check
def decode(low, high, minus, s: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr):
    """Slice s of the words, code minus zero point, exact; `minus` broadcasts along the inputs."""
    if CODE == "":
        PLANE: tl.constexpr = 2 if BITS == 3 else BITS
        u = (low >> (PLANE * s)) & ((1 << PLANE) - 1)
        if BITS == 3:
            u |= ((high >> s) & 1).to(tl.int16) << 2
        out = u.to(DTYPE) + minus
    elif BITS == 3:
        operands = [low, high.to(tl.int16), 2 * s, s, minus]
        out = tl.inline_asm_elementwise(CODE, "=r,r,r,r,r,r,r,r", operands, minus.dtype, is_pure=True, pack=2)
    elif minus.dtype == tl.float32:
        out = tl.inline_asm_elementwise(CODE, "=r,r,r,r,f,f", [low, BITS * s, minus], tl.bfloat16, is_pure=True, pack=2)
    else:
        out = tl.inline_asm_elementwise(CODE, "=r,r,r,r,r", [low, BITS * s, minus], minus.dtype, is_pure=True, pack=2)
    return out


@triton.jit
@no_type_check
def decode_run(low, high, minus, s: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr):
    """Slices s .. s + RUN - 1 of the words side by side, [rows, RUN * 32], for a RUN of 1, 2 or 4."""
    levels = decode(low, high, minus, s, BITS, DTYPE, CODE)
    if RUN == 2:
        levels = tl.join(levels, decode(low, high, minus, s + 1, BITS, DTYPE, CODE)).permute(0, 2, 1)
    if RUN == 4:
        second = decode(low, high, minus, s + 1, BITS, DTYPE, CODE)
        third = decode(low, high, minus, s + 2, BITS, DTYPE, CODE)
        fourth = decode(low, high, minus, s + 3, BITS, DTYPE, CODE)
        levels = tl.join(tl.join(levels, second), tl.join(third, fourth)).permute(0, 3, 2, 1)
    return levels.reshape(low.shape[0], RUN * 32)


@triton.jit
@no_type_check
def _decode_tile(
    low,
    high,
    zeros,
    out,
    BITS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    CODE: tl.constexpr,
):
    row, i = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * WIDTH + i[None, :]
    words = tl.load(low + at)
    bytes_ = tl.load(high + at) if BITS == 3 else words
    minus = minus_zero(tl.load(zeros + row), FIRST, DTYPE)[:, None]
    for s in tl.static_range(SLICES):
        tl.store(out + s * ROWS * WIDTH + at, decode(words, bytes_, minus, s, BITS, DTYPE, CODE))


@functools.cache
def code_for(bits: int, dtype: torch.dtype, device: torch.device) -> str:
    """The PTX where this device decodes every code rightly with it, with a warning where it should and does not; else "".

    Compiles and runs a small kernel the first time, so that time must not be while a CUDA graph is captured.
    """
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    if not nvidia or dtype not in MANTISSA or torch.cuda.get_device_capability(device) < CAPABILITY:
        return ""
    code = assembly(bits, dtype)
    try:
        if decodes(bits, dtype, device, code):
            return code
        reason = "gives wrong numbers"
    except (triton.TritonError, RuntimeError) as error:  # what the PTX assembler says arrives as either
        reason = f"does not assemble ({error})"
    warnings.warn(f"The {bits}-bit {dtype} decode {reason} on {device}; slower casts take its place.", stacklevel=2)
    return ""


def decodes(bits: int, dtype: torch.dtype, device: torch.device, code: str) -> bool:
    """Whether every code, with zero points from the whole range, is decoded exactly."""
    K, levels = SLICE * slices(bits), 2**bits
    codes = torch.arange(64 * K, device=device).view(64, K).mul(37).remainder(levels).to(torch.uint8)
    zeros = torch.arange(64, device=device).mul(4).remainder(levels).to(torch.uint8)[:, None]
    tensors = to_planar(codes, torch.ones(64, 1, device=device), zeros, bits)
    out: Tensor = torch.empty(slices(bits), 64, SLICE, dtype=dtype, device=device)
    low, high = tensors["low"][0, 0], tensors.get("high", tensors["low"])[0, 0]
    constants = dict(BITS=bits, SLICES=slices(bits), WIDTH=SLICE, ROWS=64, DTYPE=DTYPES[dtype], CODE=code)
    _decode_tile[(1,)](low, high, zeros, out, FIRST=constant(bits, dtype, code), **constants)
    expected = from_planar(tensors, 64, K, 1, bits)[0].float() - zeros.float()
    return torch.equal(out.transpose(0, 1).reshape(64, K).float(), expected)
