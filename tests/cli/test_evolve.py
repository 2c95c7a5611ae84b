"""`compress evolve` as people meet it."""

from __future__ import annotations

import json
import sys

import pytest

from compress.cli import main
from compress.proxies import bench as stored
from compress.proxies import proxy
from tests import tiny
from tests.proxies.made import bench


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
    return main.run()


@pytest.fixture
def benches(tmp_path):
    paths = [tmp_path / f"{seed}.parquet" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        stored.save(bench(seed), path)
    return paths


def test_a_formula_is_evolved_on_files(benches, tmp_path, monkeypatch, capsys):
    out = tmp_path / "proxy.json"
    flags = ["--generations", 2, "--population", 8, "--workers", 1]
    assert run(monkeypatch, "evolve", *benches, "-o", out, *flags) == 0
    printed = capsys.readouterr().out
    found = proxy.load(out)
    assert str(found.formula) in printed
    assert "within bands" in printed
    assert "bench 1" in printed
    assert run(monkeypatch, "evolve", *flags, *benches, "-o", tmp_path / "again.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["formula"] == str(found.formula)
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_a_model_is_measured_and_a_plan_chosen_by_what_was_evolved(tmp_path, monkeypatch, capsys):
    model, text = tiny.save("llama", tmp_path / "small"), tiny.calibration("llama", tmp_path / "text")
    data = ["--calib", text, "--samples", 4, "--seq-len", 12]
    library = ["--library", tmp_path / "library"]
    monkeypatch.setattr("compress.opening.JUDGED_TOKENS", 48)
    made = ["evolve", "bench", model, "-o", tmp_path / "benches", "--configurations", 20, "--group-size", 32]
    assert run(monkeypatch, *made, *data, *library) == 0
    assert "20 of int2 g32, int3 g32" in capsys.readouterr().out
    out = tmp_path / "proxy.json"
    flags = ["--generations", 1, "--population", 6, "--workers", 1]
    assert run(monkeypatch, "evolve", tmp_path / "benches" / "small.parquet", "-o", out, *flags) == 0
    capsys.readouterr()
    plan = tmp_path / "plan.json"
    asked = ["search", model, "-o", plan, "--avg-bits", 3.6, "--group-size", 32, "--method", "emq", *data, *library]
    assert run(monkeypatch, *asked, "--proxy", out) == 0
    assert json.loads(plan.read_text())["search"]["method"] == "emq"
    assert run(monkeypatch, *asked) == 0, "with the proxy that comes along"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evolve", "absent.parquet"], "absent.parquet is no bench"),
        (["evolve", "absent.parquet", "--samples", "4"], "All of these were measured already; leave out --samples."),
        (["evolve", "absent-model"], "absent-model"),
        (["evolve", "bench", "-o", "x", "--configurations", "15"], "--configurations is 15; it is a multiple of 10"),
        (["evolve", "bench", "-o", "x", "--bits", "two"], "--bits 'two' is not a list"),
        (["search", "--avg-bits", "3", "--proxy", "x.json"], "--proxy is for method emq, not for kl"),
        (["search", "--avg-bits", "3", "--method", "emq", "--proxy", "x.json"], "x.json is no proxy"),
    ],
)
def test_bad_input_ends_with_a_remedy(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["evolve"], ["evolve", "search"], ["evolve", "bench"]])
def test_help(monkeypatch, capsys, verb):
    assert run(monkeypatch, *verb, "--help") == 0
    assert f"Usage: compress {' '.join(verb)}" in capsys.readouterr().out
