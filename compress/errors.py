"""The one exception that people see."""

from __future__ import annotations

from collections.abc import Mapping


class CompressError(Exception):
    """Something the user can act on: what was wrong, with its name and numbers, and what to do. The CLI exits with 2."""


def refuse(flags: Mapping[str, object], because: str) -> None:
    """Raise where flags were given that would change nothing, and name them; `because` says why, as a sentence's first half."""
    if given := [flag for flag, value in flags.items() if value]:
        raise CompressError(f"{because}; leave out {', '.join(given)}.")
