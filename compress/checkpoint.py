"""Checkpoints on disk: what a folder holds, whether it is whole, and writing a compressed one that is complete or absent."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError

REPORT = "compress_report.json"
INDEX = "model.safetensors.index.json"
CHUNK = 1 << 24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: safetensors' dtype name, shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder by name, from the files' headers alone; raises for missing, truncated or corrupt files."""
    if not folder.is_dir():
        raise CompressError(f"There is no folder {folder}.")
    files = _weight_files(folder)
    if not files:
        raise CompressError(f"{folder} has no .safetensors files.")
    found: dict[str, TensorInfo] = {}
    for file in files:
        found.update(_header(file))
    return found


def verify(folder: Path) -> None:
    """Raise unless every weight file is whole and, where the report lists checksums, has the bytes that were written."""
    index(folder)
    report = folder / REPORT
    if not report.is_file():
        return
    try:
        files = json.loads(report.read_text(encoding="utf-8")).get("files", {})
    except (ValueError, AttributeError) as error:
        raise CompressError(f"{report} is damaged: {error}. Compress the model again.") from error
    for name, entry in files.items():
        if (folder / name).is_file() and checksum(folder / name) != entry["crc32"]:
            raise CompressError(
                f"{folder / name} is damaged: its CRC-32 differs from {REPORT}. Copy it again from where it was made."
            )


def checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files the folder's index names, or model.safetensors, or whatever safetensors there are."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CompressError(f"{folder / INDEX} is damaged: {error!r}.") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CompressError(
                f"{folder} lacks {missing[0]}, which {INDEX} lists; {len(missing)} of {len(names)} files are missing."
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else math.inf
        if 8 + length > size:
            raise CompressError(f"{file} is truncated or not a safetensors file: {size:,} bytes. Copy or download it again.")
        raw = stream.read(int(length))
    try:
        entries: dict[str, Any] = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _info(file, entry, 8 + int(length)) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{file} has a damaged header: {error!r}. Copy or download it again.") from error
    expected = max((info.end for info in tensors.values()), default=8 + int(length))
    if expected != size:
        raise CompressError(f"{file} is damaged: {size:,} bytes where its header says {expected:,}. Copy or download it again.")
    return tensors


def _info(file: Path, entry: dict[str, Any], start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] in DTYPES and math.prod(shape) * DTYPES[entry["dtype"]].itemsize != end - begin:
        raise ValueError(f"shape {shape} does not fit {end - begin} bytes")
    return TensorInfo(entry["dtype"], shape, file, start + begin, start + end)
