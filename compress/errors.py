"""The one exception that people see."""

from __future__ import annotations


class CompressError(Exception):
    """Something the user can act on: what was wrong, with its name and numbers, and what to do. The CLI exits with 2."""
