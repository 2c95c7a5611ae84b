"""Documents from files and hub datasets, one row at a time, so that no more is read than is used."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from compress.calib import files
from compress.calib.files import Source
from compress.calib.schemas import COLUMNS, CONVERSATIONS, TEXTS, conversation, pair, tools
from compress.errors import CompressError

T = TypeVar("T")

LABELS = ("label", "labels")
POOL = 10_000  # rows that are shuffled: bounds what a seeded order must read
MOST_BAD = 0.05  # of the rows: more say that the file is not what it is taken for


@dataclass
class Tally:
    """How many rows were read, how many of them are of no use, and what is wrong with the first of those."""

    rows: int = 0
    bad: int = 0
    first: str = ""

    def skip(self, why: str) -> None:
        """Count a row that is of no use."""
        self.bad += 1
        self.first = self.first or why

    def check(self) -> None:
        """Raise where too many rows are of no use."""
        if self.bad > MOST_BAD * self.rows:
            more = f" {self.bad} of {self.rows} rows are of no use." if self.rows > 1 else ""
            raise CompressError(f"{self.first}{more}")

    @property
    def said(self) -> str:
        """What the report says of rows that were left out."""
        return f", without {self.bad} of {self.rows} rows that are of no use ({self.first.rstrip('.')})" if self.bad else ""


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
    tools: list[Any] | None = None
    pair: bool = False  # of a question and an answer, which are text without a template, too


Row = str | Tokens | Chat


def read(source: Source, piece: int | None = None, tally: Tally | None = None) -> Iterator[Row]:
    """The rows of files, folders, globs or hub datasets, in order; rows of no use are left out and counted in `tally`.

    A file of plain text is one row, or, with `piece`, cut at line ends into rows of at least so many characters. Raises
    CompressError for a source that cannot be read.
    """
    tally = tally or Tally()
    for one in [source] if isinstance(source, (str, Path)) else source:
        paths = files.listed(one)
        for path in paths:
            files.check(path)
            if files.kind(path) in files.PLAIN:
                for row in _pieces(files.text(path), piece):
                    tally.rows += 1
                    yield row
            else:
                yield from _rows(files.records(path), str(path), tally)
        if not paths:
            yield from _rows(_hub(str(one)), str(one), tally)


def labelled(source: Source) -> Iterator[tuple[str, int]] | None:
    """The texts of files or hub datasets that classes are given for, each with its class; None where there is no such column."""
    records = _records(source)
    first = next(records, None)
    if not isinstance(first, dict) or not (column := next((name for name in LABELS if name in first), "")):
        return None
    label = files.named(source)
    return (_with_class(record, column, n, label) for n, record in enumerate(itertools.chain([first], records)))


def _records(source: Source) -> Iterator[Any]:
    """The records of all files that are not plain text."""
    for one in [source] if isinstance(source, (str, Path)) else source:
        paths = files.listed(one)
        for path in paths:
            files.check(path)
            if files.kind(path) not in files.PLAIN:
                yield from files.records(path)
        if not paths:
            yield from _hub(str(one))


def _with_class(record: Any, column: str, number: int, label: str) -> tuple[str, int]:
    if isinstance(record, CompressError):
        raise record
    text = next((record[name] for name in TEXTS if isinstance(record.get(name), str)), None)
    if text is None or type(record.get(column)) is not int:
        raise CompressError(f"{label}: row {number} needs a text in column text or content, and a whole number in {column}.")
    return text, record[column]


def shuffled(rows: Iterator[T], seed: int) -> Iterator[T]:
    """The first rows, up to POOL, in an order drawn from `seed`, then the rest as they come."""
    pool = list(itertools.islice(rows, POOL))
    random.Random(seed).shuffle(pool)
    yield from pool
    yield from rows


def render(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, tally: Tally | None = None) -> Iterator[str]:
    """Rows as text: conversations through the tokenizer's chat template; those that it refuses are counted in `tally`."""
    tally = tally or Tally()
    for row in rows:
        if isinstance(row, Tokens):
            raise CompressError(f"Row {row.number} is token ids, earlier rows are text; use one of them.")
        if not isinstance(row, Chat):
            yield row
        elif tokenizer.chat_template is not None:
            try:
                yield str(tokenizer.apply_chat_template(row.messages, tools=row.tools, tokenize=False))
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                tally.skip(f"Row {row.number}: the chat template cannot render its messages: {error}")
        elif row.pair:
            yield "\n\n".join(str(message["content"]) for message in row.messages)
        else:
            raise CompressError("The text is chat messages, but the tokenizer has no chat template. Give plain text.")


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


def _rows(records: Iterator[Any], label: str, tally: Tally) -> Iterator[Row]:
    column = ""
    for number, record in enumerate(records):
        tally.rows += 1
        if isinstance(record, dict) and not column:
            column = next((name for name in COLUMNS if name in record), "")
            if not column:
                raise CompressError(f"{label} has the columns {', '.join(record)}; expected one of {', '.join(COLUMNS)}.")
        row = _row(record, column, number, label)
        if isinstance(row, CompressError):
            tally.skip(str(row))
        elif row != "":
            yield row


def _row(record: Any, column: str, number: int, label: str) -> Row | CompressError:
    """A record as a row, or what is wrong with it."""
    if isinstance(record, (CompressError, str)):
        return record
    if not isinstance(record, dict):
        return CompressError(f"{label}: row {number} is not an object with named columns.")
    value = record.get(column)
    if column == "input_ids" and isinstance(value, list) and all(type(i) is int for i in value):
        mask = record.get("attention_mask") or []
        if mask and len(mask) != len(value):
            return CompressError(f"{label}: row {number} has {len(value)} input_ids but an attention_mask of {len(mask)}.")
        return Tokens(number, value, mask)
    if column in TEXTS and isinstance(value, str):
        return value.strip()
    if column in CONVERSATIONS and isinstance(value, list) and (messages := conversation(value)):
        return Chat(number, messages, tools(record))
    if column not in (*TEXTS, *CONVERSATIONS, "input_ids") and (messages := pair(record, column)):
        return Chat(number, messages, tools(record), pair=True)
    return CompressError(f"{label}: row {number} has {type(value).__name__} in column {column}, which is not usable.")
