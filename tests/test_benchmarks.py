from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks import efforts, record, table
from benchmarks.record import ALL, COLUMNS, Measurement, Row

ROW = Row(
    commit="0123456789",
    date="2026-01-02",
    benchmark="pruning",
    subject="compress GPTQ",
    setting="int4 g128",
    metric="held-out perplexity",
    value="12.3456",
    unit="",
    spread="0.2",
    runs="5",
    hardware="A CPU, 2 cores",
    versions="torch 2",
)


def cells(markdown: str, line: str) -> list[str]:
    found = next(text for text in markdown.splitlines() if text.startswith(f"| {line} |" if line else "| |"))
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_the_readmes_show_the_latest_results():
    for path, (before, after) in table.updated().items():
        assert before == after, f"{path}: run python -m benchmarks.table"


def test_what_is_no_detail_is_in_the_other_readme_and_nothing_is_in_both():
    rows = record.read()
    shown, details = table.generate(rows), table.generate(rows, detail=True)
    for part in table.TABLES:
        own = [row for row in record.latest(rows) if part.shows(row)]
        says = part.says.format(setting=own[0].setting) if own else part.says
        assert (says in shown, says in details) == (bool(own) and not part.detail, bool(own) and part.detail)


def test_neighbours_from_one_run_share_a_caption():
    efforts_rows = [
        replace(ROW, benchmark="efforts", metric=metric) for metric in ("held-out loss increase", "peak anonymous memory")
    ]
    other = replace(ROW, date="2026-03-04")
    text = table.generate([*efforts_rows, other])
    assert text.count("2026-01-02, commit 0123456789") == 1
    assert text.count("<sub>") == 2
    assert text.index("Peak anonymous memory") < text.index("2026-01-02") < text.index("**Pruning.**") < text.index("2026-03-04")


def test_a_caption_has_every_commit():
    text = table.generate([ROW, replace(ROW, setting="int2 g32", commit="abcdef0123")])
    assert "2026-01-02, commits 0123456789 and abcdef0123, A CPU" in text


def test_every_stored_row_is_complete():
    for row in record.read():
        assert re.fullmatch(r"[0-9a-f]{10}\+?", row.commit)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row.date)
        by_chance = {efforts.LOSS, efforts.RATIO}  # text can get likelier by chance
        least = -1 if row.benchmark == "proxies" or row.metric in by_chance else 0  # correlations have a sign
        assert float(row.value) >= least
        assert float(row.spread) >= 0
        assert int(row.runs) >= 1
        known = {*(t.benchmark for t in table.TABLES), "defaults", "allocation", "rotation", "rows", "grids", "quality"}
        assert row.benchmark in known
        assert all((row.subject, row.setting, row.metric, row.versions))
        assert re.fullmatch(r"[^/\\]+, \d+ cores", row.hardware)


def test_a_measurement_is_the_median_and_the_range():
    m = Measurement.of("s", "x", "time", "s", [3.0, 1.0, 2.0, 10.0, 2.5])
    assert (m.value, m.spread, m.runs) == (2.5, 9.0, 5)


def test_rows_are_appended_under_one_header(tmp_path):
    results = tmp_path / "results.csv"
    first = record.append("pruning", [Measurement("a, b", "x", "time", 1 / 3, "s")], "peer 1", results)
    before = results.read_text()
    second = record.append("pruning", [Measurement("a, b", "x", "time", 2.0, "s")], results=results)
    assert results.read_text().startswith(before)
    assert results.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert record.read(results) == first + second
    assert first[0].value == "0.333333"
    assert first[0].versions.endswith("; peer 1")
    assert record.latest(first + second) == second


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("commit,date\n0,1\n")
    with pytest.raises(ValueError, match="columns"):
        record.read(tmp_path / "results.csv")


def test_subjects_and_settings_make_a_table():
    rows = [
        ROW,
        replace(ROW, setting="int2 g32", value="45.6", runs="1"),
        replace(ROW, subject="dense", setting=ALL, value="10", runs="1"),
        replace(ROW, subject="half measured", setting="int2 g32", value="1234.5", runs="1"),
    ]
    text = table.generate(rows)
    assert cells(text, "") == ["int4 g128", "int2 g32"]
    assert cells(text, "compress GPTQ") == ["12.35 ± 0.1", "45.60"]
    assert cells(text, "dense") == ["10.00", "10.00"]
    assert cells(text, "half measured") == ["", "1,234"]
    assert "Median of 5 runs" in text
    assert "2026-01-02, commit 0123456789, A CPU, 2 cores; torch 2." in text


def test_the_last_row_of_a_key_counts():
    text = table.generate([ROW, replace(ROW, value="99.5", runs="1")])
    assert cells(text, "compress GPTQ") == ["99.50"]


def test_other_benchmarks_and_metrics_are_left_out():
    serving = replace(ROW, benchmark="serving", subject="packed", metric="product", unit="ms")
    assert table.generate([serving, replace(ROW, benchmark="defaults")]) == ""
    text = table.generate([serving, replace(serving, metric=table.SERVED[0], unit="tokens/s")])
    assert "product" not in text
    assert cells(text, table.SERVED[0]) == ["12.35 ± 0.1 tokens/s"]


def test_only_the_text_between_the_markers_changes():
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.insert(readme, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.insert(table.insert(readme, "new"), "") == f"before\n{table.BEGIN}\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match=re.escape(table.END)):
        table.insert("no markers", "new")
