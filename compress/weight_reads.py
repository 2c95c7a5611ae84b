"""Layers whose weight is read by the module around them: a packed layer has none in other programs, so that these stay dense."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

NEVER_TAKEN = "slow_but_exact"  # a branch of BLOOM that slices weights as its training did, which no released config asks for
READ = re.compile(r"\bself\.([A-Za-z_][\w.]*)\.weight\b")
SETTING_UP = re.compile(r"__init__|_init|init_|reset_parameters|tie_weights")  # methods that run before weights are loaded


def read_by_parents(model: nn.Module, layers: Iterable[str]) -> Iterator[str]:
    """The layers that a method of a module around them reads the weight of, as far as the module's source says so by name.

    Mamba's mixer asks `self.x_proj.weight` for its device, the indexer of DeepSeek V3.2 multiplies by a layer's weight itself.
    """
    for layer in layers:
        parts = layer.split(".")
        if any(".".join(parts[i:]) in _read_in(_class(model, parts[:i])) for i in range(len(parts))):
            yield layer


def _class(model: nn.Module, parts: list[str]) -> Any:
    return type(model.get_submodule(".".join(parts)))


@functools.cache
def _read_in(cls: type[nn.Module]) -> frozenset[str]:
    """The submodules of a class, by the names that it has for them, whose weight its methods read."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not SETTING_UP.search(name) and NEVER_TAKEN not in (source := _source(method)):
                names.update(READ.findall(source))
    return frozenset(names)


def _source(function: object) -> str:
    try:
        return inspect.getsource(function)  # type: ignore[arg-type]
    except (OSError, TypeError):  # made on the way, or without a file
        return ""
