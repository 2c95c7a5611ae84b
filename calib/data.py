"""Calibration and evaluation inputs: windows of text as token ids, or images as pixel values. Nothing is ever padded."""

from __future__ import annotations

import copy
import itertools
import random
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from compress.calib import corpus, rows
from compress.calib.files import Source, named
from compress.errors import CompressError

if TYPE_CHECKING:
    import PIL.Image

SEPARATOR = "\n\n"  # between documents
CHUNK = 1 << 18  # characters that are tokenised at once
CHARACTERS_PER_TOKEN = 4  # a guess, only to size the first chunk
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
PROBE = "a"  # any text: shows which special tokens a tokenizer puts around it


@dataclass(frozen=True)
class Calibration:
    """What the model is run on, stacked along dimension 0, and a sentence for the report that says where it is from.

    `inputs` is `input_ids [samples, seq_len]`, with `attention_mask` only where the source itself was padded,
    or `pixel_values [samples, C, H, W]`.
    """

    inputs: dict[str, Tensor]
    source: str

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))


def text(
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    special_tokens: bool = False,
) -> Calibration:
    """Windows for calibration, from the built-in text (None), a .txt, .jsonl or .parquet file, or a hub dataset "NAME[:config]".

    Documents come in an order drawn from `seed`, are joined by a blank line, tokenised without special tokens as far as
    needed, and cut into consecutive windows. With `special_tokens`, as encoders want, every window is wrapped in the
    tokenizer's own, within `seq_len`; without, it begins with the token that begins texts where the tokenizer adds that by
    itself (BOS). Rows that are `input_ids` already are used as they are, one sample each.
    """
    _check_counts(samples, seq_len)
    tally = rows.Tally()
    if source is None:
        documents: Iterable[rows.Row] = corpus.documents("train", seed=seed)
        label = "built-in text (CPython docs)"
    else:
        documents = rows.shuffled(rows.read(source, 4 * CHARACTERS_PER_TOKEN * seq_len, tally), seed)
        label = named(source)
    described = f"{label}, {samples} x {seq_len} tokens, seed {seed}"
    first, documents = _peek(documents, label, tally)
    if isinstance(first, rows.Tokens):
        made = _tokenised(documents, label, len(tokenizer), samples, seq_len, tally)
        return Calibration(made, described + tally.said)
    before, after = _special_tokens(tokenizer) if special_tokens else (_beginning(tokenizer), [])
    body = seq_len - len(before) - len(after)
    if body < 1:
        raise CompressError(f"seq_len is {seq_len}, but the tokenizer adds {len(before) + len(after)} special tokens. Use more.")
    stream = _stream(documents, tokenizer, samples * (body + 1), tally)
    windows = _windows(stream, samples, body, label, len(before) + len(after), before)
    around = [torch.tensor(ids, dtype=torch.long).expand(samples, -1) for ids in (before, after)]
    return Calibration({"input_ids": torch.cat([around[0], windows, around[1]], 1)}, described + tally.said)


def labelled_text(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, samples: int, seq_len: int, seed: int = 0
) -> Calibration | None:
    """Texts with their classes, `labels [samples]`, for losses that need them; None where the source has no classes.

    Every text is a sample of its own: cut to `seq_len`, padded to the longest, with an `attention_mask`.
    """
    found = rows.labelled(source)
    if found is None:
        return None
    taken = list(itertools.islice(rows.shuffled(found, seed), samples))
    if len(taken) < samples:
        raise CompressError(f"{source} has {len(taken)} rows, but {samples} samples were asked for. Use --samples {len(taken)}.")
    ids = [tokenizer.encode(one, truncation=True, max_length=seq_len) for one, _ in taken]
    longest, pad = max(map(len, ids)), tokenizer.pad_token_id or 0
    padded = torch.tensor([one + [pad] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    inputs = {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([label for _, label in taken])}
    return Calibration(inputs, f"{source}, {samples} texts of at most {longest} tokens with classes, seed {seed}")


def held_out_text(
    source: Source | None, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, samples: int | None = None
) -> Calibration:
    """Consecutive, non-overlapping windows in file order, for evaluation: at most `samples`, or all that there are.

    The text is tokenised in one piece, as the papers do; as in `text`, windows begin with BOS where the tokenizer adds one, which
    is never predicted itself. None is the tenth of the built-in text that calibration never sees.
    """
    _check_counts(1 if samples is None else samples, seq_len)
    tally = rows.Tally()
    documents: Iterable[rows.Row] = corpus.documents("eval") if source is None else rows.read(source, None, tally)
    label = "built-in held-out text (CPython docs)" if source is None else named(source)
    first, documents = _peek(documents, label, tally)
    if isinstance(first, rows.Tokens):
        raise CompressError(f"{label} holds token ids; perplexity needs text, in a column text, content or messages.")
    before = _beginning(tokenizer)
    body = seq_len - len(before)
    ids = _stream(documents, tokenizer, None if samples is None else samples * (body + 1), tally)
    there = max(1, len(_starts(ids, body, before)))
    windows = _windows(ids, there if samples is None else min(samples, there), body, label, len(before), before)
    begun = torch.cat([torch.tensor(before, dtype=torch.long).expand(len(windows), -1), windows], 1)
    return Calibration({"input_ids": begun}, f"{label}, {len(windows)} x {seq_len} tokens")


def images(source: Source | None, model_folder: Path, *, samples: int, seed: int = 0) -> Calibration:
    """Images drawn by `seed`: `pixel_values` of an .npz as they are, or a folder of pictures through the model's processor."""
    if source is None:
        raise CompressError("An image model needs --calib: a folder of pictures, or an .npz file with pixel_values [n, C, H, W].")
    if not isinstance(source, (str, Path)):
        raise CompressError(f"An image model takes one --calib, not {len(source)}: a folder of pictures, or an .npz file.")
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        pixels = _processed([files[i] for i in _drawn(len(files), samples, seed, path)], model_folder)
    elif path.suffix == ".npz":
        stored = _read_npz(path)
        pixels = stored[_drawn(len(stored), samples, seed, path)]
    else:
        problem = "has an unknown suffix" if path.exists() else "does not exist"
        raise CompressError(f"{path} {problem}; an image model needs a folder of pictures, or an .npz file with pixel_values.")
    if not pixels.isfinite().all():
        raise CompressError(f"{path} gives pixel values that are NaN or infinite.")
    return Calibration({"pixel_values": pixels}, f"{path}, {samples} images, seed {seed}")


def _check_counts(samples: int, seq_len: int) -> None:
    if samples < 1 or seq_len < 2:
        raise CompressError(f"--samples is {samples} and --seq-len is {seq_len}; use at least 1 sample of at least 2 tokens.")


def _peek(documents: Iterable[rows.Row], label: str, tally: rows.Tally) -> tuple[rows.Row, Iterator[rows.Row]]:
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        tally.check()
        raise CompressError(f"{label} is empty.")
    return first, itertools.chain([first], documents)


def _stream(documents: Iterable[rows.Row], tokenizer: PreTrainedTokenizerBase, limit: int | None, tally: rows.Tally) -> list[int]:
    """The joined documents as token ids: at least `limit` of them where there are so many; all, in one piece, for None."""
    tokenizer = copy.deepcopy(tokenizer)  # encoding resets a saved tokenizer's own truncation and padding
    ids: list[int] = []
    for chunk in _chunks(rows.render(documents, tokenizer, tally), limit):
        ids += tokenizer.encode(chunk, add_special_tokens=False, verbose=False)
        if limit is not None and len(ids) >= limit:
            break
    tally.check()
    return ids


def _chunks(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    if limit is None:
        yield SEPARATOR.join(documents)
        return
    held: list[str] = []
    characters, wanted = 0, min(CHUNK, limit * CHARACTERS_PER_TOKEN)
    for document in documents:
        held.append(document)
        characters += len(document)
        if characters >= wanted:
            yield SEPARATOR.join(held) + SEPARATOR
            held, characters = [], 0
    yield SEPARATOR.join(held)


def _windows(
    ids: list[int], samples: int, length: int, label: str, special: int = 0, before: Sequence[int] = ()
) -> Int64[Tensor, "samples length"]:
    """The first `samples` windows of `length` tokens, which `special` tokens are put around, those in `before` first."""
    starts = _starts(ids, length, before)
    if len(starts) < samples:
        fits = [f"--samples {len(starts)}"] if starts else []
        if len(ids) // samples >= 2:
            fits.append(f"--seq-len {len(ids) // samples + special}")
        remedy = " or ".join([*fits, "a longer text"])
        raise CompressError(
            f"{label} has {len(ids):,} tokens, but {samples} x {length + special} need {samples * length:,}. Use {remedy}."
        )
    return torch.tensor([ids[start : start + length] for start in starts[:samples]])


def _starts(ids: Sequence[int], length: int, before: Sequence[int]) -> list[int]:
    """Where windows start, one after the other; past a token that would stand twice as it is put before each window, too."""
    starts, at = [], 0
    while at + length <= len(ids):
        at += list(ids[at : at + 1]) == list(before)
        if at + length <= len(ids):
            starts.append(at)
        at += length
    return starts


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before texts by itself, BOS; [] where it puts none.

    Models that were trained with it need it: without, the perplexity of gemma-2b on WikiText-2 is 650 instead of 21.
    """
    tokenizer, begin = copy.deepcopy(tokenizer), [tokenizer.bos_token_id]
    plain, whole = (tokenizer.encode(PROBE, add_special_tokens=special) for special in (False, True))
    return begin if whole[:1] == begin != plain[:1] else []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    tokenizer = copy.deepcopy(tokenizer)
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    whole = tokenizer.encode(PROBE, add_special_tokens=True)
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    raise CompressError("The tokenizer changes a text's tokens when it adds special tokens; give calibration data as input_ids.")


def _tokenised(
    documents: Iterable[rows.Row], label: str, vocabulary: int, samples: int, seq_len: int, tally: rows.Tally
) -> dict[str, Tensor]:
    """Rows of token ids, cut to `seq_len`; shorter ones, and those with ids that the tokenizer does not have, are left out."""
    taken: list[rows.Tokens] = []
    for row in documents:
        if len(taken) == samples:
            break
        if not isinstance(row, rows.Tokens):
            tally.skip(f"{label}: a row is text, earlier rows are token ids; use one of them.")
        elif not all(0 <= i < vocabulary for i in row.ids):
            tally.skip(f"{label}: row {row.number} has token ids outside the tokenizer's 0 .. {vocabulary - 1}.")
        elif len(row.ids) < seq_len:
            tally.skip(
                f"{label}: row {row.number} has {len(row.ids)} tokens, fewer than seq_len {seq_len}. "
                f"Use --seq-len {len(row.ids)}, or drop the row."
            )
        else:
            taken.append(row)
    tally.check()
    if len(taken) < samples:
        raise CompressError(f"{label} has {len(taken)} rows, but {samples} samples were asked for. Use --samples {len(taken)}.")
    inputs = {"input_ids": torch.tensor([row.ids[:seq_len] for row in taken])}
    mask = torch.tensor([row.mask[:seq_len] if row.mask else [1] * seq_len for row in taken])
    return inputs if mask.all() else {**inputs, "attention_mask": mask}


def _drawn(available: int, samples: int, seed: int, path: Path) -> list[int]:
    if available < samples:
        fits = f"Use --samples {available}." if available else "Pictures are .png, .jpg, .jpeg, .webp or .bmp files."
        raise CompressError(f"{path} has {available} images, but {samples} were asked for. {fits}")
    return sorted(random.Random(seed).sample(range(available), samples))


def _read_npz(path: Path) -> Float[Tensor, "n C H W"]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise CompressError(f"Cannot read {path}: it is not an .npz archive.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if "pixel_values" not in archive.files:
                raise CompressError(f"{path} has no array pixel_values; it has {', '.join(archive.files) or 'none'}.")
            stored = archive["pixel_values"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CompressError(f"Cannot read {path}: {error}.") from error
    if stored.ndim != 4 or stored.dtype.kind != "f":
        raise CompressError(f"{path}: pixel_values is {stored.dtype} {list(stored.shape)}; expected floats [n, C, H, W].")
    return torch.from_numpy(stored.astype(np.float32))


def _processed(files: list[Path], model_folder: Path) -> Float[Tensor, "n C H W"]:
    try:  # the PIL backend: the other one needs torchvision
        processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CompressError(f"{model_folder} has no image processor that transformers can load: {error}") from error
    pixels: Tensor = processor(images=[_picture(file) for file in files], return_tensors="pt")["pixel_values"]
    return pixels


def _picture(file: Path) -> PIL.Image.Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CompressError("Reading pictures needs Pillow: pip install pillow. An .npz with pixel_values does not.") from error
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CompressError(f"{file} is not a picture that Pillow can read: {error}.") from error
