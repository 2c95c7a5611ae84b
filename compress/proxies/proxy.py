"""An evolved proxy as a file: its formula, with the record of the search that found it; and the table it makes for a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.mixed.methods import Subject, Table
from compress.proxies.formula import Formula, parse
from compress.proxies.gathering import gather
from compress.proxies.operations import INPUTS

DEFAULT = Path(__file__).parent / "emq.json"  # evolved on all benches of benchmarks/proxies.py
DIGITS = 6


@dataclass(frozen=True)
class Proxy:
    """A formula and where it is from: seed, benches, fitness."""

    formula: Formula
    search: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        document = {
            "formula": str(self.formula),
            "inputs": {name: INPUTS[name].meaning for name in sorted(self.formula.inputs)},
            "complexity": self.formula.complexity,
            "search": self.search,
        }
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            temporary.rename(path)
        except OSError as error:
            raise CompressError(f"Cannot write {path}: {error}. Choose another -o.") from error


def load(path: str | Path | None = None) -> Proxy:
    """A proxy from its file, by default the one that comes along; raises for what is none, or has unknown operations."""
    path = Path(path or DEFAULT)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        text, search = document["formula"], document.get("search", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{path} is no proxy ({type(error).__name__}: {error}); make one with `compress evolve`.") from error
    return Proxy(parse(str(text)), search)


def predicted(proxy: Proxy, subject: Subject) -> Table:
    """What every option of every unit loses by a proxy, in its own unit: only the order of configurations means anything."""
    statistics = gather(subject, sorted(proxy.formula.inputs))
    table = proxy.formula.table(statistics.tensors, statistics.weights, statistics.bits)
    for name, row in zip(statistics.layers, table, strict=True):
        if not np.isfinite(row).all():
            raise CompressError(f"{name}: the proxy {proxy.formula} is NaN or infinite. Use another --proxy, or --method kl.")
    rows = statistics.by_unit(table).tolist()
    return [row[: len(options)] for row, options in zip(rows, subject.space.options, strict=True)]
