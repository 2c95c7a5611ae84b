"""Interrupted runs: what stays, for whom, and that going on from there ends as if nothing had happened."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import compress
from compress import api, checkpoint, models, opening, pipeline, resume, sequential, solvers
from compress.checkpoint import TensorInfo, Writer
from compress.errors import CompressError
from compress.formats import FORMATS
from compress.mixed import weighing
from compress.mixed.budget import Target
from compress.mixed.library import Library
from compress.mixed.weighing import Weighing
from compress.models import Anatomy, Layer
from compress.qtensor import Pruned
from compress.resume import Blocks, ResumableWriter
from compress.sequential import SolvedBlock, SolvedLayer
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme, Sparsity
from tests import tiny
from tests.formats.test_contract import random_qtensor

GIVEN: dict[str, Any] = dict(samples=16, seq_len=24)
SMALL = GIVEN | {"group_size": 32}
OF_ONE_RUN = ("command", "arguments", "out", "seconds", "peak_memory", "resumed_blocks")  # of a report


class Stopped(RuntimeError):  # noqa: N818 - nothing is wrong
    pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of models with three blocks, by family and dtype, and their calibration data."""
    folder, made = tmp_path_factory.mktemp("resume"), {}

    def source(family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            cls, config = copy.deepcopy(tiny.FAMILIES[family])
            config.num_hidden_layers = 3
            torch.manual_seed(0)
            made[family, dtype] = folder / f"{family}-{dtype}"
            cls(config).to(dtype).save_pretrained(made[family, dtype])
            tiny.tokenizer().save_pretrained(made[family, dtype])
        return made[family, dtype]

    return source


@pytest.fixture(scope="module")
def calib(tmp_path_factory) -> Path:
    return tiny.calibration("llama", tmp_path_factory.mktemp("calib") / "calib")


def stopping(after: int, error: type[BaseException] = Stopped):
    """A progress bar that ends the run after so many blocks, those read back from an earlier run among them."""
    passed = itertools.count(1)

    def track(steps: Iterable[Any], _total: int, name: str) -> Iterator[Any]:
        for step in steps:
            yield step
            if name in ("reading solved blocks", "solving blocks") and next(passed) == after:
                raise error

    return track


def interrupted(verb, source: Path, out: Path, after: int = 1, error: type[BaseException] = Stopped, **given: Any) -> None:
    with pytest.raises(error):
        verb(source, out=out, track=stopping(after, error), **given)
    assert not out.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != checkpoint.REPORT}


def said(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / checkpoint.REPORT).read_text())
    return {name: value for name, value in report.items() if name not in OF_ONE_RUN}


def kept(out: Path) -> list[str]:
    """Which blocks are there to go on from."""
    partial = out.parent / f".{out.name}.partial"
    assert not partial.exists() or {path.name for path in partial.iterdir()} - {"rotation"} == {"blocks", "key", "lock"}
    return [file.name.split("-")[0] for file in sorted(partial.glob("blocks/*"))]


CASES: dict[str, tuple[str, str, torch.dtype, dict[str, Any]]] = {
    "fast": ("quantize", "llama", torch.bfloat16, SMALL | {"bits": 3, "effort": "fast"}),
    "default": ("quantize", "llama", torch.float32, SMALL | {"bits": 3}),
    "best": ("quantize", "llama", torch.float32, SMALL | {"bits": 2, "effort": "best", "samples": 8}),
    "asymmetric gptq": ("quantize", "llama", torch.bfloat16, SMALL | {"symmetric": False, "format": "gptq"}),
    "dense in float16": ("quantize", "llama", torch.float16, SMALL | {"bits": 3, "format": "dense"}),
    "nvfp4": ("quantize", "llama", torch.float32, GIVEN | {"grid": "nvfp4"}),
    "rtn": ("quantize", "llama", torch.float32, {"bits": 4, "group_size": 64, "method": "rtn"}),
    "rotated": ("quantize", "llama", torch.float32, SMALL | {"bits": 3, "rotate": True}),
    "transposed": ("quantize", "gpt2", torch.float32, SMALL | {"bits": 3, "effort": "fast", "format": "dense"}),
    "experts": ("quantize", "mixtral", torch.float32, SMALL | {"bits": 3}),
    "alps": ("prune", "gpt2", torch.bfloat16, GIVEN | {"sparsity": 0.6}),
    "alps on a grid": ("prune", "llama", torch.float32, SMALL | {"pattern": "2:4", "bits": 4}),
    "sparse": ("prune", "llama", torch.float16, GIVEN | {"sparsity": 0.5, "format": "sparse", "method": "sparsegpt"}),
    "dense on a grid": ("prune", "llama", torch.float16, SMALL | {"bits": 4, "format": "dense", "method": "wanda"}),
}
FAST = ("fast", "default", "dense in float16", "rtn", "alps")  # the others are like these in all but the format


class Helps:
    """A judgement that a rotation helps."""

    helps = True

    def __str__(self) -> str:
        return "Rotated."


@pytest.mark.parametrize("case", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in CASES])
def test_going_on_ends_with_the_same_bytes_and_the_same_report(case, sources, calib, tmp_path, monkeypatch):
    name, family, dtype, given = CASES[case]
    verb, source, out = getattr(compress, name), sources(family, dtype), tmp_path / "out"
    if given.get("method") != "rtn":
        given = given | {"calib": calib}
    monkeypatch.setattr(pipeline, "judge", lambda *_: Helps())
    monkeypatch.setattr(sequential, "TOKENS_AT_A_TIME", 144)  # several batches
    whole = verb(source, out=tmp_path / "whole", **given)
    for after in (1, 2):
        interrupted(verb, source, out, after, **given)
        assert kept(out) == [f"{number:05d}" for number in range(after)]
    report = verb(source, out=out, **given)
    assert (whole.resumed_blocks, report.resumed_blocks) == (0, 2)
    assert contents(out) == contents(tmp_path / "whole")
    assert said(out) == said(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("first", [True, False])
def test_a_rotation_is_decided_once_for_all_blocks(first, sources, calib, tmp_path, monkeypatch):
    """A judgement that comes out otherwise when the run goes on, by rounding, would mix rotated blocks with others."""
    given = SMALL | {"bits": 4, "rotate": True, "calib": calib, "samples": 4, "effort": "fast"}
    source, judged = sources(dtype=torch.float32), iter([first, not first])

    def judge(*_):
        answer = Helps()
        answer.helps = next(judged)
        return answer

    monkeypatch.setattr(pipeline, "judge", judge)
    interrupted(compress.quantize, source, tmp_path / "out", 1, **given)
    assert compress.quantize(source, out=tmp_path / "out", **given).resumed_blocks == 1
    assert next(judged) is not first
    judged = iter([first])
    compress.quantize(source, out=tmp_path / "whole", **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def left(sources, calib, tmp_path) -> tuple[Path, Path, dict[str, Any]]:
    """A run that was interrupted after two blocks of three: its model, OUT and arguments."""
    source, given = sources(dtype=torch.bfloat16), SMALL | {"bits": 3, "effort": "fast", "samples": 4, "calib": calib}
    interrupted(compress.quantize, source, tmp_path / "out", 2, **given)
    return source, tmp_path / "out", given


def whole(source: Path, out: Path, **given: Any) -> dict[str, bytes]:
    """What a run makes that nothing interrupts."""
    compress.quantize(source, out=out.with_name("whole"), **given)
    return contents(out.with_name("whole"))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file: Path) -> None:
    good = file.read_bytes()
    file.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])


@pytest.mark.parametrize("damage", [empty, truncated, flipped, Path.unlink])
def test_a_block_that_is_not_whole_is_solved_again_with_all_after_it(left, damage):
    source, out, given = left
    damage(min((out.parent / ".out.partial" / "blocks").iterdir()))
    report = compress.quantize(source, out=out, **given)
    assert report.resumed_blocks == 0
    assert contents(out) == whole(source, out, **given)


def test_blocks_of_an_earlier_run_do_not_count_among_those_that_the_bar_times(left):
    source, out, given = left
    seen: list[tuple[str, int, int]] = []

    def track(steps: Iterable[Any], total: int, name: str) -> Iterator[Any]:
        taken = list(steps)
        yield from taken
        seen.append((name, total, len(taken)))

    resumed = compress.quantize(source, out=out, track=track, eval=True, **given).resumed_blocks
    bars = [one for one in seen if "blocks" in one[0]]
    assert bars == [("reading solved blocks", resumed, resumed), ("solving blocks", 3 - resumed, 3 - resumed)]
    evaluated = [one for one in seen if "perplexity" in one[0]]
    assert [name for name, _, _ in evaluated] == ["perplexity before", "perplexity after"]
    assert all(total == passed > 0 for _, total, passed in evaluated)


def test_the_blocks_before_one_that_is_not_whole_are_used(left):
    source, out, given = left
    truncated(sorted((out.parent / ".out.partial" / "blocks").iterdir())[1])
    assert compress.quantize(source, out=out, **given).resumed_blocks == 1
    assert contents(out) == whole(source, out, **given)


@pytest.mark.parametrize("other", [{"bits": 4}, {"damping": 0.02}, {"skip": ["2.*down"]}, {"samples": 5}])
def test_another_command_starts_anew(left, other):
    source, out, given = left
    report = compress.quantize(source, out=out, **(given | other))
    assert report.resumed_blocks == 0
    assert contents(out) == whole(source, out, **(given | other))
    assert not list(out.parent.glob(".*"))


def test_what_changes_nothing_in_the_blocks_is_no_other_command(left):
    source, out, given = left
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert compress.quantize(source, out=out, overwrite=True, **given).resumed_blocks == 2


def test_a_key_names_all_that_blocks_depend_on(sources, tmp_path, monkeypatch):
    source = shutil.copytree(sources(), tmp_path / "model")
    settings = sequential.Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
    inputs = tiny.inputs("llama")

    def key(inputs=inputs, settings=settings, *others: object) -> str:
        return resume.key(checkpoint.index(source), inputs, settings, *others)

    others = ({"quantizer": "rtn"}, {"stored": torch.float16}, {"options": Options(damping=0.1)})
    keys = [key(), key(), key({"input_ids": inputs["input_ids"] + 1}), key(None), key(inputs, settings, "more")]
    keys += [key(inputs, replace(settings, **other)) for other in others]
    monkeypatch.setattr(resume.fingerprint, "solving", lambda: "other code")
    keys.append(key())
    monkeypatch.undo()
    os.utime(source / "model.safetensors", ns=(1, 1))
    keys.append(key())
    (source / "config.json").write_text("{}")
    keys.append(key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_of_finished_blocks_nothing_is_solved_or_run_backward(sources, calib, tmp_path, monkeypatch):
    source, out, given = sources(), tmp_path / "out", SMALL | {"bits": 3, "effort": "best", "calib": calib}
    given |= {"skip": ["attn", "gate", "up_"]}
    monkeypatch.setattr(Weighing, "_fitting", lambda _self, _blocks: 1)
    interrupted(compress.quantize, source, out, 2, **given)
    solve, moments = solvers.solve, weighing.gradients.output_moments
    calls: dict[str, list[int]] = {"solved": [], "weighed": []}

    def solving(W, *rest):
        calls["solved"].append(len(W))
        return solve(W, *rest)

    def weighing_of(model, layers, *rest):
        calls["weighed"].append(len(layers))
        return moments(model, layers, *rest)

    monkeypatch.setattr(solvers, "solve", solving)
    monkeypatch.setattr(weighing.gradients, "output_moments", weighing_of)
    assert compress.quantize(source, out=out, **given).resumed_blocks == 2
    assert calls == {"solved": [64], "weighed": [1]}


def test_how_blocks_are_wired_is_seen_in_the_first_one_as_it_was(sources, calib, tmp_path, monkeypatch):
    source, given = sources(), SMALL | {"effort": "fast", "samples": 4, "calib": calib}
    seen: list[dict[str, torch.Tensor]] = []
    wiring_of = sequential.wiring_of

    def spy(block, *rest, **named):
        seen.append({name: weight.clone() for name, weight in block.state_dict().items()})
        return wiring_of(block, *rest, **named)

    monkeypatch.setattr(sequential, "wiring_of", spy)
    interrupted(compress.quantize, source, tmp_path / "out", **given)
    compress.quantize(source, out=tmp_path / "out", **given)
    first, again = seen
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_that_only_lacks_its_end_runs_no_block(left, monkeypatch):
    source, out, given = left

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_shards", full)
    with pytest.raises(CompressError, match=r"No space left on device.* 3 of 3 blocks, is kept in .*\.out\.partial \(.* MB\)"):
        compress.quantize(source, out=out, **given)
    assert len(kept(out)) == 3
    monkeypatch.undo()
    monkeypatch.setattr(sequential, "walk", lambda *_: pytest.fail("a block was run"))
    assert compress.quantize(source, out=out, **given).resumed_blocks == 3
    monkeypatch.undo()
    assert contents(out) == whole(source, out, **given)


def test_a_disk_that_is_full_after_some_blocks(sources, calib, tmp_path, monkeypatch):
    source, out, given = sources(), tmp_path / "out", SMALL | {"effort": "fast", "calib": calib}
    save, left = checkpoint.save_file, 2

    def filling(tensors, file, *rest):
        nonlocal left
        left -= 1
        if left < 0:
            file.write_bytes(b"half a")
            raise OSError(28, "No space left on device")
        save(tensors, file, *rest)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(CompressError, match=r"Cannot write .*out: .*No space left on device.*What was solved, 2 of 3 blocks"):
        compress.quantize(source, out=out, **given)
    assert kept(out) == ["00000", "00001"]
    monkeypatch.undo()
    assert compress.quantize(source, out=out, **given).resumed_blocks == 2


def test_blocks_that_are_there_need_no_space_again(sources, tmp_path, monkeypatch):
    with ResumableWriter(sources(), tmp_path / "out") as writer:
        writer.begin("key", 3)
        writer.block(0, {"x": torch.ones(1000)})
        there = writer.blocks[0].stat().st_size
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 5000 + 30 - there))
        writer.check_space(5000, beside=30)
        with pytest.raises(CompressError, match="GB free"):
            writer.check_space(5000, beside=31)


def test_nothing_stays_where_no_block_is_done(sources, tmp_path):
    with pytest.raises(Stopped):
        end_after(0, Stopped(), sources(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        pytest.param(compress.prune, GIVEN | {"finetune": 1, "sparsity": 0.5}, marks=pytest.mark.slow),
        (compress.prune, GIVEN | {"method": "obert", "samples": 4, "recompute": 1}),
        (compress.prune, {"pattern": "row", "method": "magnitude"}),
    ],
)
def test_nothing_stays_of_work_on_the_whole_model_or_on_rows(verb, given, sources, calib, tmp_path):
    interrupted(verb, sources(), tmp_path / "out", 2, **given, **({"calib": calib} if "samples" in given else {}))
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_a_copy_of_a_library(sources, tmp_path, monkeypatch):
    source, out = sources(), tmp_path / "out"
    model = models.load(source)
    solved = [*pipeline.layer_wise(*uncalibrated(model))]
    monkeypatch.setattr(api, "_library", lambda *_: Library(tmp_path))
    monkeypatch.setattr(api, "assembled", lambda *_: iter(solved))
    plan = uncalibrated(model)[1]
    interrupted(compress.quantize, source, out, 2, plan=plan, method="rtn")
    assert not list(tmp_path.iterdir())


def uncalibrated(model) -> tuple[opening.Dense, Plan, sequential.Settings]:
    anatomy = models.anatomy(model)
    opened = opening.Dense({}, {}, model, anatomy, None, {})
    settings = sequential.Settings("rtn", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
    return opened, Plan.uniform(anatomy.in_features, Scheme(4, 32)), settings


def test_a_run_that_is_refused_leaves_what_another_has_kept(left):
    source, out, given = left
    before = kept(out)
    with pytest.raises(CompressError, match="nowhere"):
        compress.quantize(source, out=out, **(given | {"calib": out.parent / "nowhere.txt"}))
    assert kept(out) == before == ["00000", "00001"]
    compress.prune(source, out=out, pattern="row", method="magnitude")
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("writer", [Writer, ResumableWriter])
def test_two_runs_do_not_write_one_folder(writer, sources, tmp_path):
    out = tmp_path / "out"
    with ResumableWriter(sources(), out) as first:
        first.begin("key", 2)
        first.block(0, {"x": torch.ones(2)})
        with pytest.raises(CompressError, match=r"Another run is writing .*out\. Wait"), writer(sources(), out):
            pytest.fail("two runs at once")
        assert len(first.blocks) == 1
        with writer(sources(), tmp_path / "elsewhere"):
            pass
    with ResumableWriter(sources(), out) as second:
        assert len(second.begin("key", 2)) == 1


def test_a_lock_that_its_run_removes_meanwhile_is_none(sources, tmp_path, monkeypatch):
    out, flock = tmp_path / "out", checkpoint.fcntl.flock
    removals = iter([True])

    def late(*given):
        for _ in removals:  # the run that had it ends just now
            shutil.rmtree(tmp_path / ".out.partial")
        return flock(*given)

    monkeypatch.setattr(checkpoint.fcntl, "flock", late)
    with Writer(sources(), out), pytest.raises(CompressError, match="Another run"), Writer(sources(), out):
        pytest.fail("two runs at once")


def end_after(blocks: int, error: BaseException, source: Path, out: Path) -> None:
    with ResumableWriter(source, out) as writer:
        writer.begin("key", 3)
        for number in range(blocks):
            writer.block(number, {"x": torch.ones(2)})
        raise error


SENTENCE = r"What was solved, 1 of 3 blocks, is kept in .*\.out\.partial \(.* MB\); the same command goes on from there\."


@pytest.mark.parametrize(("error", "before"), [(CompressError("It is so."), "It is so. "), (KeyboardInterrupt(), "")])
def test_people_are_told_what_is_kept(error, before, sources, tmp_path):
    with pytest.raises(type(error)) as raised:
        end_after(1, error, sources(), tmp_path / "out")
    assert re.fullmatch(before + SENTENCE, str(raised.value))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_other_errors_end_with_a_note(sources, tmp_path):
    with pytest.raises(MemoryError, match="too much") as raised:
        end_after(1, MemoryError("too much"), sources(), tmp_path / "out")
    assert re.fullmatch(SENTENCE, *raised.value.__notes__)


def test_going_on_is_said(left, caplog):
    source, out, given = left
    compress.quantize(source, out=out, **given)
    (record,) = caplog.records
    assert record.getMessage() == f"Going on after 2 of 3 blocks, which an earlier run left in {out.parent / '.out.partial'}."


SOLVED = {
    "quantized": (LayerSpec(Scheme(3, 16, False)), random_qtensor(Scheme(3, 16, False), (8, 32))),
    "float": (LayerSpec(Scheme.of("nvfp4")), random_qtensor(Scheme.of("nvfp4"), (8, 32))),
    "pruned": (LayerSpec(None, Sparsity(0.5)), Pruned(torch.tensor([[-0.0, 1.5], [0.0, -2.0]]).half().repeat(4, 16))),
}
HELD = [(name, format_) for name in SOLVED for format_ in (*FORMATS, "sparse") if (name, format_) != ("float", "gptq")]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize(("name", "format_"), HELD)
def test_a_layer_is_read_as_it_was_solved(name, format_, kind, tmp_path):
    spec, solved = SOLVED[name]
    layer = Layer("block.layer", kind, 8, 32)
    shape = {"linear": (8, 32), "conv1d": (32, 8), "conv2d": (8, 8, 2, 2)}[kind]
    stored = {"model.block.layer.weight": TensorInfo("F16", shape, tmp_path, 0, 512)}
    target = Target(stored, {layer.name: "model.block.layer.weight"}, format_, torch.float16)
    blocks = Blocks(target, Anatomy(("block",), (layer,), {}), Plan({layer.name: spec}))
    one = SolvedLayer(layer, replace(solved, notes=("a note",)), spec, 0.1, math.inf)
    block = SolvedBlock("block", (one,))
    tensors, about = blocks.content(block, blocks.encoded(block))
    save_file(tensors, tmp_path / "block", about)
    assert blocks.beside_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("solved."))
    (read,) = blocks.readers([tmp_path / "block"])
    (again,) = read().layers
    assert replace(again, solved=one.solved) == one
    for part, value in vars(one.solved).items():
        other = getattr(again.solved, part)
        if isinstance(value, torch.Tensor):
            assert other.dtype == value.dtype
            assert torch.equal(other.view(torch.uint8), value.view(torch.uint8))
        else:
            assert other == value
