"""Documents from files and hub datasets, one row at a time, so that no more is read than is used."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from compress.errors import CompressError

T = TypeVar("T")

COLUMNS = ("input_ids", "text", "content", "messages")  # in order of preference
LABELS = ("label", "labels")
SUFFIXES = (".txt", ".jsonl", ".parquet")
MAGIC = b"PAR1"
POOL = 10_000  # rows that are shuffled: bounds what a seeded order must read


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenised already, with its attention mask where the source has one."""

    number: int
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Chat:
    """A row that is a conversation."""

    number: int
    messages: list[dict[str, Any]]


Row = str | Tokens | Chat


def read(source: str | Path, piece: int | None = None) -> Iterator[Row]:
    """The rows of a file or a hub dataset, in order; errors name the source, the row and the columns.

    A .txt file is one row, or, with `piece`, cut at line ends into rows of at least so many characters.
    """
    path = Path(source)
    if path.suffix == ".txt" and path.is_file() and path.stat().st_size:
        return _pieces(_read_text(path), piece)
    return _rows(_records(path, str(source)), str(source))


def labelled(source: str | Path) -> Iterator[tuple[str, int]] | None:
    """The texts of a file or hub dataset that classes are given for, each with its class; None where there is no such column."""
    path = Path(source)
    if path.suffix == ".txt":
        return None
    records = _records(path, str(source))
    first = next(records, None)
    if not isinstance(first, dict) or not (column := next((name for name in LABELS if name in first), "")):
        return None
    return (_with_class(record, column, n, str(source)) for n, record in enumerate(itertools.chain([first], records)))


def _with_class(record: Any, column: str, number: int, label: str) -> tuple[str, int]:
    text = next((record[name] for name in ("text", "content") if isinstance(record.get(name), str)), None)
    if text is None or type(record.get(column)) is not int:
        raise CompressError(f"{label}: row {number} needs a text in column text or content, and a whole number in {column}.")
    return text, record[column]


def _records(path: Path, source: str) -> Iterator[Any]:
    if path.is_dir():
        raise CompressError(f"{path} is a folder; text comes from a {', '.join(SUFFIXES)} file or a hub dataset.")
    if path.is_file() and path.stat().st_size == 0:
        raise CompressError(f"{path} is empty.")
    if path.suffix in SUFFIXES and not path.is_file():
        raise CompressError(f"There is no file {path}.")
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.is_file():
        raise CompressError(f"{path} has the suffix {path.suffix or '(none)'}; text comes from {', '.join(SUFFIXES)} files.")
    return _hub(source)


def shuffled(rows: Iterator[T], seed: int) -> Iterator[T]:
    """The first rows, up to POOL, in an order drawn from `seed`, then the rest as they come."""
    pool = list(itertools.islice(rows, POOL))
    random.Random(seed).shuffle(pool)
    yield from pool
    yield from rows


def render(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Rows as text: conversations through the tokenizer's chat template."""
    for row in rows:
        if isinstance(row, Tokens):
            raise CompressError(f"Row {row.number} is token ids, earlier rows are text; use one of them.")
        if isinstance(row, Chat):
            if tokenizer.chat_template is None:
                raise CompressError("The text is chat messages, but the tokenizer has no chat template. Give plain text.")
            try:
                yield str(tokenizer.apply_chat_template(row.messages, tokenize=False))
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                raise CompressError(f"Row {row.number}: the chat template cannot render its messages: {error}") from error
        else:
            yield row


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompressError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}.") from error
    except OSError as error:
        raise CompressError(f"Cannot read {path}: {error}.") from error
    if "\0" in text:
        raise CompressError(f"{path} is not text: it has a NUL byte at {text.index(chr(0))}.")
    return text


def _pieces(text: str, size: int | None) -> Iterator[str]:
    held: list[str] = []
    characters = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        characters += len(line)
        if size is not None and characters >= size:
            yield "".join(held)
            held, characters = [], 0
    if rest := "".join(held).strip():
        yield rest


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read_text(path).splitlines()):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise CompressError(f"{path}: line {number + 1} is not JSON: {error}.") from error


def _parquet(path: Path) -> Iterator[Any]:
    from datasets import load_dataset  # a second to import, and most runs need none of it

    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CompressError(f"{path} is not a Parquet file.")
    try:
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise CompressError(f"Cannot read {path}: {error}") from error


def _hub(source: str) -> Iterator[Any]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        yield from load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError) as error:  # network, offline mode, unknown names and wrong configs are all of these
        raise CompressError(
            f"There is no file {source}, and no hub dataset of that name could be read ({type(error).__name__}: {error}). "
            "Check the spelling and the network, or give a .txt, .jsonl or .parquet file."
        ) from error


def _rows(records: Iterator[Any], label: str) -> Iterator[Row]:
    column = ""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise CompressError(f"{label}: row {number} is not an object with named columns.")
        column = column or next((name for name in COLUMNS if name in record), "")
        if not column:
            raise CompressError(f"{label} has the columns {', '.join(record)}; expected one of {', '.join(COLUMNS)}.")
        row = _row(record.get(column), record, column, number, label)
        if row != "":
            yield row


def _row(value: Any, record: dict[str, Any], column: str, number: int, label: str) -> Row:
    if column == "input_ids" and isinstance(value, list) and all(type(i) is int for i in value):
        mask = record.get("attention_mask") or []
        if mask and len(mask) != len(value):
            raise CompressError(f"{label}: row {number} has {len(value)} input_ids but an attention_mask of {len(mask)}.")
        return Tokens(number, value, mask)
    if column == "messages" and isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return Chat(number, value)
    if column in ("text", "content") and isinstance(value, str):
        return value.strip()
    raise CompressError(f"{label}: row {number} has {type(value).__name__} in column {column}, which is not usable.")
