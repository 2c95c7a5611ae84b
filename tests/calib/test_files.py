"""Calibration text in the files, columns and conventions that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import compress
from compress.calib import data, files, rows
from compress.cli import main
from compress.errors import CompressError
from tests import tiny

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['arguments']['city'] }}){% endfor %}{% endfor %}"
)
TEXTS = ["one line", "line\u2028separator", "paragraph\u2029separator", "next\u0085line", "feed\x0cvertical\x0btab"]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read(source: Any) -> list[Any]:
    return list(rows.read(source))


def rendered(record: dict[str, Any], tmp_path: Path, template: str | None = TEMPLATE) -> str:
    (tmp_path / "a.jsonl").write_text(lines([record]))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    (text,) = rows.render(rows.read(tmp_path / "a.jsonl"), tokenizer)
    return text


def test_lines_end_in_a_line_feed_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        lines([{"text": text} for text in TEXTS]).replace("\n", "\r\n"), encoding="utf-8", newline=""
    )
    assert read(tmp_path / "a.jsonl") == [text.strip() for text in TEXTS]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.LOG", "a.v2.txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_plain_text_under_all_its_names(tmp_path, name, mark):
    (tmp_path / name).write_text(mark + "hello there", encoding="utf-8")
    assert read(tmp_path / name) == ["hello there"]


@pytest.mark.parametrize("packed", ["gz", "ZST"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_compressed_files(tmp_path, name, packed):
    content = {"a.txt": "hello there", "a.jsonl": lines([{"text": "hello there"}]), "a.json": '[{"text": "hello there"}]'}[name]
    file = tmp_path / f"{name}.{packed}"
    squeezed = gzip.compress(content.encode()) if packed == "gz" else pa.Codec("zstd").compress(content.encode(), asbytes=True)
    file.write_bytes(squeezed)
    assert read(file) == ["hello there"]
    file.write_bytes(squeezed[:-4])
    with pytest.raises(CompressError, match="Cannot read"):
        read(file)
    file.write_bytes(b"not compressed")
    with pytest.raises(CompressError, match="Cannot read"):
        read(file)


@pytest.mark.parametrize(
    "document",
    [
        [{"text": "a"}, {"text": "b"}],
        ["a", "b"],
        {"version": 1, "rows": [{"text": "a"}, {"text": "b"}]},
    ],
)
def test_arrays(tmp_path, document):
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert read(tmp_path / "a.json") == ["a", "b"]


def test_lines_under_the_name_of_a_document_and_a_single_record(tmp_path):
    (tmp_path / "a.json").write_text(lines([{"text": "a"}, {"text": "b"}]))
    assert read(tmp_path / "a.json") == ["a", "b"]
    (tmp_path / "b.json").write_text('{"text": "a"}')
    assert read(tmp_path / "b.json") == ["a"]
    (tmp_path / "c.json").write_text('{"text": ')
    with pytest.raises(CompressError, match=r"c\.json is not JSON"):
        read(tmp_path / "c.json")


def test_folders_globs_and_several_sources(tmp_path):
    for name in ("b/z.txt", "b/deep/a.md", "c.txt", "b/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "b") == ["b/deep/a.md", "b/z.txt"]
    assert read(str(tmp_path / "**/*.txt")) == ["b/z.txt", "c.txt"]
    assert read([tmp_path / "c.txt", str(tmp_path / "b")]) == ["c.txt", "b/deep/a.md", "b/z.txt"]
    assert files.named([tmp_path / "c.txt", "b"]) == f"{tmp_path / 'c.txt'}, b"
    (tmp_path / "empty").mkdir()
    for source, message in (("empty", "folder without text files"), ("*.none", "No file matches"), ("d.TXT", "There is no file")):
        with pytest.raises(CompressError, match=message):
            read(str(tmp_path / source))


CALL = {"function": {"arguments": '{"city": "Rome"}'}}
HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [HI, {"role": "assistant", "content": "yo"}]}, "<user>hi<assistant>yo"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "<user>hi<assistant>yo"),
        ({"conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}]}, "<system>be<user>hi"),
        ({"conversations": [{"from": "observation", "value": "12"}]}, "<tool>12"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "image"}, "i"]}]}, "<user>hi"),
        ({"instruction": "say", "input": "", "output": "yo"}, "<user>say<assistant>yo"),
        ({"instruction": "say", "input": "it", "output": "yo"}, "<user>say\n\nit<assistant>yo"),
        ({"prompt": "hi", "completion": "yo"}, "<user>hi<assistant>yo"),
        ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, "<user>hi<assistant>yo"),
        ({"prompt": [HI], "completion": [{"role": "assistant", "content": "yo"}]}, "<user>hi<assistant>yo"),
        ({"question": "hi", "answer": "yo"}, "<user>hi<assistant>yo"),
        (
            {
                "messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
                "tools": '[{"name": "weather"}]',
            },
            "[weather]<user>hi<assistant>(Rome)",
        ),
    ],
)  # fmt: skip
def test_conversations_of_every_make(tmp_path, record, expected):
    assert rendered(record, tmp_path) == expected


def test_pairs_are_text_without_a_template_and_conversations_are_not(tmp_path):
    assert rendered({"instruction": "say", "input": "it", "output": "yo"}, tmp_path, None) == "say\n\nit\n\nyo"
    with pytest.raises(CompressError, match="no chat template"):
        rendered({"conversations": [{"from": "human", "value": "hi"}]}, tmp_path, None)


def words(n: int) -> str:
    return " ".join(f"w{4 + i % 100}" for i in range(n))


@pytest.mark.parametrize("bad", ['{"text": ', '{"text": 5}', "[1]", '{"body": "b"}'])
def test_a_bad_row_among_many_is_left_out_and_counted(tmp_path, bad):
    good = [json.dumps({"text": words(8)})] * 99
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*good[:50], bad, *good[50:]]))
    made = data.text(file, tiny.tokenizer(), samples=4, seq_len=8)
    assert "without 1 of 100 rows that are of no use" in made.source
    file.write_text("\n".join([*good, *[bad] * 6]))
    with pytest.raises(CompressError, match=r"6 of 105 rows are of no use"):
        data.text(file, tiny.tokenizer(), samples=4, seq_len=8)
    with pytest.raises(CompressError, match=r"6 of 105 rows are of no use"):
        data.held_out_text(file, tiny.tokenizer(), seq_len=8)


def test_short_tokenised_rows_among_many_are_left_out(tmp_path):
    records = [{"input_ids": list(range(4, 20))}] * 40 + [{"input_ids": [4, 5]}]
    (tmp_path / "a.jsonl").write_text(lines(records))
    made = data.text(tmp_path / "a.jsonl", tiny.tokenizer(), samples=40, seq_len=16)
    assert made.samples == 40
    with pytest.raises(CompressError, match="has 40 rows, but 41 samples were asked for"):
        data.text(tmp_path / "a.jsonl", tiny.tokenizer(), samples=41, seq_len=16)


def test_a_template_that_refuses_a_row_among_many(tmp_path):
    records = [{"messages": [{"role": "user", "content": words(8)}]}] * 99 + [{"messages": [{"role": "system", "content": "w5"}]}]
    (tmp_path / "a.jsonl").write_text(lines(records))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    made = data.text(tmp_path / "a.jsonl", tokenizer, samples=99, seq_len=8)
    assert "without 1 of 100 rows" in made.source
    assert "no system role" in made.source


def test_several_sources_on_the_command_line(tmp_path, monkeypatch, capsys):
    source = tiny.save("llama", tmp_path / "source")
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(words(200))
    arguments = ["--calib", str(tmp_path / "a.txt"), "--calib", str(tmp_path / "b.md"), "--samples", "8", "--seq-len", "32"]
    command = ["compress", "quantize", str(source), "-o", str(tmp_path / "out"), "--bits", "4", "--json", *arguments]
    monkeypatch.setattr("sys.argv", command)
    assert main.run() == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibration"] == f"{tmp_path / 'a.txt'}, {tmp_path / 'b.md'}, 8 x 32 tokens, seed 0"
    with pytest.raises(CompressError, match="200 tokens"):
        compress.quantize(source, out=tmp_path / "other", calib=tmp_path / "a.txt", samples=8, seq_len=32)
