"""How large the pieces are that a GPU's programs take: measured tables by device, and a rule for what these do not hold.

A table is `measured` where it came from that device; none that comes along is yet, and what they are seeded with is what the rule
says by `TILES`, whose times are estimates: the kernels were compiled for compute capability 9.0, and their registers, shared
memory and instructions counted, but nothing was timed. Tables that `compress bench --tune` measured on this machine are kept in a
file, and come before the others.
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
from compress.kernels.planar import ROWS, SLICE, TILE, blocks, slices

LEAST_BLOCKS = 4  # of K in a part: fewer do not fill a pipeline
STAGES = 4  # of the rule's, three of them on their way: 70 KB and more by multiprocessor, where 40 hide the latency at 4.8 TB/s
MOST_STAGES = 5
RESERVED = 1024  # bytes of shared memory that every program takes beside its own
BN = 128  # rows of W in the rule's tiles
ADDED = 8.0  # blocks' time: the launch that adds up parts, 2 us
SUM_RATE = 1 << 20  # bytes of parts that are written and read again in a block's time, 4 TB/s
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


@dataclass(frozen=True)
class Tile:
    """Rows of x, warps, the programs that a multiprocessor holds, and its time for a block of one, in 0.25 us.

    8 KB of words take that long at an H200's 4.3 TB/s. Where the rows of x that come with them at 7 TB/s, decoding or the matrix
    unit take longer, it is the arithmetic of what triton 3.6.0 to 3.9.0 make of the kernel (`benchmarks.compiled`, 2026-11).
    """

    BM: int
    warps: int
    programs: int
    time: float = 1.0


TILES: Mapping[int, tuple[Tile, ...]] = MappingProxyType(
    {
        2: (Tile(8, 4, 3, 1.3), Tile(16, 4, 3, 1.4), Tile(32, 8, 2, 1.8), Tile(64, 8, 2, 3.1)),
        3: (Tile(8, 4, 2, 2.0), Tile(16, 8, 2, 2.2), Tile(32, 8, 2, 2.3), Tile(64, 8, 1, 3.4)),
        4: (Tile(8, 4, 4), Tile(16, 4, 3, 1.1), Tile(32, 4, 3, 1.2), Tile(64, 8, 2, 1.8), Tile(128, 8, 2, 3.2)),
        8: (Tile(8, 4, 4), Tile(16, 4, 4), Tile(32, 4, 3, 1.1), Tile(64, 8, 2, 1.3), Tile(128, 8, 2, 1.8)),
    }
)
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


@functools.lru_cache(maxsize=4096)
def rule(M: int, N: int, K: int, bits: int, device: Device) -> Launch:
    """The first tile as tall as x, as many stages as fit beside others, and parts of K for the least estimated time."""
    fitting = [tile for tile in TILES[bits] if shared_bytes(BN, tile.BM, bits, 2) <= device.shared]
    tile = next((tile for tile in fitting if tile.BM >= M), fitting[-1])
    room = (device.shared + RESERVED) // tile.programs - RESERVED
    stages = max((n for n in range(2, STAGES + 1) if shared_bytes(BN, tile.BM, bits, n) <= room), default=2)
    most = max(1, blocks(K, bits) // LEAST_BLOCKS)
    parts = min(range(1, most + 1), key=lambda parts: _time(parts, -(-M // tile.BM), N, blocks(K, bits), tile, device))
    return Launch(BN, tile.BM, parts, tile.warps, stages)


def _time(parts: int, high: int, N: int, B: int, tile: Tile, device: Device) -> float:
    """Estimated time in blocks of a product `high` tiles high, one more than its own for every program to begin and end."""
    tiles, per_part = high * -(-N // BN), -(-B // parts)
    parts = -(-B // per_part)
    busiest = -(-tiles * parts // device.processors)  # programs of a multiprocessor, which is no faster with few of them
    added = ADDED + parts * tiles * BN * tile.BM * 8 / SUM_RATE if parts > 1 else 0.0
    return max(busiest, tile.programs) * (per_part + 1) * tile.time + added


def neighbours(how: Launch, M: int, N: int, K: int, bits: int, device: Device) -> list[Launch]:
    """The launches that differ from `how` in one piece's size by one step and fit the device."""
    shapes = [(64, 4), (BN, 4), (BN, 8), (2 * BN, 16)]
    if -(-N // ROWS) % 2:
        shapes.pop()  # rows are padded to a multiple of ROWS only
    at = shapes.index((how.BN, how.warps))
    BMs = [size for size in (8, 16, 32, 64, 128) if size in (how.BM // 2, how.BM * 2) and size < 2 * max(M, 8)]
    near = [
        *(replace(how, BN=rows, warps=warps) for rows, warps in shapes[max(at - 1, 0) : at + 2]),
        *(replace(how, BM=BM) for BM in BMs),
        *(replace(how, stages=stages) for stages in (how.stages - 1, how.stages + 1)),
        *(replace(how, parts=parts) for parts in (how.parts // 2, how.parts * 2, how.parts - 1, how.parts + 1)),
    ]
    return [one for one in dict.fromkeys(near) if one != how and _fits(one, K, bits, device)]


def _fits(how: Launch, K: int, bits: int, device: Device) -> bool:
    return (
        2 <= how.stages <= MOST_STAGES
        and shared_bytes(how.BN, how.BM, bits, how.stages) <= device.shared
        and TILES[bits][-1].BM >= how.BM
        and (how.parts == 1 or 1 < how.parts <= blocks(K, bits) // LEAST_BLOCKS)
    )


def rule_for_experts(rows: int, E: int, N: int, K: int, bits: int, device: Device) -> Launch:
    """The launch for `rows` rows that are spread over E experts, whose tiles fill the chip together."""
    how = rule(max(1, rows // E), N, K, bits, device)
    return replace(how, parts=max(1, how.parts // min(E, rows)))


def shared_bytes(BN: int, BM: int, bits: int, stages: int) -> int:
    """Shared memory of a program, at most: words one stage fewer, activations of 16 bits, and scales on their way."""
    words, activations = BN * SLICE * (3 if bits == 3 else 2), BM * SLICE * slices(bits) * 2
    return words * (stages - 1) + activations * stages + BN * 4


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
