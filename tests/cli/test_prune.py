"""`compress prune` as people meet it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from compress.cli import main
from tests import tiny

SMALL = ["--samples", "16", "--seq-len", "24"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    return tiny.save("llama", folder / "model"), tiny.calibration("llama", folder / "calib")


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "prune", *map(str, arguments)])
    return main.run()


def test_the_table_counts_the_zeros(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    assert run(monkeypatch, source, "-o", tmp_path / "out", "--calib", calib, "--sparsity", 0.6, "--eval", *SMALL) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    zeros = sum(layer["zeros"] for layer in report["layers"])
    assert f"{zeros:,} of " in printed
    assert ": 60.0" in printed
    assert "14 x 0.6 unstructured; 1 left dense" in printed
    assert "the same, as format dense stores every weight in full" in printed
    assert f"{report['perplexity_before']:.3f} -> {report['perplexity_after']:.3f}" in printed


def test_json_and_both_compressions_at_once(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    flags = ["--pattern", "2:4", "--bits", 4, "--group-size", 32, "--json"]
    assert run(monkeypatch, source, "-o", tmp_path / "out", "--calib", calib, *flags, *SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["spec"] for layer in report["layers"]} == {"int4 g32, 0.5 2:4"}
    plan = json.loads((tmp_path / "out" / "compress_plan.json").read_text())
    assert plan["layers"]["model.layers.0.mlp.up_proj"]["sparsity"] == {"fraction": 0.5, "pattern": "2:4"}
    monkeypatch.setattr(sys, "argv", ["compress", "inspect", str(tmp_path / "out"), "--json"])
    assert main.run() == 0
    inspected = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert "2:4" in inspected["model.layers.0.mlp.up_proj"]["patterns"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--pattern", "3:7"], "Pattern 3:7 does not fit model.layers.0.self_attn.q_proj"),
        (["--format", "gptq"], "give --bits too"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing(model, tmp_path, monkeypatch, capsys, flags, message):
    assert run(monkeypatch, model[0], "-o", tmp_path / "out", "--calib", model[1], *flags, *SMALL) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
