"""Files of text as people have them: one or several, folders and globs, compressed or not."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError

Source = str | Path | Sequence[str | Path]

PLAIN = (".txt", ".md", ".log")  # one document each
LINES, JSON, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
SUFFIXES = (*PLAIN, *LINES, JSON, PARQUET)
PACKED = (".gz", ".zst")  # after one of the others
MAGIC = b"PAR1"


def kind(path: Path) -> str:
    """The suffix that says how a file is read: in lower case, and without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def listed(source: str | Path) -> list[Path]:
    """The files that a source names: itself, all known ones of a folder, or those of a glob; none for a hub dataset."""
    path = Path(source)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and kind(file) in SUFFIXES)
        if not inside:
            raise CompressError(f"{path} is a folder without text files ({', '.join(SUFFIXES)}, also with .gz or .zst).")
        return inside
    if path.is_file():
        return [path]
    if glob.has_magic(str(source)):
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))  # noqa: PTH207  (absolute patterns, too)
        if not found:
            raise CompressError(f"No file matches {source}.")
        return [file for one in found for file in listed(one)]
    if kind(path) in SUFFIXES:
        raise CompressError(f"There is no file {path}.")
    return []


def named(source: Source) -> str:
    """A source in words."""
    return str(source) if isinstance(source, (str, Path)) else ", ".join(map(str, source))


def check(path: Path) -> None:
    """Raise for a file that is empty, or of a kind that holds no text."""
    if path.stat().st_size == 0:
        raise CompressError(f"{path} is empty.")
    if kind(path) not in SUFFIXES:
        raise CompressError(f"{path} has the suffix {path.suffix or '(none)'}; text comes from {', '.join(SUFFIXES)} files.")


def text(path: Path) -> str:
    """The text of a file in UTF-8, unpacked, without the mark that some programs put first."""
    data = _bytes(path)
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompressError(f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}.") from error
    if "\0" in found:
        raise CompressError(f"{path} is not text: it has a NUL byte at {found.index(chr(0))}.")
    return found


def records(path: Path) -> Iterator[Any]:
    """The records of a file of JSON or Parquet, as they are; a line that is no JSON comes as the error that says so."""
    if kind(path) == PARQUET:
        return _parquet(path)
    whole = text(path)
    return _json(path, whole) if kind(path) == JSON else _json_lines(path, whole)


def _bytes(path: Path) -> bytes:
    packed = path.suffix.lower()
    try:
        data = path.read_bytes()
        if packed == ".gz":
            return gzip.decompress(data)
        return _unpacked_zst(data) if packed == ".zst" else data
    except (OSError, EOFError, zlib.error) as error:
        raise CompressError(f"Cannot read {path}: {error}.") from error


def _unpacked_zst(data: bytes) -> bytes:
    import pyarrow as pa  # datasets brings it along

    with pa.input_stream(pa.BufferReader(data), compression="zstd") as stream:
        unpacked: bytes = stream.read()
    return unpacked


def _json_lines(path: Path, whole: str) -> Iterator[Any]:
    """Lines end in a line feed alone: JSON strings may hold all other separators that Unicode has."""
    for number, line in enumerate(whole.split("\n")):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield CompressError(f"{path}: line {number + 1} is not JSON: {error}.")


def _json(path: Path, whole: str) -> Iterator[Any]:
    """The items of an array, of the one array in an object, or of lines, which some programs write under this name, too."""
    try:
        document = json.loads(whole)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, whole)
            return
        raise CompressError(f"{path} is not JSON: {error}.") from error
    arrays = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    held = [item for array in arrays for item in array[:1]]
    if len(arrays) == 1 and all(isinstance(item, dict) and "role" not in item and "from" not in item for item in held):
        yield from arrays[0]
    elif isinstance(document, list):
        yield from document
    else:
        yield document


def _parquet(path: Path) -> Iterator[Any]:
    from datasets import load_dataset  # a second to import, and most runs need none of it

    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CompressError(f"{path} is not a Parquet file.")
    try:
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise CompressError(f"Cannot read {path}: {error}") from error
