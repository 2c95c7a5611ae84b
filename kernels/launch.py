"""How large the pieces are that a GPU's programs take: measured tables by device, and a rule for what these do not hold.

A table is `measured` where it came from that device; none that comes along is yet. The rule is an estimate too: what it chooses
was compiled for compute capability 9.0 and its registers, shared memory and instructions checked, but nothing was timed. Tables
that `compress bench --tune` measured on this machine are kept in a file, and come before the others.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from compress.kernels import cpu
from compress.kernels.planar import SLICE, TILE, blocks, slices

LEAST_BLOCKS = 4  # of K in a part: fewer do not fill a pipeline
MOST_STAGES = 5
WARPS = 16  # that a multiprocessor should hold: the loop waits for its matrix instructions, and others' work fills the gaps
FIXED_SHARED = 4096  # bytes of shared memory left for what is not a stage
FILE_VERSION = 1
FILE = "COMPRESS_KERNEL_TABLES"  # the environment variable that names the file of measured tables
DEFAULT_FILE = "~/.cache/compress/kernels.json"


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

    `scratch` is the most bytes of weight that are dequantized at once. `few_rows` is to the layouts of a CPU what `fused_rows`
    is to a GPU's; `cpu.FEW_ROWS` for one that is not there.
    """

    measured: bool = False
    fused_rows: int = 512
    scratch: int = 256 << 20
    launches: Mapping[Key, Launch] = field(default_factory=lambda: MappingProxyType({}))
    few_rows: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Device:
    """A GPU's name, its multiprocessors, and the bytes of shared memory that a program may use on one."""

    name: str
    processors: int
    shared: int


TABLES = MappingProxyType({"NVIDIA H200": Table(), "NVIDIA H100": Table(), "NVIDIA A100": Table(fused_rows=256)})


@functools.cache
def table_of(name: str) -> Table:
    """The table measured here for a device of that name, else the one whose name it begins with, else the defaults."""
    if (mine := read(user_file()).get(name)) is not None:
        return mine
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


def neighbours(how: Launch, M: int, K: int, bits: int, device: Device) -> list[Launch]:
    """The launches that differ from `how` in one piece's size by one step and fit the device."""
    BMs = [size for size in (16, 32, 64, 128) if size in (how.BM // 2, how.BM * 2) and size < 2 * max(M, 16)]
    near = [
        replace(how, BN=192 - how.BN, warps=12 - how.warps),  # 64 and 4, or 128 and 8
        *(replace(how, BM=BM) for BM in BMs),
        *(replace(how, stages=stages) for stages in (how.stages - 1, how.stages + 1)),
        *(replace(how, parts=parts) for parts in (how.parts // 2, how.parts * 2, how.parts - 1, how.parts + 1)),
    ]
    return [one for one in dict.fromkeys(near) if one != how and _fits(one, K, bits, device)]


def _fits(how: Launch, K: int, bits: int, device: Device) -> bool:
    shared = how.stages * stage_bytes(how.BN, how.BM, bits)
    return (
        2 <= how.stages <= MOST_STAGES
        and shared <= device.shared - FIXED_SHARED
        and (64 if bits < 4 else 128) >= how.BM
        and (how.parts == 1 or 1 < how.parts <= blocks(K, bits) // LEAST_BLOCKS)
    )


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


def user_file() -> Path:
    """The file of the tables measured on this machine."""
    return Path(os.environ.get(FILE, DEFAULT_FILE)).expanduser()


def read(file: Path) -> dict[str, Table]:
    """Tables by the names of their devices; none where there is no file. Raises ValueError for one that is damaged."""
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["version"] != FILE_VERSION:
            raise ValueError(f"its version is {document['version']}")
        return {name: _table(entry) for name, entry in document["devices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of kernel tables ({error!r}); delete it, or set {FILE} to another one") from error


def write(file: Path, tables: Mapping[str, Table]) -> None:
    """Write tables, all or none of them. Inverse of `read`."""
    devices = {
        name: asdict(replace(table, launches={}, few_rows=dict(table.few_rows)))
        | {"launches": [{"key": asdict(key), "launch": asdict(how)} for key, how in table.launches.items()]}
        for name, table in tables.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"version": FILE_VERSION, "devices": devices}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    table_of.cache_clear()


def _table(entry: Mapping[str, Any]) -> Table:
    launches = {Key(**one["key"]): Launch(**one["launch"]) for one in entry["launches"]}
    return Table(**{**entry, "launches": launches})


@functools.cache
def describe(device: torch.device) -> Device:
    """What a device is; a CPU, where only the interpreter runs these kernels, has one processor."""
    if device.type != "cuda":
        return Device(processor(), 1, 1 << 17)
    from triton.runtime import driver

    found = driver.active.utils.get_device_properties(device.index)
    return Device(torch.cuda.get_device_name(device), found["multiprocessor_count"], found["max_shared_mem"])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it, and does not trace the driver
def fused_rows(device: torch.device) -> int:
    """The most rows of x that the fused product is for."""
    return table_of(describe(device).name).fused_rows


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def few_rows(layout: str, device: torch.device) -> int:
    """The most rows of x that the kernel of a CPU's layout is for."""
    return table_of(describe(device).name).few_rows.get(layout, cpu.FEW_ROWS[layout])


@functools.cache
def processor() -> str:
    """The CPU's name, where the system says it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
