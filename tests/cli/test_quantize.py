"""The command as people meet it: what it prints, what it writes, and how it refuses."""

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
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from compress import sequential
from compress.cli import main
from tests import interrupted, tiny

DRAWN = ["--samples", "16", "--seq-len", "24"]
SMALL = [*DRAWN, "--group-size", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    return tiny.save("llama", folder / "model"), tiny.calibration("llama", folder / "calib")


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "quantize", *map(str, arguments)])
    return main.run()


def test_the_table_says_what_it_cost(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    assert run(monkeypatch, source, "-o", tmp_path / "out", "--calib", calib, "--eval", *SMALL) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert f"{report['bits_per_weight']:.2f} over all weights" in printed
    assert f"{report['perplexity_before']:.3f} -> {report['perplexity_after']:.3f}" in printed
    assert "14 x int4 g32; 1 left dense" in printed
    assert "worst" in printed
    assert "peak" in printed or "at most" in printed
    assert str(tmp_path / "out") in printed.replace("\n", "")
    assert report["command"].startswith("compress quantize ")
    assert report["calibration"].endswith("16 x 24 tokens, seed 0")
    assert report["perplexity_before"] != report["perplexity_after"]


def test_json_is_the_report_and_nothing_else(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    assert run(monkeypatch, source, "-o", tmp_path / "out", "--calib", calib, "--json", "--bits", 3, *SMALL) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "compress_report.json").read_text()
    assert {layer["spec"] for layer in json.loads(printed)["layers"]} == {"int3 g32"}


def test_notes_and_fallbacks_are_on_the_screen(model, tmp_path, monkeypatch, capsys):
    source, _ = model
    arguments = ["--method", "rtn", "--asymmetric", "--group-size", 64]
    assert run(monkeypatch, source, "-o", tmp_path / "out", *arguments) == 0
    printed = capsys.readouterr().out
    assert "Note: transformers + compressed-tensors" in printed
    assert "Fallback: 2 layers, such as model.layers.0.mlp.down_proj: group size 64 does not divide 96 inputs: 32" in printed


@pytest.mark.parametrize(("flags", "order"), [([], "group"), (["--no-act-order"], "natural"), (["--static-groups"], "act")])
def test_order_flags(model, tmp_path, monkeypatch, flags, order):
    source, calib = model
    given = ["--calib", calib, "--effort", "fast", *flags, *SMALL]
    assert run(monkeypatch, source, "-o", tmp_path / "out", *given) == 0
    assert json.loads((tmp_path / "out" / "compress_report.json").read_text())["arguments"]["order"] == order


def no_change(_folder: Path) -> None:
    pass


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def already_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nan_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def huge_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(torch.inf)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def plan_for_other_layers(folder: Path) -> None:
    (folder / "plan.json").write_text('{"version": 1, "layers": {"model.layers.7.mlp.up_proj": {"scheme": null}}}')


def plan_that_misses(folder: Path) -> None:
    (folder / "plan.json").write_text('{"version": 1, "layers": {"model.layers.0.mlp.up_proj": {"scheme": null}}}')


def empty_text(folder: Path) -> None:
    (folder / "text.txt").write_text("")


def short_text(folder: Path) -> None:
    (folder / "text.txt").write_text("w5 w6 w7 w8 " * 10)


def binary_text(folder: Path) -> None:
    (folder / "text.txt").write_bytes(bytes(range(128, 256)) * 10)


def short_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"input_ids": [4, 5, 6]}\n' * 16)


REFUSED = {
    "bits": (no_change, ["--bits", "5"], "bits is 5; choose one of 2, 3, 4, 8"),
    "group size zero": (no_change, ["--group-size", "0"], "group size is 0"),
    "damping": (no_change, ["--damping", "2"], "damping is 2"),
    "skip is no regex": (no_change, ["--skip", "("], "is not a regular expression"),
    "skip everything": (no_change, ["--skip", "."], "nothing left to compress"),
    "skip matches nothing": (
        no_change,
        ["--skip", "visoin"],
        "--skip 'visoin' matches no layer of the model. It has",
    ),
    "one skip of two": (no_change, ["--skip", "q_proj", "--skip", "blocks"], "--skip 'blocks' matches no layer"),
    "size without a unit": (no_change, ["--size", "2.1"], "'2.1' has no unit and would be bytes. Did you mean 2.1GB or 2.1MB?"),
    "no such device": (no_change, ["--device", "toaster"], "no device 'toaster'"),
    "seq-len beyond the model": (no_change, ["--seq-len", "4096"], "--seq-len is 4096, but the model was built for at most 64"),
    "kinds of no act-order": (no_change, ["--no-act-order", "--static-groups"], "on the way; leave out --static-groups."),
    "no such plan": (no_change, ["--plan", "nowhere.json"], "Cannot read the plan nowhere.json"),
    "plan names unknown layers": (plan_for_other_layers, ["--plan", "{}/plan.json"], "model.layers.7.mlp.up_proj, which the"),
    "plan misses layers": (plan_that_misses, ["--plan", "{}/plan.json"], "The plan misses"),
    "only pickle": (only_pickle, [], "only pickled weights (pytorch_model.bin)"),
    "already quantized": (already_quantized, [], "already quantized (awq)"),
    "truncated": (truncated, [], "model.safetensors"),
    "no config": (no_config, [], "no config.json"),
    "bad config": (bad_config, [], "is not valid JSON"),
    "no weights": (no_weights, [], "no .safetensors files"),
    "no tokenizer": (no_tokenizer, [], "tokenizer"),
    "no such calibration file": (no_change, ["--calib", "nowhere.txt"], "nowhere.txt"),
    "empty text": (empty_text, ["--calib", "{}/text.txt"], "empty"),
    "short text": (short_text, ["--calib", "{}/text.txt"], "--samples"),
    "not text": (binary_text, ["--calib", "{}/text.txt"], "text.txt"),
    "short sample": (short_rows, ["--calib", "{}/rows.jsonl"], "24"),
}

LATER = {
    "NaN weight": (nan_weight, "weight of model.layers.1.self_attn.v_proj has NaN"),
    "infinite activations": (huge_norm, "inputs of model.layers.1.self_attn.q_proj are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_one_clear_line_and_leaves_nothing(case, model, tmp_path, monkeypatch, capsys):
    spoil, flags, message = REFUSED[case]
    folder = tiny.save("llama", tmp_path / "model")
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [flag.replace("{}", str(folder)) for flag in flags]
    calib = [] if "--calib" in flags else ["--calib", model[1]]
    capsys.readouterr()
    assert run(monkeypatch, folder, "-o", "out", *calib, *(DRAWN if "--plan" in flags else SMALL), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("Error: ")
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_skip_of_a_layer_that_stays_dense_anyway_is_no_error_and_is_said(model, tmp_path, monkeypatch, capsys):
    flags = ["-o", tmp_path / "out", "--method", "rtn", "--bits", 4, "--group-size", 32]
    assert run(monkeypatch, model[0], *flags, "--skip", "lm_head", "--skip", "q_proj|lm_head") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "--skip" in line]
    assert said == ["Note: --skip 'lm_head' changes nothing: lm_head would stay dense without it (outside the blocks)."]


def test_a_model_that_is_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "nobody/nothing", "-o", "out") == 2
    assert "no folder nobody/nothing" in capsys.readouterr().err
    assert run(monkeypatch, "not//a//name") == 2
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, "empty") == 2
    assert "no config.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_encoder_decoder_is_refused(tmp_path, monkeypatch, capsys):
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=tiny.VOCAB)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    assert run(monkeypatch, tmp_path / "model", "-o", tmp_path / "out") == 2
    assert "T5ForConditionalGeneration is an encoder-decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_in_use(model, tmp_path, monkeypatch, capsys):
    source, calib = model
    flags = ["--calib", calib, "-o", tmp_path / "out", *SMALL]
    assert run(monkeypatch, source, *flags) == 0
    assert run(monkeypatch, source, *flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, source, "--bits", 8, "--overwrite", *flags) == 0
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert report["arguments"]["bits"] == 8


def test_the_default_out_is_named_after_the_model_and_its_bits(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, model[0], "--method", "rtn", "--bits", 8) == 0
    assert (tmp_path / "model-8bit" / "config.json").is_file()


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A model of four blocks, and what its uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(LlamaConfig(**(tiny.LLAMA | {"num_hidden_layers": 4}))).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        assert run_as_others_do(patch, folder / "model", "-o", folder / "out", *DEEP) == 0
    return folder / "model", written(folder / "out")


DEEP = ["--group-size", "32", "--seq-len", "64", "--samples", "64", "--effort", "fast"]


def run_as_others_do(monkeypatch, *arguments: object) -> int:
    """With the threads of the processes that are interrupted: sums depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(monkeypatch, *arguments)
    finally:
        torch.set_num_threads(threads)


def written(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != "compress_report.json"}


def stopped(source: Path, out: Path, with_signal: signal.Signals) -> tuple[int, str]:
    """The exit code and the errors of a process that is stopped while it writes its third block."""
    command = [*interrupted.WAITING, "quantize", str(source), "-o", str(out), *DEEP]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(out.parent.glob(".out.partial/blocks/*.safetensors"))) < 2:
            time.sleep(0.02)
        process.send_signal(with_signal)
        _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_ctrl_c_keeps_whole_blocks_and_says_so(deep, tmp_path):
    code, error = stopped(deep[0], tmp_path / "out", signal.SIGINT)
    assert code == 130
    (said,) = [line for line in error.splitlines() if line.startswith("Interrupted")]
    assert re.fullmatch(
        r"Interrupted\. What was solved, 2 of 4 blocks, is kept in .*\.out\.partial \(.* MB\); "
        r"the same command goes on from there\.", said
    )  # fmt: skip
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_a_run_goes_on_after_one_that_was_killed(deep, tmp_path, monkeypatch, capsys):
    source, whole = deep
    code, _ = stopped(source, tmp_path / "out", signal.SIGKILL)
    assert code == -signal.SIGKILL
    capsys.readouterr()
    assert run_as_others_do(monkeypatch, source, "-o", tmp_path / "out", *DEEP) == 0
    assert "2 blocks are from an earlier run" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compress_report.json").read_text())["resumed_blocks"] == 2
    assert written(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_before_the_first_block_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sequential, "solve_alike", ctrl_c)
    assert run(monkeypatch, model[0], "-o", tmp_path / "out", "--calib", model[1], *SMALL) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spoil", "message"), LATER.values(), ids=LATER)
def test_bad_input_that_shows_later_is_refused_and_what_was_solved_before_it_stays(
    spoil, message, model, tmp_path, monkeypatch, capsys
):
    folder = tiny.save("llama", tmp_path / "model")
    spoil(folder)
    capsys.readouterr()
    assert run(monkeypatch, folder, "-o", tmp_path / "out", "--calib", model[1], *SMALL) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert "1 of 2 blocks, is kept in" in error
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.partial"}
