"""What a machine gives a process: memory that is free, cores, and the most memory that was used."""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
PROBE, PROBES, CLEARLY_LESS = 256, 4, 0.8
UNKNOWN = 2 << 30  # bytes that are taken to be free where the system does not say
UNLIMITED = 1 << 60  # what control groups of version 1 say where there is no limit, or more
V1, V2 = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("memory.max", "memory.current", "inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or in the machine within the limits of the process."""
    if device.type == "cuda":  # what torch keeps for later use is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return host_memory()


def host_memory(root: Path = ROOT) -> int:
    """Bytes that are free by the least of the machine, the control groups of the process, and its limit of address space.

    `root` is the folder that /proc and /sys are in.
    """
    return max(0, min([*_available(root), *_control_groups(root), *_address_space(root)], default=UNKNOWN))


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def peak_memory() -> int:
    """The most bytes of memory that this process has had at once; systems count in different units."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def bfloat16_pays() -> bool:
    """Tell whether the CPU multiplies bfloat16 matrices clearly faster than float32 ones, by a probe of milliseconds, once.

    Only a CPU that reports such instructions is probed, so that no load of the machine can talk another one into bfloat16. They
    halve the time, and without them a product takes several times longer, so that CLEARLY_LESS lies far from both.
    """
    reported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return reported and _seconds(torch.bfloat16) < CLEARLY_LESS * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least time of a product of PROBE x PROBE matrices on one thread.

    Of this thread alone, without what others take from it: by the clock, on two threads of a busy machine, AVX2 without
    instructions for bfloat16 took 12 ms in bfloat16 and 16 in float32; so measured, 5.7 and 0.8 (AMD EPYC, 2 cores, 2026-12-01).
    """
    x, threads, times = torch.ones(PROBE, PROBE, dtype=dtype), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(PROBES):
            start = time.thread_time()
            torch.nn.functional.linear(x, x)
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def _available(root: Path) -> Iterator[int]:
    if (file := root / "proc/meminfo").is_file():
        yield _fields(file)["MemAvailable"] * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """What each group that the process is in, and every group around it, leaves free; a container sees some of them."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        number, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        if number == "0":
            base, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        for group in (inside, *inside.parents):
            yield from _group(base / group, *names)


def _group(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """A group's limit less what is used; files that were read and are not in use give their memory back."""
    if not (folder / limit).is_file() or not (folder / used).is_file():
        return
    said = (folder / limit).read_text().strip()
    if said != "max" and int(said) < UNLIMITED:
        held = _fields(folder / "memory.stat").get(cache, 0) if (folder / "memory.stat").is_file() else 0
        yield int(said) - int((folder / used).read_text()) + held


def _address_space(root: Path) -> Iterator[int]:
    limit, status = resource.getrlimit(resource.RLIMIT_AS)[0], root / "proc/self/status"
    if limit != resource.RLIM_INFINITY:
        yield limit - (_fields(status)["VmSize"] * 1024 if status.is_file() else 0)


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    pairs = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {name: int(value) for name, value, *_ in (pair for pair in pairs if len(pair) > 1) if value.isdecimal()}
