"""`compress bench` as people meet it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from compress import latency, tune
from compress.cli import main
from compress.kernels import launch
from compress.latency import LatencyTable
from compress.spec import Scheme
from tests import tiny


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(latency, "LEAST_SECONDS", 1e-4)


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "bench", *map(str, arguments)])
    return main.run()


def test_a_models_layers_are_timed(tmp_path, monkeypatch, capsys):
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "table.json"
    assert run(monkeypatch, model, "--latency-table", "-o", out, "--group-size", 32, "--batch", 1, "--batch", 2) == 0
    printed = capsys.readouterr().out
    assert "int3 g32" in printed
    assert "32 x 64, 2" in printed
    assert f"Written to {out}" in printed
    found = LatencyTable.load(out, torch.device("cpu"))
    for bits in (2, 3, 4, 8):
        assert found.of(64, 96, Scheme(bits, 32), 2) > 0
    assert found.of(32, 64, None) > 0


def test_the_default_is_a_large_llama_and_json_is_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "STANDARD", {(32, 64): 1})
    out = tmp_path / "table.json"
    assert run(monkeypatch, "--latency-table", "-o", out, "--bits", 4, "--json") == 0
    assert capsys.readouterr().out == out.read_text()
    assert [one["scheme"] and one["scheme"]["bits"] for one in json.loads(out.read_text())["timings"]] == [None, 4]


def test_tuning_is_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "ROWS", (1, 2))
    monkeypatch.setenv(launch.FILE, str(tmp_path / "kernels.json"))
    launch.table_of.cache_clear()
    try:
        flags = ["--tune", "--bits", 4, "--group-size", 32]
        assert run(monkeypatch, tiny.save("llama", tmp_path / "model"), *flags) == 0
        assert "layout nibbles" in capsys.readouterr().out
        assert run(monkeypatch, tmp_path / "model", *flags, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["file"] == str(tmp_path / "kernels.json")
        assert found["rows"]["nibbles"] == launch.few_rows("nibbles", torch.device("cpu"))
    finally:
        launch.table_of.cache_clear()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Say what to measure"),
        (["--latency-table"], "-o FILE"),
        (["--tune", "-o", "t.json"], "-o FILE"),
        (["--tune", "--latency-table", "-o", "t.json"], "Say what to measure"),
        (["--tune", "--batch", "4"], "--batch is for --latency-table"),
        (["--latency-table", "-o", "t.json", "--bits", "5"], "bits is 5"),
        (["--latency-table", "-o", "t.json", "--batch", "0"], "--batch is 0"),
        (["--latency-table", "-o", "t.json", "--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_bad_input_ends_with_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
