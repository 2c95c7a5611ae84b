"""The command started so that it heeds Ctrl-C, also where the shell that runs the tests ignores it, as it does after an &."""

from __future__ import annotations

import sys

HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
HEEDING = [sys.executable, "-c", HEED, sys.executable]
COMMAND = [*HEEDING, "-m", "compress"]

WAIT = """
import time
from compress.checkpoint import BLOCKS, Writer
from compress.cli import main

write = Writer.block

def block(writer, number, *rest):
    if number == 2:
        (writer.partial / BLOCKS / "unfinished").write_bytes(b"half a block")
        time.sleep(600)
    write(writer, number, *rest)

Writer.block = block
main.main()
"""
WAITING = [*HEEDING, "-c", WAIT]  # the command, which waits in the middle of writing its third block
