"""From the command line to a folder: search, plan file, quantize; and what is left behind when it goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import checkpoint, models, opening
from compress.cli import main
from compress.errors import CompressError
from compress.mixed import library
from compress.spec import LayerSpec, Plan, Scheme
from tests import interrupted, tiny

DRAWN = ["--samples", "16", "--seq-len", "24"]
SMALL = [*DRAWN, "--group-size", "32"]
GIVEN = dict(samples=16, seq_len=24, group_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("search")
    ids = tiny.inputs("llama", 32)["input_ids"].tolist()
    (folder / "calib.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return tiny.save("llama", folder / "model"), folder / "calib.jsonl"


@pytest.fixture(scope="module")
def solved(tmp_path_factory) -> Path:
    """A library for the searches that do not care."""
    return tmp_path_factory.mktemp("solved")


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(opening, "JUDGED_TOKENS", 16 * 24)


def run(monkeypatch, verb: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", verb, *map(str, arguments)])
    return main.run()


@pytest.fixture
def counted(monkeypatch):
    """How often something was solved, for the library and otherwise."""
    calls = {"library": 0, "otherwise": 0}
    for name, module, function in (("library", library, "solve"), ("otherwise", compress.sequential, "solve_alike")):
        real = getattr(module, function)

        def counting(*given, name=name, real=real):
            calls[name] += 1
            return real(*given)

        monkeypatch.setattr(module, function, counting)
    return calls


def codes(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_it_prints_and_what_it_writes(model, solved, tmp_path, monkeypatch, capsys):
    source, calib = model
    plan = tmp_path / "plan.json"
    flags = ["--avg-bits", 3.5, "--calib", calib, "--library", solved, "--pin", "1.*down=dense", "--verify", *SMALL]
    assert (
        run(monkeypatch, "search", source, "-o", plan, *flags[:2], "--skip", "1.*down_proj", *flags[2:6], "--verify", *SMALL) == 0
    )
    printed = capsys.readouterr().out
    section = json.loads(plan.read_text())["search"]
    assert "bits by block" in printed
    assert "model.layers.0" in printed
    assert "self_attn.qkv_proj" in printed
    assert f"{section['spent']['avg_bits']} over the layers" in printed
    assert "int2 g32" in printed
    assert "found" in printed
    assert f"{section['found']['measured']:.4g}" in printed
    assert str(plan) in printed.replace("\n", "")
    assert section["command"].startswith("compress search ")
    assert (section["method"], section["seed"]) == ("kl", 0)
    assert section["arguments"]["avg_bits"] == 3.5
    assert section["arguments"]["skip"] == ["1.*down_proj"]
    assert section["versions"]["torch"] == torch.__version__
    assert Path(section["library"]).parent == solved


def test_several_budgets_say_which_decides_and_what_was_reached(model, solved, tmp_path, monkeypatch, capsys):
    source, calib = model
    flags = ["--calib", calib, "--library", solved, *SMALL]
    plan = tmp_path / "plan.json"
    assert run(monkeypatch, "search", source, "-o", plan, "--max-kl", 0.0005, "--avg-bits", 8.4, *flags) == 0
    printed = capsys.readouterr().out
    section = json.loads(plan.read_text())["search"]
    limit, target = section["budgets"]
    reached = f"{section['found']['measured']:.4g} nats"
    assert limit == {"flag": "--avg-bits", "asked": "8.4", "reached": section["spent"]["avg_bits"], "binds": False}
    assert target == {"flag": "--max-kl", "asked": "0.0005 nats", "reached": reached, "binds": True}
    assert f"--max-kl 0.0005 nats: {reached} reached, which decides" in printed
    assert f"--avg-bits 8.4: {limit['reached']} reached" in printed

    asked = ["--max-kl", 1e3, "--avg-bits", 8.4, "--effort", "fast"]  # which the smallest plan keeps, too
    assert run(monkeypatch, "quantize", source, "-o", tmp_path / "out", *asked, *flags) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: Budgets")]
    assert "--max-kl 1000 nats: " in note
    assert "decides" not in note
    assert note[6:] in json.loads((tmp_path / "out" / "compress_report.json").read_text())["warnings"]


def test_of_several_limits_the_fullest_decides(model, solved, tmp_path):
    given = dict(calib=model[1], library=solved, avg_bits=4.0, size="10MB", **GIVEN)
    with pytest.raises(CompressError, match="limits nothing"):
        compress.search(model[0], out=tmp_path / "plan.json", **given)
    found = compress.search(model[0], out=tmp_path / "plan.json", **(given | {"size": "110kB", "avg_bits": 4.4}))
    assert [one.flag for one in found.budgets] == ["--size", "--avg-bits"]
    assert sum(one.binds for one in found.budgets) == 1


def test_what_the_plan_file_says_is_true(model, solved, tmp_path):
    source, calib = model
    found = compress.search(source, out=tmp_path / "plan.json", avg_bits=3.5, calib=calib, library=solved, verify=True, **GIVEN)
    document = json.loads((tmp_path / "plan.json").read_text())
    section = document["search"]
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == found.plan
    given = dict(calib=calib, samples=16, seq_len=24, effort="fast")
    compress.quantize(source, out=tmp_path / "out", plan=tmp_path / "plan.json", **given)
    real = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert real <= section["found"]["size"] <= 1.005 * real
    anatomy = models.anatomy(models.load(source))
    bits = sum(N * K * (plan.layers[name].scheme.bits + 1) for name, (N, K) in anatomy.shapes.items())  # float32 scales
    weights = sum(N * K for N, K in anatomy.shapes.values())
    assert float(section["spent"]["avg_bits"]) == pytest.approx(bits / weights, abs=1e-3)
    assert bits / weights <= 3.5
    scores = section["scores"]
    assert list(scores) == [unit.name for unit in found.space.units]
    chosen = sum(
        scores[unit.name][str(LayerSpec(Scheme(plan.layers[unit.layers[0].name].scheme.bits, 32)))] for unit in found.space.units
    )
    assert section["found"]["predicted"] == pytest.approx(chosen, rel=1e-4)
    judged = tiny.inputs("llama", 32)["input_ids"]
    expected = compress.evaluate.compare(compress.load(tmp_path / "out"), models.load(source), judged_rows(judged, calib)).kl
    assert section["found"]["measured"] == pytest.approx(expected, rel=1e-3)
    for point in section["uniform"]:
        other = Plan.uniform(anatomy.in_features, Scheme(int(point["name"][3]), 32))
        compress.quantize(source, out=tmp_path / "uniform", plan=other, method="rtn", overwrite=True)
        real = (tmp_path / "uniform" / "model.safetensors").stat().st_size
        assert real <= point["size"] <= 1.005 * real


def judged_rows(ids: torch.Tensor, calib: Path) -> torch.Tensor:
    """The last 16 of the rows, in the order in which they are drawn."""
    from compress.calib import data

    drawn = data.text(calib, tiny.tokenizer(), samples=32, seq_len=24).inputs["input_ids"]
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, ids.tolist()))
    return drawn[16:]


def test_a_plan_is_copied_from_its_library_or_solved_anew(model, tmp_path, counted):
    source, calib = model
    given = dict(calib=calib, samples=16, seq_len=24)
    there = tmp_path / "solved"
    found = compress.search(source, out=tmp_path / "plan.json", avg_bits=3.5, library=there, **given, group_size=32)
    once = dict(counted)
    assert once["library"] > 0
    assert once["otherwise"] == 0
    copied = compress.quantize(source, effort="fast", out=tmp_path / "copied", plan=tmp_path / "plan.json", **given)
    assert counted == once
    written = codes(tmp_path / "copied")
    for layer in models.anatomy(models.load(source)).layers:
        tensors = compress.formats.compressed_tensors.encode(found.library.solved(layer, found.plan.layers[layer.name]))
        for suffix, tensor in tensors.items():
            assert torch.equal(written[f"{layer.name}.{suffix}"], tensor)
    for folder in there.iterdir():
        folder.rename(tmp_path / "gone")
    anew = compress.quantize(source, effort="fast", out=tmp_path / "anew", plan=tmp_path / "plan.json", **given)
    assert counted["otherwise"] > 0
    assert anew.size_after == copied.size_after
    assert Plan.load(tmp_path / "anew" / "compress_plan.json") == found.plan
    other = compress.quantize(
        source, effort="fast", out=tmp_path / "other", plan=tmp_path / "plan.json", **{**given, "seq_len": 20}
    )
    assert other.size_after == copied.size_after


def test_an_edited_plan_still_works(model, solved, tmp_path, counted):
    source, calib = model
    given = dict(calib=calib, samples=16, seq_len=24)
    file = tmp_path / "plan.json"
    compress.search(source, out=file, avg_bits=3.5, library=solved, **given, group_size=32)
    counted.clear()
    counted.update(library=0, otherwise=0)
    document = json.loads(file.read_text())
    name = "model.layers.0.self_attn.o_proj"
    for bits, group, anew in ((8, 32, False), (8, 16, True)):
        document["layers"][name]["scheme"] = {"bits": bits, "group_size": group, "symmetric": True}
        file.write_text(json.dumps(document))
        report = compress.quantize(source, effort="fast", out=tmp_path / f"{bits}-{group}", plan=file, **given)
        assert {layer.name: layer.spec for layer in report.layers}[name] == f"int{bits} g{group}"
        assert (counted["otherwise"] > 0) == anew
        checkpoint.verify(tmp_path / f"{bits}-{group}")
    document["layers"][name]["scheme"] = None
    file.write_text(json.dumps(document))
    report = compress.quantize(source, out=tmp_path / "dense", plan=file, **given)
    assert report.dense[name] == "dense by plan"


def test_images_are_copied_from_the_library_too(tmp_path, counted, monkeypatch):
    """The samples that are solved with do not depend on how they were drawn."""
    monkeypatch.setattr(opening, "JUDGED_IMAGES", 8)
    source, calib = tiny.save("resnet", tmp_path / "model"), tiny.calibration("resnet", tmp_path / "calib")
    given = dict(calib=calib, samples=6)
    found = compress.search(source, out=tmp_path / "plan.json", avg_bits=5.0, bits="2,8", library=tmp_path / "solved", **given)
    report = compress.quantize(source, effort="fast", out=tmp_path / "out", plan=tmp_path / "plan.json", **given)
    assert counted["otherwise"] == 0
    assert found.blocks == ("",)
    assert len(report.layers) == len(found.plan.layers)


def test_a_model_of_one_block_is_shown_layer_by_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opening, "JUDGED_IMAGES", 8)
    source, calib = tiny.save("resnet", tmp_path / "model"), tiny.calibration("resnet", tmp_path / "calib")
    flags = ["--avg-bits", 6, "--bits", "2,8", "--calib", calib, "--samples", 6, "--library", tmp_path / "solved"]
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {cells[1]: cells[2] for line in lines if len(cells := [cell.strip() for cell in re.split("[│┃]", line)]) == 4}
    for name, spec in Plan.load(tmp_path / "plan.json").layers.items():
        assert shown[name].split()[0] == str(spec.scheme.bits)


def test_a_budget_in_one_step_is_both_steps(model, solved, tmp_path, monkeypatch, capsys):
    source, calib = model
    flags = ["--calib", calib, "--library", solved, "--pin", "0.*down=8", *SMALL]
    assert run(monkeypatch, "quantize", source, "-o", tmp_path / "one", "--avg-bits", 4.5, "--json", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibration"].endswith("32 x 24 tokens, seed 0, 16 of them to judge plans on")
    assert {layer["spec"] for layer in report["layers"]} <= {"int2 g32", "int3 g32", "int4 g32", "int8 g32"}
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", "--avg-bits", 4.5, *flags) == 0
    plan = ["--plan", tmp_path / "plan.json", "--calib", calib, *DRAWN]
    assert run(monkeypatch, "quantize", source, "-o", tmp_path / "two", *plan) == 0
    one, two = codes(tmp_path / "one"), codes(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert (tmp_path / "one" / "compress_plan.json").read_text() == (tmp_path / "two" / "compress_plan.json").read_text()


def test_json_is_the_plan_file_and_the_same_twice_but_for_times(model, solved, tmp_path, monkeypatch, capsys):
    source, calib = model
    monkeypatch.chdir(tmp_path)
    texts = []
    for _ in range(2):
        assert run(monkeypatch, "search", source, "--avg-bits", 3, "--calib", calib, "--library", solved, "--json", *SMALL) == 0
        texts.append(capsys.readouterr().out)
        assert texts[-1] == (tmp_path / "model-plan.json").read_text()
    one, two = (re.sub(r'"seconds": [0-9.]+', "", text) for text in texts)
    assert one == two
    assert one != texts[0]


def test_a_plot_is_a_picture(model, solved, tmp_path, monkeypatch):
    source, calib = model
    flags = ["--avg-bits", 3.5, "--calib", calib, "--library", solved, "--bits", "2,8", *SMALL]
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", "--plot", tmp_path / "plot.png", *flags) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "plan.json").read_text())["search"]["frontier"]
    assert all(point["measured"] is not None for point in points)


def test_zeros_are_searched_and_applied(model, solved, tmp_path, monkeypatch):
    source, calib = model
    flags = ["--calib", calib, "--library", solved, *SMALL]
    wanted = ["--avg-sparsity", 0.4, "--sparsity", "0,0.5", "--bits", "4,8", "--avg-bits", 7]
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *wanted, *flags) == 0
    report = compress.quantize(source, out=tmp_path / "out", plan=tmp_path / "plan.json", calib=calib, samples=16, seq_len=24)
    zeros, weights = report.zeros
    assert zeros >= 0.4 * sum(N * K for N, K in models.anatomy(models.load(source)).shapes.values()) * 0.999
    assert weights > 0


REFUSED = {
    "no budget": ([], "There is no budget"),
    "pairs for another method": (["--avg-bits", "4", "--all-pairs"], "Method kl measures no pairs; leave out --all-pairs."),
    "groups without bits": (["--avg-sparsity", "0.4", "--sparsity", "0,0.5"], "no weight on a grid; leave out --group-size."),
    "size": (["--size", "big"], "--size 'big' is no size"),
    "too little": (["--avg-bits", "1"], "--avg-bits 1 is out of reach: plans range from 3 to 9"),
    "too much": (["--avg-bits", "30"], "--avg-bits 30 limits nothing: plans range from 3 to 9"),
    "pin": (["--avg-bits", "4", "--pin", "mlp=8"], "--avg-bits 4 cannot be kept with --pin 'mlp=8'"),
    "pin of nothing": (["--avg-bits", "4", "--pin", "cnn=8"], "matches no layer"),
    "two targets": (["--max-kl", "1", "--max-ppl-increase", "1%"], "both targets of quality"),
    "target": (["--max-kl", "1e-12"], "--max-kl cannot be kept: the most precise plan measures"),
    "latency": (["--latency", "0.5x"], "--latency needs times of this machine"),
    "table": (["--latency", "0.5x", "--latency-table", "nowhere.json"], "Cannot read the latency table"),
    "one option": (["--avg-bits", "4", "--bits", "4"], "nothing to choose from"),
    "refine": (["--max-kl", "1", "--refine", "2"], "leave it out with a target of quality"),
    "method": (["--avg-bits", "4", "--method", "magic"], "Invalid value for '--method'"),
    "plot": (["--avg-bits", "4", "--plot", "plot.xyz"], "--plot plot.xyz is no picture's name"),
    "plot elsewhere": (["--avg-bits", "4", "--plot", "no/where.png"], "its folder does not exist"),
    "rows": (["--avg-bits", "4", "--samples", "30"], "a search takes 16 more to judge plans on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_two_and_leaves_nothing(model, solved, tmp_path, monkeypatch, capsys, case):
    source, calib = model
    flags, said = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    given = ["--calib", calib, "--library", solved, *SMALL, *flags]
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *given) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_has_nowhere_to_go_is_refused_first(model, tmp_path, monkeypatch, capsys):
    source, _ = model
    for out, said in ((tmp_path, "it is a folder"), (tmp_path / "no" / "plan.json", "its folder does not exist")):
        assert run(monkeypatch, "search", source, "-o", out, "--avg-bits", 4, "--library", tmp_path / "solved") == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pin", "q_proj=8"], "--pin and --library are for a search"),
        (["--library", "somewhere"], "--pin and --library are for a search"),
        (["--avg-bits", "4", "--plan", "plan.json"], "A plan is given, and a budget"),
        (["--bits", "2,4"], "several are for a budget to choose from"),
        (["--avg-bits", "1"], "out of reach"),
        (["--max-kl", "1e-12"], "cannot be kept"),
    ],
)
def test_quantize_refuses_what_does_not_go_together(model, solved, tmp_path, monkeypatch, capsys, flags, said):
    source, calib = model
    monkeypatch.chdir(tmp_path)
    where = ["--library", solved] if "--avg-bits" in flags or "--max-kl" in flags else []
    assert run(monkeypatch, "quantize", source, "-o", "out", "--calib", calib, *SMALL, *where, *flags) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_entry_is_named(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    flags = ["--avg-bits", 3.5, "--bits", "2,8", "--calib", calib, "--library", tmp_path / "solved", *SMALL]
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *flags) == 0
    file = next((tmp_path / "solved").rglob("int2*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    (tmp_path / "plan.json").unlink()
    capsys.readouterr()
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *flags) == 2
    assert "Delete it and search again" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    file.unlink()
    assert run(monkeypatch, "search", source, "-o", tmp_path / "plan.json", *flags) == 0
    assert file.read_bytes() == whole


def test_a_failure_while_writing_leaves_no_plan(model, solved, tmp_path, monkeypatch):
    source, calib = model
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CompressError, match="disk full"):
        compress.search(source, out=tmp_path / "plan.json", avg_bits=3.5, calib=calib, library=solved, **GIVEN)
    assert list(tmp_path.iterdir()) == []


HELP = """
import sys
sys.argv = ["compress", "search", "--help"]
from compress.cli.main import run
assert run() == 0
assert "torch" not in sys.modules
"""


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-ppl-increase" in done.stdout


def test_ctrl_c_leaves_whole_entries_only(model, tmp_path):
    """And the next search goes on from there."""
    source, _ = model
    there, plan = tmp_path / "solved", tmp_path / "plan.json"
    command = [*interrupted.COMMAND, "search", str(source), "-o", str(plan), "--avg-bits", "4", "--library", str(there)]
    calib = tmp_path / "text.txt"
    calib.write_text("".join(f"w{4 + i % 120} " for i in range(60_000)))
    command += ["--calib", str(calib), "--samples", "64", "--seq-len", "60", "--group-size", "32,16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as started:
        deadline = time.monotonic() + 120
        while not list(there.rglob("*.safetensors")) and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "Interrupted." in err
    assert "Traceback" not in err
    assert out == ""
    assert not plan.exists()
    files = [file for file in there.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors"}
    assert all(load_file(file) for file in files)
