"""Text that every CPython carries: the language reference's topics and the standard library's docstrings.

Nothing is committed or downloaded. One document in ten, chosen by a hash of its text, is held out for evaluation.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "eval"]

HELD_OUT_ONE_IN = 10
MIN_CHARACTERS = 40  # shorter docstrings are mostly "See base class."
NOT_LIBRARY = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"})
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(split: Split, *, seed: int = 0) -> Iterator[str]:
    """Yield the distinct documents of one split, file by file in an order drawn from `seed`; the same on the same Python."""
    seen: set[int] = set()
    sources: list[Path | None] = [None, *_library_files()]  # None stands for the topics
    random.Random(seed).shuffle(sources)
    for source in sources:
        for text in topics.values() if source is None else _docstrings(source):
            digest = zlib.crc32(text.encode())
            held_out = digest % HELD_OUT_ONE_IN == 0
            if held_out == (split == "eval") and len(text) >= MIN_CHARACTERS and digest not in seen:
                seen.add(digest)
                yield text.strip()


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not NOT_LIBRARY.intersection(path.relative_to(root).parts))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
