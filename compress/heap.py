"""How the C library hands out memory while passes that pause, each in a thread of its own, hold theirs."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_ARENA_MAX = -8  # of glibc's malloc.h


def share() -> None:
    """Have glibc keep one heap for all threads that start from here on, so that what one frees another uses.

    For the whole process, and for good; heaps that threads made before stay in use. With a heap per thread three runs of
    `quantize` on the reference model, 128 x 256 tokens, peaked at 2083 MiB of anonymous memory, with one at 1298 to 1430, in 3 %
    less CPU time. Half of that are holes: glibc 2.36 seldom fills one with an aligned block of the same size, as it asks for
    room to align it. Blocks above 1 MiB that go back to the system one by one leave none (721 MiB), but take 40 % more CPU time:
    all of it is faulted in again (2 cores of an AMD EPYC, 2026-11-21).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)
