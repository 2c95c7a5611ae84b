"""The code that solves layers, in one short text: what was solved by other code is not taken for what this code would make."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

from compress import __version__

PACKAGE = Path(__file__).parent
SOLVING = ("solvers", "calib", "kernels", "sequential.py", "passes.py", "experts.py", "linalg.py", "qtensor.py")


@functools.cache
def solving() -> str:
    """A hash of the source that calibrates and solves layers, and of the versions of this package and of torch."""
    return digest([PACKAGE / part for part in SOLVING], __version__, version("torch"))


def digest(parts: list[Path], *others: str) -> str:
    """A hash of files, and of all Python files of folders, by name and content, and of further texts."""
    found = hashlib.sha256("\n".join(others).encode())
    for part in parts:
        for file in sorted(part.glob("*.py")) if part.is_dir() else [part]:
            found.update(f"\n{part.name}/{file.name}\n".encode() + file.read_bytes())
    return found.hexdigest()
