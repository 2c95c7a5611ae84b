"""Free memory is what a process may still take: of the machine, of its control groups, and of its address space."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compress import machine, models

GB = 10**9
MEMINFO = f"MemTotal: {256 * 10**6} kB\nMemAvailable:   {200 * GB // 1024} kB\nHugePages_Total:       0\n"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def group(folder: str, limit: object, used: int, cache: int, v1: bool) -> dict[str, object]:
    names = machine.V1 if v1 else machine.V2
    return {f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": used, f"{folder}/memory.stat": f"anon 5\n{names[2]} {cache}"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, machine.UNKNOWN),
        ({"proc/meminfo": MEMINFO}, 200 * GB // 1024 * 1024),
        ({"proc/self/cgroup": "0::/a/b", **group("sys/fs/cgroup/a/b", 16 * GB, 10 * GB, GB, v1=False)}, 7 * GB),
        ({"proc/self/cgroup": "0::/a/b", **group("sys/fs/cgroup/a", 16 * GB, 10 * GB, GB, v1=False)}, 7 * GB),
        ({"proc/self/cgroup": "0::/", **group("sys/fs/cgroup", 16 * GB, 20 * GB, GB, v1=False)}, 0),
        ({"proc/self/cgroup": "0::/a", **group("sys/fs/cgroup/a", "max", 10 * GB, GB, v1=False)}, machine.UNKNOWN),
        (
            {"proc/self/cgroup": "5:cpu,memory:/c\n1:name=x:/", **group("sys/fs/cgroup/memory/c", 4 * GB, 3 * GB, 0, v1=True)},
            GB,
        ),
        ({"proc/self/cgroup": "5:memory:/c", **group("sys/fs/cgroup/memory/c", 2**63 - 4096, 3, 0, v1=True)}, machine.UNKNOWN),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b",
                **group("sys/fs/cgroup/a", 9 * GB, GB, 0, v1=False),
                **group("sys/fs/cgroup/a/b", 16 * GB, GB, 0, v1=False),
            },
            8 * GB,
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path, files, free):
    assert machine.host_memory(tree(tmp_path, files)) == free


def test_a_limit_of_the_address_space_counts(tmp_path, monkeypatch):
    tree(tmp_path, {"proc/self/status": f"Name: python\nVmSize:   {3 * GB // 1024} kB\nState: R (running)"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5 * GB, 5 * GB))
    assert machine.host_memory(tmp_path) == 5 * GB - 3 * GB // 1024 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set as on Linux")
def test_this_machine_under_a_real_limit():
    there = machine.free_memory(torch.device("cpu"))
    assert 0 < there < 10**14
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from compress import machine; print(machine.host_memory())"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert 0 < int(done.stdout) < 8 << 30


def test_macos_counts_bytes_and_has_no_affinity(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrusage", lambda _: resource.struct_rusage([0, 0, 7 << 20, *[0] * 13]))
    assert machine.peak_memory() == (7 << 20) * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    assert machine.peak_memory() == 7 << 20
    assert machine.cores() == 10


@pytest.mark.parametrize(("pays", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_models_run_in_bfloat16_where_that_is_faster(pays, expected, monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_pays", lambda: pays)
    cpu = torch.device("cpu")
    assert models.compute_dtype(torch.bfloat16, cpu) == expected
    assert models.compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert models.compute_dtype(torch.float16, cpu) == models.compute_dtype(torch.float32, cpu) == torch.float32
    assert models.dtype("bfloat16", torch.bfloat16, cpu) == torch.bfloat16  # who asks for a dtype gets that


@pytest.fixture
def reported(monkeypatch):
    """Have the CPU report instructions for bfloat16, or none; the probe is asked anew before and after."""

    def report(there: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there, raising=False)
        machine.bfloat16_pays.cache_clear()

    yield report
    machine.bfloat16_pays.cache_clear()


def test_the_probe_compares_times(reported, monkeypatch):
    seconds = {torch.bfloat16: 0.7, torch.float32: 1.0}
    monkeypatch.setattr(machine, "_seconds", seconds.__getitem__)
    reported(True)
    assert machine.bfloat16_pays()
    seconds[torch.bfloat16] = 0.9
    assert machine.bfloat16_pays()  # it is asked once
    reported(True)
    assert not machine.bfloat16_pays()


def test_no_load_of_the_machine_chooses_bfloat16_where_the_cpu_has_no_instructions_for_it(reported, monkeypatch):
    monkeypatch.setattr(machine, "_seconds", {torch.bfloat16: 0.1, torch.float32: 1.0}.__getitem__)
    reported(False)
    assert not machine.bfloat16_pays()


def test_the_probe_counts_one_thread_and_not_what_others_take_from_it(monkeypatch):
    used: list[int] = []
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])
    monkeypatch.setattr(time, "thread_time", lambda: used.append(torch.get_num_threads()) or next(ticks))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert machine._seconds(torch.float32) == 2.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert used == 8 * [1]
