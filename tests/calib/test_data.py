from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compress.calib import corpus, data, rows
from compress.errors import CompressError

CLS, SEP, PAD = 256, 257, 258
SENTENCES = [f"Sentence number {i} of the test text, all different." for i in range(60)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with an encoder's special tokens and, as some are saved, truncation and padding switched on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "[CLS]", "[SEP]", "[PAD]"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    backend.enable_truncation(8)
    backend.enable_padding(length=8, pad_id=PAD, pad_token="[PAD]")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", model_max_length=8
    )


@pytest.fixture(name="tokenizer")
def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def ids(calibration: data.Calibration) -> torch.Tensor:
    assert calibration.inputs.keys() == {"input_ids"}
    return calibration.inputs["input_ids"]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(name="built_in")
def _built_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-in documents; the list collects those that were asked for."""
    asked: list[str] = []

    def documents(split: str, *, seed: int = 0) -> Iterator[str]:
        for i in range(1000):
            asked.append(f"{split} {seed} document {i}: " + "some words " * 20)
            yield asked[-1]

    monkeypatch.setattr(corpus, "documents", documents)
    return asked


def test_windows_are_consecutive_pieces_of_the_joined_documents(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence} for sentence in SENTENCES])
    windows = ids(data.text(file, tokenizer, samples=5, seq_len=70))
    assert windows.shape == (5, 70)
    assert windows.dtype == torch.long
    read = tokenizer.decode(windows.flatten())
    documents = read.split("\n\n")
    assert set(documents[:-1]) <= set(SENTENCES)
    assert documents[:-1] != SENTENCES[: len(documents) - 1]  # shuffled


def test_the_seed_decides_the_windows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence} for sentence in SENTENCES])
    first, again, other = (ids(data.text(file, tokenizer, samples=3, seq_len=50, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_long_text_file_is_sampled_all_over_and_stays_in_one_piece_within_a_window(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [f"line {i:05d}\n" for i in range(20_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    read = tokenizer.decode(ids(data.text(tmp_path / "a.txt", tokenizer, samples=160, seq_len=110)).flatten())
    numbers = [int(line.split()[1]) for line in read.split("\n")[1:-1] if line]
    assert max(numbers) > 15_000
    assert min(numbers) < 5_000
    follows = sum(b == a + 1 for a, b in itertools.pairwise(numbers))
    assert follows > 0.9 * len(numbers)


def test_only_as_much_is_read_as_is_used(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    windows = ids(data.text(None, tokenizer, samples=4, seq_len=64, seed=5))
    assert tokenizer.decode(windows.flatten()).startswith("train 5 document 0: some words")
    assert len(built_in) < 10


def test_an_encoder_gets_its_special_tokens_in_every_window(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    plain = ids(data.text(None, tokenizer, samples=6, seq_len=30))
    wrapped = ids(data.text(None, tokenizer, samples=6, seq_len=32, special_tokens=True))
    assert wrapped.shape == (6, 32)
    assert (wrapped[:, 0] == CLS).all()
    assert (wrapped[:, -1] == SEP).all()
    assert torch.equal(wrapped[:, 1:-1], plain)
    assert built_in


def test_a_saved_tokenizer_is_not_changed_and_not_obeyed(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    assert '"truncation":{' in before.replace(" ", "")
    windows = ids(data.text(None, tokenizer, samples=2, seq_len=100, special_tokens=True))
    data.held_out_text(None, tokenizer, seq_len=100, samples=2)
    assert not (windows == PAD).any()
    assert tokenizer.backend_tokenizer.to_str() == before
    assert built_in


def test_no_warning_about_long_sequences(
    tokenizer: PreTrainedTokenizerFast,
    built_in: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(caplog.handler)
    try:
        data.text(None, tokenizer, samples=2, seq_len=100)
        assert caplog.text == ""
        tokenizer.encode("longer than eight tokens", add_special_tokens=False)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    assert built_in


def test_a_tokenizer_written_in_python(built_in: list[str]) -> None:
    windows = ids(data.text(None, ByT5Tokenizer(), samples=2, seq_len=40, special_tokens=True))
    assert windows.shape == (2, 40)
    assert (windows[:, -1] == 1).all()  # its </s>
    assert built_in


def test_built_in_text_is_named_in_the_report(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    assert data.text(None, tokenizer, samples=2, seq_len=16).source == "built-in text (CPython docs), 2 x 16 tokens, seed 0"
    assert built_in


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "hello there", "n": 1}, "hello there"),
        ({"content": "hello there"}, "hello there"),
        ({"content": "no", "text": "hello there"}, "hello there"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}, "<user>hi<bot>yo"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, record: dict[str, Any], expected: str, suffix: str) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write_jsonl(file, [record])
    else:
        write_parquet(file, [record])
    windows = ids(data.text(file, tokenizer, samples=1, seq_len=len(expected)))
    assert tokenizer.decode(windows[0]) == expected


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tokenised_rows_are_used_as_they_are(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    records = [{"input_ids": list(range(i, i + 20 + i))} for i in range(10)]
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write_jsonl(file, records)
    else:
        write_parquet(file, records)
    windows = ids(data.text(file, tokenizer, samples=10, seq_len=20, special_tokens=True))
    assert sorted(windows[:, 0].tolist()) == list(range(10))
    assert torch.equal(windows - windows[:, :1], torch.arange(20).expand(10, -1))


def test_padding_in_tokenised_rows_stays_masked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = [
        {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, PAD, PAD, PAD], "attention_mask": [1, 0, 0, 0]},
    ]
    inputs = data.text(write_jsonl(tmp_path / "a.jsonl", records), tokenizer, samples=2, seq_len=4).inputs
    row = int((inputs["input_ids"][:, 0] == 5).nonzero())
    assert inputs["attention_mask"][row].tolist() == [1, 0, 0, 0]
    assert inputs["attention_mask"][1 - row].tolist() == [1, 1, 1, 1]
    assert data.text(tmp_path / "a.jsonl", tokenizer, samples=2, seq_len=2).inputs.keys() == inputs.keys()


def test_a_short_tokenised_row_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 16}, {"input_ids": [1] * 11}])
    with pytest.raises(CompressError, match=r"row 1 has 11 tokens, fewer than seq_len 16\. Use --seq-len 11"):
        data.text(file, tokenizer, samples=2, seq_len=16)


def test_token_ids_outside_the_vocabulary(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 300]}])
    with pytest.raises(CompressError, match=r"row 0 has token ids outside the tokenizer's 0 \.\. 258"):
        data.text(file, tokenizer, samples=1, seq_len=3)


def test_too_few_tokenised_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}] * 4)
    with pytest.raises(CompressError, match=r"has 4 rows, but 5 samples were asked for\. Use --samples 4"):
        data.text(file, tokenizer, samples=5, seq_len=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n ", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8 text: byte 0xff at 3"),
        ("a.txt", b"abc\0def", "not text: it has a NUL byte at 3"),
        ("a.jsonl", b"\x89PNG\r\n", "not UTF-8 text: byte 0x89 at 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "row 0 is not an object with named columns"),
        (
            "a.jsonl",
            b'{"body": "a", "title": "b"}\n',
            "has the columns body, title; expected one of input_ids, text, content, messages",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 1 has int in column text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 1 has NoneType in column text"),
        ("a.jsonl", b'{"input_ids": [1, 2], "attention_mask": [1]}\n', "2 input_ids but an attention_mask of 1"),
        ("a.jsonl", b'{"input_ids": "1 2"}\n', "row 0 has str in column input_ids"),
        ("a.parquet", b"PAR1 and no more", "Cannot read"),
        ("a.parquet", b"not parquet at all", "is not a Parquet file"),
        ("a.csv", b"text\nhello\n", r"suffix \.csv; text comes from \.txt, .*\.jsonl, .*\.parquet files"),
        ("noname", b"hello", r"suffix \(none\)"),
    ],
)
def test_bad_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressError, match=message):
        data.text(tmp_path / name, tokenizer, samples=1, seq_len=2)


def test_sources_that_are_not_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"There is no file .*a\.txt"):
        data.text(tmp_path / "a.txt", tokenizer, samples=1, seq_len=2)
    with pytest.raises(CompressError, match="is a folder"):
        data.text(tmp_path, tokenizer, samples=1, seq_len=2)
    with pytest.raises(
        CompressError, match=r"no file someone/corpus:part, and no hub dataset .*Check the spelling and the network"
    ):
        data.text("someone/corpus:part", tokenizer, samples=1, seq_len=2)


def test_chat_without_a_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(CompressError, match="no chat template"):
        data.text(file, tokenizer, samples=1, seq_len=2)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CompressError, match=r"Row 0: the chat template .* roles must alternate"):
        data.text(file, tokenizer, samples=1, seq_len=2)


@pytest.mark.parametrize(
    ("samples", "seq_len", "special", "remedy"),
    [
        (4, 40, False, r"has 100 tokens, but 4 x 40 need 160\. Use --samples 2 or --seq-len 25 or a longer text"),
        (4, 40, True, r"has 100 tokens, but 4 x 40 need 152\. Use --samples 2 or --seq-len 27 or a longer text"),
        (1, 200, False, r"Use --seq-len 100 or a longer text"),
        (80, 50, False, r"Use --samples 2 or a longer text"),
    ],
)
def test_too_few_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, samples: int, seq_len: int, special: bool, remedy: str
) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(CompressError, match=remedy):
        data.text(tmp_path / "a.txt", tokenizer, samples=samples, seq_len=seq_len, special_tokens=special)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 8), (-1, 8), (4, 1), (4, 0)])
def test_counts_out_of_range(tokenizer: PreTrainedTokenizerFast, samples: int, seq_len: int) -> None:
    with pytest.raises(CompressError, match=f"--samples is {samples} and --seq-len is {seq_len}"):
        data.text(None, tokenizer, samples=samples, seq_len=seq_len)
    with pytest.raises(CompressError, match=f"--samples is {samples} and --seq-len is {seq_len}"):
        data.held_out_text(None, tokenizer, samples=samples, seq_len=seq_len)


def test_windows_too_short_for_the_special_tokens(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    with pytest.raises(CompressError, match="seq_len is 2, but the tokenizer adds 2 special tokens"):
        data.text(None, tokenizer, samples=1, seq_len=2, special_tokens=True)
    assert built_in


def test_held_out_windows_are_the_text_in_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i:04d}" for i in range(100)))
    calibration = data.held_out_text(tmp_path / "a.txt", tokenizer, seq_len=64)
    windows = ids(calibration)
    assert windows.shape == (6, 64)  # 400 tokens: a window that is not full is left out
    assert tokenizer.decode(windows.flatten()) == (tmp_path / "a.txt").read_text()[:384]
    assert calibration.source.endswith("a.txt, 6 x 64 tokens")


@pytest.mark.parametrize(("asked", "given"), [(2, 2), (6, 6), (50, 6)])
def test_held_out_samples_are_a_maximum(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, asked: int, given: int) -> None:
    (tmp_path / "a.txt").write_text("x" * 400)
    assert data.held_out_text(tmp_path / "a.txt", tokenizer, seq_len=64, samples=asked).samples == given


def test_held_out_rows_are_joined_by_a_blank_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert tokenizer.decode(ids(data.held_out_text(file, tokenizer, seq_len=8))[0]) == "one\n\ntwo"


def test_held_out_built_in_text_is_the_evaluation_split(tokenizer: PreTrainedTokenizerFast, built_in: list[str]) -> None:
    windows = ids(data.held_out_text(None, tokenizer, seq_len=32, samples=3))
    assert tokenizer.decode(windows.flatten()).startswith("eval 0 document 0")
    assert built_in


def test_held_out_errors(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(CompressError, match=r"has 5 tokens, but 1 x 64 need 64\. Use --seq-len 5 or a longer text"):
        data.held_out_text(tmp_path / "a.txt", tokenizer, seq_len=64)
    file = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(CompressError, match="holds token ids; perplexity needs text"):
        data.held_out_text(file, tokenizer, seq_len=2)


def test_shuffling_reads_a_bounded_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "POOL", 10)
    order = list(rows.shuffled((str(i) for i in range(30)), seed=0))
    assert sorted(order[:10], key=int) == [str(i) for i in range(10)]
    assert order[:10] != [str(i) for i in range(10)]
    assert order[10:] == [str(i) for i in range(10, 30)]


def test_text_after_token_ids_and_the_other_way_round(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CompressError, match="Row 1 is token ids, earlier rows are text"):
        list(rows.render(["text", rows.Tokens(1, [1], [])], tokenizer))
