"""A bench: configurations of one model with their measured losses, and the statistics that proxies read, in one parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from compress.errors import CompressError
from compress.proxies.operations import INPUTS
from compress.proxies.statistics import TOTALS, Statistics

VERSION = 1  # of the file, and of what is in it
SUFFIX = ".parquet"
LEAST = 20  # configurations
HEADER = b"compress-toolkit"
CONFIGURATION = "configuration"  # of rows; others hold statistics
COLUMNS = pa.schema(
    [
        ("kind", pa.string()),
        ("name", pa.string()),
        ("choice", pa.list_(pa.int16())),
        ("band", pa.int16()),
        ("average_bits", pa.float64()),
        ("loss", pa.float64()),
        ("shape", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
        ("exact", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Bench:
    """`losses` of `choices`, one option per unit and configuration; a band holds configurations of about one size.

    `key` names the model's weights, the calibration data and how layers were solved; `about` says what people want to know.
    """

    name: str
    key: str
    units: tuple[str, ...]
    options: tuple[str, ...]
    choices: Int[np.ndarray, "C U"]
    bands: Int[np.ndarray, "C"]
    average_bits: Float[np.ndarray, "C"]
    losses: Float[np.ndarray, "C"]
    statistics: Statistics
    about: Mapping[str, Any]

    def check(self) -> None:
        """Raise where nothing can be learned from it."""
        if len(self.losses) < LEAST:
            raise CompressError(f"The bench of {self.name} has {len(self.losses)} configurations; at least {LEAST} are needed.")
        if len(np.unique(self.choices, axis=0)) < len(self.choices):
            raise CompressError(f"The bench of {self.name} has the same configuration twice. Measure it again.")
        if np.ptp(self.losses) == 0 or not np.isfinite(self.losses).all():
            what = "infinite or NaN losses" if np.ptp(self.losses) != 0 else "the same loss for all configurations"
            raise CompressError(
                f"The bench of {self.name} has {what}, which rank nothing. Use options that differ, or other data."
            )


def save(bench: Bench, path: Path) -> None:
    """Write a bench, whole or not at all."""
    table = _table(bench)
    header = {
        "version": VERSION,
        "name": bench.name,
        "key": bench.key,
        "units": bench.units,
        "options": bench.options,
        "layers": bench.statistics.layers,
        "about": bench.about,
    }
    header["digest"] = _digest(header, table)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table.replace_schema_metadata({HEADER: json.dumps(header)}), temporary, compression="zstd")
        temporary.rename(path)
    except OSError as error:
        raise CompressError(f"Cannot write {path}: {error}. Choose another -o.") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Bench:
    """Read a bench; raises for a file that is none, of another version, or changed since it was written."""
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {})[HEADER])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise CompressError(f"{path} is no bench ({type(error).__name__}); make one with `compress evolve bench`.") from error
    if header.get("version") != VERSION:
        raise CompressError(
            f"{path} is a bench of version {header.get('version')}; this program reads {VERSION}. Measure it again."
        )
    digest = header.pop("digest", None)
    if digest != _digest(header, table):
        raise CompressError(f"{path} was changed since it was measured: its hash does not match. Measure it again.")
    rows = table.to_pylist()
    configurations = [row for row in rows if row["kind"] == CONFIGURATION]
    bench = Bench(
        name=header["name"],
        key=header["key"],
        units=tuple(header["units"]),
        options=tuple(header["options"]),
        choices=np.array([row["choice"] for row in configurations], np.int64),
        bands=np.array([row["band"] for row in configurations], np.int64),
        average_bits=np.array([row["average_bits"] for row in configurations]),
        losses=np.array([row["loss"] for row in configurations]),
        statistics=_statistics(header["layers"], {row["name"]: row for row in rows if row["kind"] != CONFIGURATION}),
        about=header["about"],
    )
    bench.check()
    return bench


def _table(bench: Bench) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"kind": CONFIGURATION, "choice": choice, "band": band, "average_bits": bits, "loss": loss}
        for choice, band, bits, loss in zip(
            bench.choices.tolist(), bench.bands.tolist(), bench.average_bits.tolist(), bench.losses.tolist(), strict=True
        )
    ]
    s = bench.statistics
    for name, tensor in s.tensors.items():
        rows.append({"kind": "input", "name": name, "shape": tensor.shape, "values": tensor.ravel()})
    exact = {"unit_of": s.unit_of, "weights": s.weights, "bits": s.bits, **s.totals}
    for name, values in exact.items():
        rows.append({"kind": "total", "name": name, "shape": values.shape, "exact": values.astype(np.float64).ravel()})
    return pa.Table.from_pylist(rows, COLUMNS)


def _statistics(layers: list[str], rows: Mapping[str, Mapping[str, Any]]) -> Statistics:
    exact = {name: np.array(row["exact"]).reshape(row["shape"]) for name, row in rows.items() if row["kind"] == "total"}
    return Statistics(
        layers=tuple(layers),
        unit_of=exact["unit_of"].astype(np.int64),
        weights=exact["weights"],
        bits=exact["bits"],
        tensors={name: np.array(rows[name]["values"], np.float32).reshape(rows[name]["shape"]) for name in INPUTS},
        totals={name: exact[name] for name in TOTALS},
    )


def _digest(header: Mapping[str, Any], table: pa.Table) -> str:
    """Of everything in the file but itself, whichever way it is compressed."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for column in table.columns:
        for chunk in column.chunks:
            digest.update(json.dumps(chunk.to_pylist()).encode())
    return digest.hexdigest()[:24]
