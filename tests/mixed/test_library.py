"""Solved layers on disk: what an entry is, what names it, and what happens when work stops half way."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compress import checkpoint, experts, models, sequential
from compress.errors import CompressError
from compress.mixed import library
from compress.mixed.library import Library, assembled, complete, fill, key
from compress.mixed.units import space
from compress.models import Layer
from compress.qtensor import Pruned, QTensor, dense
from compress.solvers import solve
from compress.solvers.rtn import output_error
from compress.spec import LayerSpec, Plan, Scheme, Sparsity
from tests import tiny
from tests.mixed import searched
from tests.mixed.searched import OPTIONS, opened

ALL = (
    LayerSpec(Scheme(4, 32)),
    LayerSpec(Scheme(3, 16, False)),
    LayerSpec(None, Sparsity(0.5)),
    LayerSpec(None, Sparsity.of("2:4", None)),
    LayerSpec(Scheme(4, 32), Sparsity(0.5)),
)
SETTINGS = searched.settings()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    there = opened("llama", tmp_path_factory.mktemp("llama"))
    there.space(ALL)
    return there


def test_entries_are_what_solving_against_the_dense_hessians_gives(llama):
    seen = 0
    for layer, W, stats in sequential.dense_stats(llama.model, llama.anatomy, llama.inputs, llama.settings):
        for spec in ALL:
            solved, entry = llama.library.solved(layer, spec), llama.library.entry(layer.name, spec)
            if spec.sparsity and spec.sparsity.nm:  # solved with the others of its input, whose steps it shares
                direct = replace(solved)
                assert (dense(solved).view(-1, 4) == 0).sum(1).min() >= 2
            else:
                direct = solve(W, stats, spec, torch.float32, llama.settings.options)
            torch.testing.assert_close(dense(solved), dense(direct), rtol=1e-3, atol=1e-4)
            if isinstance(solved, QTensor):
                assert torch.equal(solved.codes, direct.codes)
                assert torch.equal(solved.zeros, direct.zeros)
            E = W - dense(direct)
            assert entry.weight_error == pytest.approx(E.square().sum().item(), rel=1e-5)
            assert entry.weight == pytest.approx(W.square().sum().item(), rel=1e-5)
            torch.testing.assert_close(entry.row_errors, output_error(E, stats.H), rtol=1e-3, atol=1e-6)
            assert entry.output == pytest.approx(output_error(W, stats.H).sum().item(), rel=1e-5)
            assert entry.output_error == pytest.approx(entry.row_errors.sum().item() / entry.output)
            assert entry.notes == direct.notes
            seen += 1
    assert seen == 14 * len(ALL)


def test_assembled_blocks_are_the_entries(llama):
    names = [*llama.anatomy.in_features]
    specs = {name: [*ALL, LayerSpec()][i % 6] for i, name in enumerate(names)}
    plan = Plan(
        {
            name: replace(spec, scheme=spec.scheme.fit(llama.anatomy.in_features[name]) if spec.scheme else None)
            for name, spec in specs.items()
        }
    )
    assert complete(llama.library, plan)
    blocks = list(assembled(llama.library, llama.anatomy, plan))
    assert tuple(block.name for block in blocks) == llama.anatomy.blocks
    found = {one.layer.name: one for block in blocks for one in block.layers}
    assert list(found) == plan.changed
    for name, one in found.items():
        entry = llama.library.entry(name, plan.layers[name])
        assert torch.equal(dense(one.solved), dense(llama.library.solved(one.layer, one.spec)))
        assert one.spec == plan.layers[name]
        assert one.output_error == entry.output_error
        assert one.weight_error == pytest.approx(entry.weight_error / entry.weight)


def test_fractions_that_look_alike_are_different_entries(tmp_path):
    there = Library(tmp_path)
    layer, zeros = Layer("a.b", "linear", 2, 8), torch.zeros(2, 8)
    specs = [LayerSpec(None, Sparsity(0.5001)), LayerSpec(None, Sparsity(0.5002)), LayerSpec(None, Sparsity(0.5, "block:1x4"))]
    for number, spec in enumerate(specs):
        there.add(layer, spec, Pruned(zeros + number), zeros, None)
    assert [dense(there.solved(layer, spec))[0, 0].item() for spec in specs] == [0, 1, 2]
    assert there.entry("a.b", specs[0]).output_error is None


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_the_key_is_that_of_the_contents(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    inputs = tiny.inputs("llama", 4)

    def of(folder=source, given=inputs, chosen=SETTINGS):
        return key(checkpoint.index(folder), given, chosen)

    first = of()
    assert of(copied(source, tmp_path / "elsewhere")) == first
    other = tiny.inputs("llama", 4)
    other["input_ids"][3, 0] += 1
    config = copied(source, tmp_path / "config")
    text = (config / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (config / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    weights = copied(source, tmp_path / "weights")
    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (weights / "model.safetensors").write_bytes(raw)
    keys = [
        first,
        of(config),
        of(weights),
        of(given=other),
        of(given={name: value[:3] for name, value in inputs.items()}),
        of(given={**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}),
        of(given={"input_ids": inputs["input_ids"].view(2, -1)}),
        of(chosen=searched.settings(torch.bfloat16)),
        of(chosen=searched.settings(damping=0.02)),
        of(chosen=searched.settings(order="act")),
        of(chosen=replace(searched.settings(), quantizer="rtn")),
        of(chosen=replace(searched.settings(), stored=torch.float16)),
    ]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def counted(monkeypatch):
    """The rows of every solve, by its spec."""
    calls: list[tuple[LayerSpec, int]] = []
    real = library.solve

    def counting(W, stats, spec, *rest):
        calls.append((spec, len(W)))
        return real(W, stats, spec, *rest)

    monkeypatch.setattr(library, "solve", counting)
    return calls


def test_an_interrupted_fill_goes_on_where_it_was(llama, tmp_path, counted):
    there, whole = Library(tmp_path / "solved"), space(llama.anatomy, OPTIONS).wanted
    given = (llama.model, llama.anatomy, llama.inputs)

    def run(wanted=whole):
        return list(fill(there, *given, wanted, llama.settings))

    add, added = Library.add, []

    def failing(self, layer, *rest):
        if len(added) == 9:
            raise KeyboardInterrupt
        added.append(layer.name)
        add(self, layer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = sorted(there.folder.rglob("*"))
    assert sum(file.is_file() for file in before) == 9
    assert all(file.suffix == ".safetensors" for file in before if file.is_file())
    times = {file: file.stat().st_mtime_ns for file in before}
    counted.clear()
    assert run() == list(llama.anatomy.blocks)
    rows = sum(layer.N for layer in llama.anatomy.layers) * len(OPTIONS)
    solved = sum({layer.name: layer.N for layer in llama.anatomy.layers}[name] for name in added)
    assert sum(count for _, count in counted) == rows - solved
    assert {file: file.stat().st_mtime_ns for file in before if file.is_file()} == {f: t for f, t in times.items() if f.is_file()}
    counted.clear()
    assert run() == []
    assert counted == []
    more = {**whole, "model.layers.1.mlp.down_proj": (LayerSpec(Scheme(4, 16)),)}
    run(more)
    assert counted == [(LayerSpec(Scheme(4, 16)), 64)]


def test_dense_options_are_no_entries(llama, tmp_path):
    assert (
        list(
            fill(
                Library(tmp_path),
                llama.model,
                llama.anatomy,
                llama.inputs,
                space(llama.anatomy, [LayerSpec()]).wanted,
                llama.settings,
            )
        )
        == []
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_entry_is_named_with_what_to_do(llama, tmp_path, keep):
    there = Library(copied(llama.library.folder, tmp_path / "copy"))
    layer = llama.anatomy.layers[0]
    file = there.folder / layer.name / "int4-g32.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for read in (lambda: there.entry(layer.name, ALL[0]), lambda: there.solved(layer, ALL[0])):
        with pytest.raises(CompressError, match=r"int4-g32\.safetensors is damaged: .* Delete it and search again"):
            read()


def test_a_folder_that_cannot_be_written_is_named(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="or choose another --library"):
        list(
            fill(
                Library(tmp_path / "file"),
                llama.model,
                llama.anatomy,
                llama.inputs,
                space(llama.anatomy, OPTIONS).wanted,
                llama.settings,
            )
        )


def write_again_and_again(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    layer, W = Layer("layer", "linear", 64, 64), torch.zeros(64, 64)
    for _ in range(40):
        Library(folder).add(layer, LayerSpec(None, Sparsity(0.5)), Pruned(torch.full((64, 64), float(number))), W, None)


def test_two_processes_may_write_one_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_again_and_again, args=(tmp_path, number)) for number in (1, 2)]
    write_again_and_again(tmp_path, 1)
    for writer in writers:
        writer.start()
    layer, spec = Layer("layer", "linear", 64, 64), LayerSpec(None, Sparsity(0.5))
    while any(writer.is_alive() for writer in writers):
        found = dense(Library(tmp_path).solved(layer, spec))
        assert len(found.unique()) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["0.5-unstructured.safetensors"]


def idle_experts(model: PreTrainedModel) -> None:
    """Routers whose scores are all alike: the same two of four experts get all tokens."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            torch.nn.init.zeros_(module.weight)


class Spare(torch.nn.Module):
    """A layer of a block with another one beside it that is never called."""

    def __init__(self, used: torch.nn.Linear) -> None:
        super().__init__()
        self.used, self.spare = used, torch.nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_layers_that_are_never_called_are_rounded_to_nearest_and_say_so(tmp_path):
    model = tiny.build("llama")
    model.model.layers[1].self_attn.o_proj = Spare(model.model.layers[1].self_attn.o_proj)
    anatomy, there = models.anatomy(model), Library(tmp_path)
    wanted = space(anatomy, OPTIONS).wanted
    list(fill(there, model, anatomy, tiny.inputs("llama", 4), wanted, SETTINGS))
    name, spec = "model.layers.1.self_attn.o_proj.spare", OPTIONS[1]
    layer = next(layer for layer in anatomy.layers if layer.name == name)
    W = model.get_submodule(name).weight.detach()
    assert torch.equal(there.solved(layer, spec).codes, solve(W, None, spec, torch.float32, SETTINGS.options).codes)
    assert there.solved(layer, spec).notes == (f"solved without calibration: {sequential.NEVER_CALLED}",)
    assert there.entry(name, spec).output_error is None
    blocks = assembled(there, anatomy, Plan(dict.fromkeys(anatomy.in_features, spec)))
    assert {one.layer.name for block in blocks for one in block.layers if one.solved.notes} == {name}


def test_experts_without_tokens_are_solved_and_say_so(tmp_path):
    model = tiny.build("mixtral")
    experts.split(model, every=True)
    idle_experts(model)
    anatomy, there, spec = models.anatomy(model), Library(tmp_path), OPTIONS[1]
    list(fill(there, model, anatomy, tiny.inputs("mixtral", 4), dict.fromkeys(anatomy.in_features, (spec,)), SETTINGS))
    noted = [layer.name for layer in anatomy.layers if "without calibration" in str(there.entry(layer.name, spec).notes)]
    assert len(noted) == 2 * 2 * 3  # 2 of 4 experts, 3 layers each, 2 blocks
    assert all(".experts." in name for name in noted)
