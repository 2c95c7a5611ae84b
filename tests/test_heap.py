from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import ctypes, sys, threading
from compress import heap
if sys.argv[2] == "shared":
    heap.share()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fopen.argtypes, libc.fclose.argtypes = [ctypes.c_char_p] * 2, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
all_there = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (all_there.wait(), libc.malloc(100000), all_there.wait())) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file), libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("how", ["shared", "apart"])
def test_threads_take_memory_from_one_heap(tmp_path: Path, how: str) -> None:
    found = tmp_path / "heaps.xml"
    subprocess.run([sys.executable, "-c", COUNT, str(found), how], check=True, cwd=Path(__file__).parents[1])
    assert (found.read_text().count("<heap nr=") == 1) == (how == "shared")
