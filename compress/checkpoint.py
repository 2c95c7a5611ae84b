"""Checkpoints on disk: what a folder holds, whether it is whole, and writing a compressed one that is complete or absent."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress import exchange, folders, side_files
from compress.errors import CompressError
from compress.spec import Plan

REPORT, PLAN = "compress_report.json", "compress_plan.json"
STEM = "model"  # of the weight files that transformers looks for
INDEX = "{}.safetensors.index.json"
BLOCKS, LOCK = "blocks", "lock"  # in the folder where a run works
CHUNK = 1 << 24
SHARD_BYTES = 5_000_000_000
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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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


def is_pruned(folder: Path) -> bool:
    """Whether the folder has a plan, and that asks for zeros."""
    return (folder / PLAN).is_file() and any(spec.sparsity for spec in Plan.load(folder / PLAN).layers.values())


def size_of(file: Path) -> int:
    return file.stat().st_size


def checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: model.safetensors, or else those of an index; or whatever safetensors there are."""
    listing, single = folder / INDEX.format(STEM), folder / f"{STEM}.safetensors"
    if single.is_file():
        return [single]
    listings = [listing] if listing.is_file() else sorted(folder.glob(INDEX.format("*")))
    return _listed(listings[0]) if listings else sorted(folder.glob("*.safetensors"))


def _listed(listing: Path) -> list[Path]:
    folder = listing.parent
    try:
        names = sorted(set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CompressError(f"{listing} is damaged: {error!r}.") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CompressError(
            f"{folder} lacks {missing[0]}, which {listing.name} lists; {len(missing)} of {len(names)} files are missing."
        )
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, TensorInfo]:
    size = size_of(file)
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


def layout_bytes(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def to_json(document: object) -> str:
    return json.dumps(document, indent=2) + "\n"


class Writer:
    """Writes a compressed copy of a model folder: one file per solved block as work goes on, then the finished folder at once.

    Used as a context manager, by one process at a time: until `seal` returns, OUT does not exist (or is the old one); on any
    exception, a Ctrl-C included, what was written is removed. A symbolic link OUT stays: the folder that it names is written.
    """

    def __init__(self, source: Path, out: Path, overwrite: bool = False) -> None:
        self.source, self.out, self.overwrite = source, out.resolve() if out.is_symlink() else out, overwrite
        self.partial = self.out.parent / f".{self.out.name}.partial"
        folders.check_target(source, self.out, overwrite)

    @property
    def finished(self) -> Path:
        """The finished folder before it is moved to OUT."""
        return self.partial / "finished"

    @property
    def blocks(self) -> list[Path]:
        """The files of the blocks that are written, in order."""
        return sorted((self.partial / BLOCKS).glob("*.safetensors"))

    def __enter__(self) -> Writer:
        with disk_errors(self.out):
            self._lock()
            self.keep([])
        return self

    def _lock(self) -> None:
        """Become the one process that writes OUT, and put it back where another ended while it was being replaced."""
        self.lock = locked(self.partial, self.out)
        try:
            if exchange.restored(self.out):
                folders.check_target(self.source, self.out, self.overwrite)
        except BaseException:
            self.lock.close()
            raise

    def __exit__(self, _kind: object, _error: object, _traceback: object, /) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.lock.close()

    def keep(self, stay: Collection[Path]) -> None:
        """Remove what an earlier run left, but for its files that are to stay."""
        for path in {*self.partial.iterdir()} - {self.partial / LOCK, self.partial / BLOCKS, *stay}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.partial / BLOCKS).mkdir(exist_ok=True)
        for path in {*(self.partial / BLOCKS).iterdir()} - {*stay}:
            path.unlink()

    def check_space(self, nbytes: int, beside: int = 0) -> None:
        """Raise unless the disk holds the finished folder of `nbytes` and, until it is finished, its blocks once more.

        Those may be there already. `beside` is what their files have besides.
        """
        free, needed = shutil.disk_usage(self.partial).free, 2 * nbytes + beside - sum(map(size_of, self.blocks))
        if free < needed:
            raise CompressError(
                f"{self.out} needs {needed / 1e9:.2f} GB while it is written and {nbytes / 1e9:.2f} GB in the end; the disk "
                f"has {free / 1e9:.2f} GB free. Free some space or choose another -o."
            )

    def block(self, number: int, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """Write the tensors of one solved block, and texts about it, complete or not at all."""
        with disk_errors(self.out):
            temporary = self.partial / BLOCKS / "unfinished"
            save_file(dict(tensors), temporary, dict(about) if about else None)
            _sync(temporary)
            temporary.rename(temporary.with_name(block_name(number, temporary)))

    def finish(
        self,
        replaced: Mapping[str, Sequence[str]],
        config: Mapping[str, object],
        extra: Mapping[str, str],
        stem: str = STEM,
    ) -> dict[str, FileInfo]:
        """Put the folder together, all but its report; the weight files with their sizes and CRC-32s.

        `replaced` maps a tensor of the source to the names of those that stand for it, `config` is the new config.json and
        `extra` are further text files by name. `stem` begins the weight files' names.
        """
        with disk_errors(self.out):
            blocks = [_header(file) for file in self.blocks]
            solved = {name: info for block in blocks for name, info in block.items()}
            tensors: dict[str, TensorInfo] = {}
            for name, info in index(self.source).items():
                tensors.update({new: solved[new] for new in replaced[name]} if name in replaced else {name: info})
            self.finished.mkdir()
            side_files.copy(self.source, self.finished, ("config.json", REPORT))
            files = write_shards(self.finished, tensors, stem)
            for name, text in {"config.json": to_json(config), **extra}.items():
                (self.finished / name).write_text(text, encoding="utf-8")
            return files

    def seal(self, report: str) -> None:
        """Add the report and move the finished folder to OUT."""
        with disk_errors(self.out):
            (self.finished / REPORT).write_text(report, encoding="utf-8")
            for file in self.finished.rglob("*"):
                _sync(file)
            exchange.replace(self.finished, self.out)
            _sync(self.out.parent)


@dataclass(frozen=True)
class FileInfo:
    """A written weight file."""

    nbytes: int
    crc32: int


def write_shards(
    folder: Path, tensors: Mapping[str, TensorInfo], stem: str = STEM, limit: int = SHARD_BYTES
) -> dict[str, FileInfo]:
    """Write tensors, copied from wherever they are, as one file or as shards of at most `limit` bytes with an index."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > limit:
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        return {f"{stem}.safetensors": _concatenate(folder / f"{stem}.safetensors", shards[0])}
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX.format(stem)).write_text(to_json(document), encoding="utf-8")
    return {file: _concatenate(folder / file, shard) for file, shard in zip(names, shards, strict=True)}


def _concatenate(path: Path, tensors: Mapping[str, TensorInfo]) -> FileInfo:
    """A safetensors file made of bytes of others, copied in pieces: its memory does not depend on its size."""
    head = header(tensors)
    crc = 0
    with path.open("wb") as out:
        for piece in _pieces(head, tensors.values()):
            crc = zlib.crc32(piece, crc)
            out.write(piece)
    return FileInfo(len(head) + sum(info.nbytes for info in tensors.values()), crc)


def header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """What a safetensors file with these tensors, one after the other, begins with."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.nbytes]}
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8 bytes, for readers that map it
    return struct.pack("<Q", len(text)) + text


def _pieces(head: bytes, tensors: Iterable[TensorInfo]) -> Iterator[bytes]:
    yield head
    for info in tensors:
        with info.file.open("rb") as stream:
            stream.seek(info.begin)
            left = info.nbytes
            while left:
                piece = stream.read(min(CHUNK, left))
                if not piece:
                    raise CompressError(f"{info.file} was cut short while it was read.")
                left -= len(piece)
                yield piece


def block_name(number: int, file: Path) -> str:
    """What the file of a block is called: its name tells whether it is whole."""
    return f"{number:05d}-{checksum(file):08x}.safetensors"


def locked(partial: Path, out: Path) -> IO[str]:
    """A file in the folder `partial`, which only one process at a time can have, until it closes it or ends."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run that had it removed the folder just now
            lock = (partial / LOCK).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise CompressError(f"Another run is writing {out}. Wait until it ends, or choose another -o.") from error
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Raise what goes wrong on the disk as something to act on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CompressError(f"Cannot write {out}: {error}. Free some space or choose another -o.") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
