"""The command started so that it heeds Ctrl-C, also where the shell that runs the tests ignores it, as it does after an &."""

from __future__ import annotations

import sys

HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
COMMAND = [sys.executable, "-c", HEED, sys.executable, "-m", "compress"]
