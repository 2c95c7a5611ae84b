"""How large the pieces are that a GPU's programs take: measured tables by device, and a rule for what these do not hold.

A table is `measured` where it came from benchmarks/kernels.py on that device; none is yet. The rule is an estimate too: what it
chooses was compiled for compute capability 9.0 and its registers, shared memory and instructions checked, but nothing was timed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from compress.kernels.planar import SLICE, TILE, blocks, slices

LEAST_BLOCKS = 4  # of K in a part: fewer do not fill a pipeline
MOST_STAGES = 5
WARPS = 16  # that a multiprocessor should hold: the loop waits for its matrix instructions, and others' work fills the gaps
FIXED_SHARED = 4096  # bytes of shared memory left for what is not a stage


@dataclass(frozen=True)
class Launch:
    """Rows of W and of x that a program takes, parts that K is cut into, warps, and loads in flight."""

    BN: int
    BM: int
    parts: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Key:
    """What a launch is looked up by; M is the next power of two."""

    M: int
    N: int
    K: int
    group: int
    bits: int


@dataclass(frozen=True)
class Table:
    """What is known of a kind of GPU. From `fused_rows` + 1 rows of x on, dense products with dequantized weights are faster.

    `scratch` is the most bytes of weight that are dequantized at once.
    """

    measured: bool = False
    fused_rows: int = 512
    scratch: int = 256 << 20
    launches: Mapping[Key, Launch] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Device:
    """A GPU's name, its multiprocessors, and the bytes of shared memory that a program may use on one."""

    name: str
    processors: int
    shared: int


TABLES = MappingProxyType({"NVIDIA H200": Table(), "NVIDIA H100": Table(), "NVIDIA A100": Table(fused_rows=256)})


@functools.cache
def table_of(name: str) -> Table:
    """The table whose name a device's begins with, or the defaults."""
    return next((table for start, table in TABLES.items() if name.startswith(start)), Table())


def choose(M: int, N: int, K: int, G: int, bits: int, device: Device) -> Launch:
    """The launch for a product: the table's, or the rule's."""
    key = Key(1 << (M - 1).bit_length(), N, K, K // G, bits)
    return table_of(device.name).launches.get(key) or rule(M, N, K, bits, device)


def rule(M: int, N: int, K: int, bits: int, device: Device) -> Launch:
    """Tiles as tall as x up to 128 rows, as many stages as fit beside other programs, and parts of K until the chip is full."""
    BN, warps = (64, 4) if M <= 4 else (128, 8)  # one group of four warps for each matrix instruction of 64 rows
    BM = min(64 if bits < 4 else 128, max(16, 1 << (M - 1).bit_length()))  # 128 rows and eight slices spill
    while BM > 16 and 2 * stage_bytes(BN, BM, bits) > device.shared - FIXED_SHARED:
        BM //= 2
    beside = 4 if BM <= 16 else 2 if BM <= 64 else 1
    stages = (device.shared // beside - FIXED_SHARED) // stage_bytes(BN, BM, bits)
    wanted = device.processors * (WARPS if BM <= 64 else WARPS // 2) / (-(-N // BN) * -(-M // BM) * warps)
    parts = max(1, min(round(wanted), blocks(K, bits) // LEAST_BLOCKS))
    return Launch(BN, BM, parts, warps, min(MOST_STAGES, max(2, stages)))


def rule_for_experts(rows: int, E: int, N: int, K: int, bits: int, device: Device) -> Launch:
    """The launch for `rows` rows that are spread over E experts, whose tiles fill the chip together."""
    how = rule(max(1, rows // E), N, K, bits, device)
    return replace(how, parts=max(1, how.parts // min(E, rows)))


def stage_bytes(BN: int, BM: int, bits: int) -> int:
    """Shared memory that one block of both operands takes, activations in 16 bits."""
    return BN * SLICE * (3 if bits == 3 else 2) + BM * SLICE * slices(bits) * 2


def scratch_rows(N: int, K: int, size: int, device: Device) -> int:
    """Rows of a weight to dequantize at once, in elements of `size` bytes."""
    rows = table_of(device.name).scratch // (K * size) // TILE * TILE
    return min(max(TILE, rows), max(N, 1))


@functools.cache
def describe(device: torch.device) -> Device:
    """What a device is; a CPU, where only the interpreter runs these kernels, has one processor."""
    if device.type != "cuda":
        return Device(device.type, 1, 1 << 17)
    from triton.runtime import driver

    found = driver.active.utils.get_device_properties(device.index)
    return Device(torch.cuda.get_device_name(device), found["multiprocessor_count"], found["max_shared_mem"])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it, and does not trace the driver
def fused_rows(device: torch.device) -> int:
    """The most rows of x that the fused product is for."""
    return table_of(describe(device).name).fused_rows
