"""Benches: drawn, measured, written, read, and gone on with after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from compress import checkpoint, models
from compress.errors import CompressError
from compress.mixed.budget import Target
from compress.mixed.measure import Swaps
from compress.mixed.search import Source
from compress.progress import silent
from compress.proxies import bench, measuring
from compress.proxies.bench import Bench
from compress.proxies.measuring import Wanted, measured
from compress.proxies.sampling import TOLERANCE, stratified
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme
from tests import tiny

OPTIONS = tuple(LayerSpec(Scheme(bits, 32)) for bits in (2, 3, 4))
SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
ARRAYS = ("choices", "bands", "average_bits", "losses")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tiny.save("llama", tmp_path_factory.mktemp("model"))
    model, stored = models.load(folder), checkpoint.index(folder)
    anatomy = models.anatomy(model)
    target = Target(stored, models.weight_names(model, anatomy.in_features, stored), "compressed-tensors", torch.float32)
    inputs = tiny.inputs("llama", samples=8, length=16)["input_ids"]
    return Source(model, anatomy, {"input_ids": inputs[:4]}, {"input_ids": inputs[4:]}, target)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> Wanted:
    return Wanted(OPTIONS, tmp_path_factory.mktemp("library"), configurations=20, bands=4)


@pytest.fixture(scope="module")
def whole(source, wanted, tmp_path_factory) -> tuple[Bench, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return measured(source, SETTINGS, "tiny", wanted, folder, silent), folder / "tiny.parquet"


def same(one: Bench, other: Bench) -> bool:
    s, t = one.statistics, other.statistics
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
        and (one.key, one.units, one.options, s.layers) == (other.key, other.units, other.options, t.layers)
        and all(np.array_equal(s.tensors[name], t.tensors[name]) for name in s.tensors)
        and all(np.array_equal(s.totals[name], t.totals[name]) for name in s.totals)
        and np.array_equal(s.bits, t.bits)
        and np.array_equal(s.unit_of, t.unit_of)
    )


@pytest.mark.parametrize("seed", range(3))
def test_configurations_are_different_and_of_one_size_in_a_band(seed):
    weights = np.random.default_rng(seed).integers(1, 20, 25).astype(float)
    costs = weights[:, None] * np.array([2.0, 3.0, 4.0, 8.0])
    choices, bands = stratified(costs, 5, 8, np.random.default_rng(seed))
    assert len({tuple(one) for one in choices.tolist()}) == 40
    assert np.bincount(bands).tolist() == [8] * 5
    average = costs[np.arange(25), choices].sum(1) / weights.sum()
    for band, target in enumerate((3, 4, 5, 6, 7)):
        assert np.abs(average[bands == band] - target).max() <= TOLERANCE * 6 * 1.0001
    again, _ = stratified(costs, 5, 8, np.random.default_rng(seed))
    assert np.array_equal(choices, again)
    spread = [np.bincount(one, minlength=4).max() for one in choices]
    assert min(spread) < 12 < 15 < max(spread), "some nearly uniform, others of all options"


def test_too_few_configurations_are_refused():
    with pytest.raises(CompressError, match="Fewer than 50 different"):
        stratified(np.array([[2.0, 3.0], [2.0, 3.0]]), 1, 50, np.random.default_rng(0))
    with pytest.raises(CompressError, match="same size"):
        stratified(np.array([[2.0, 2.0]]), 1, 5, np.random.default_rng(0))


def test_losses_are_those_of_the_assembled_models(source, wanted, whole):
    found, _ = whole
    assert len(found.losses) == 20
    from compress.mixed.library import Library
    from compress.mixed.units import space

    choices = space(source.anatomy, OPTIONS)
    assert found.units == tuple(unit.name for unit in choices.units)
    swaps = Swaps(source.model, source.anatomy, source.judged, Library(wanted.library / found.key), SETTINGS)
    for number in (0, 7, 19):
        assert found.losses[number] == pytest.approx(swaps.loss(choices.specs(found.choices[number].tolist())), rel=1e-4)
    assert np.corrcoef(found.average_bits, np.log(found.losses))[0, 1] < -0.5


def test_a_bench_is_read_as_it_was_written(whole):
    found, path = whole
    assert same(bench.load(path), found)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.parquet"], "no journal is left"


def test_it_is_read_where_it_is_there(source, wanted, whole, monkeypatch):
    found, path = whole
    monkeypatch.setattr(measuring, "Swaps", None)
    assert same(measured(source, SETTINGS, "tiny", wanted, path.parent, silent), found)


@pytest.mark.parametrize("cut", ["", "0.25", '0.1"'])
def test_an_interrupted_run_goes_on(source, wanted, whole, tmp_path, monkeypatch, cut):
    found, _ = whole

    def stopping(steps, _total, name):
        for number, step in enumerate(steps):
            if name == "measuring configurations" and number == 9:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        measured(source, SETTINGS, "tiny", wanted, tmp_path, stopping)
    journal = tmp_path / ".tiny.journal"
    with journal.open("a") as stream:
        stream.write(cut)  # a line that was not finished
    asked = []
    loss = Swaps.loss
    monkeypatch.setattr(Swaps, "loss", lambda self, specs: asked.append(1) or loss(self, specs))
    assert same(measured(source, SETTINGS, "tiny", wanted, tmp_path, silent), found)
    assert len(asked) == 11


def test_a_journal_of_something_else_does_not_count(source, wanted, whole, tmp_path):
    (tmp_path / ".tiny.journal").write_text(json.dumps("other") + "\n" + "7.0\n" * 20)
    assert same(measured(source, SETTINGS, "tiny", wanted, tmp_path, silent), whole[0])


def test_a_bench_of_another_model_is_refused(source, wanted, whole):
    _, path = whole
    other = replace(source, inputs={"input_ids": source.inputs["input_ids"][:2]})
    with pytest.raises(CompressError, match=r"bench of another model.*Choose another -o"):
        measured(other, SETTINGS, "tiny", wanted, path.parent, silent)
    with pytest.raises(CompressError, match=r"20 configurations of int2 g32.* by seed 0; wanted are 40"):
        measured(source, SETTINGS, "tiny", replace(wanted, configurations=40), path.parent, silent)


def test_a_bench_that_was_changed_is_refused(whole, tmp_path):
    found, path = whole
    table = pq.read_table(path)
    losses = table["loss"].to_pylist()
    losses[3] = 0.0
    changed = table.set_column(table.schema.get_field_index("loss"), "loss", [losses])
    pq.write_table(changed.cast(table.schema).replace_schema_metadata(table.schema.metadata), tmp_path / "a.parquet")
    with pytest.raises(CompressError, match="was changed since"):
        bench.load(tmp_path / "a.parquet")
    header = json.loads(table.schema.metadata[bench.HEADER])
    old = table.replace_schema_metadata({bench.HEADER: json.dumps({**header, "version": 0})})
    pq.write_table(old, tmp_path / "b.parquet")
    with pytest.raises(CompressError, match="version 0; this program reads 1"):
        bench.load(tmp_path / "b.parquet")
    assert found.about["seed"] == 0


def test_what_is_no_bench_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    pq.write_table(__import__("pyarrow").table({"a": [1]}), tmp_path / "y.parquet")
    for name in ("x", "y", "absent"):
        with pytest.raises(CompressError, match="is no bench"):
            bench.load(tmp_path / f"{name}.parquet")


def test_benches_that_rank_nothing_are_refused(whole):
    found, _ = whole
    with pytest.raises(CompressError, match="has 5 configurations; at least 20"):
        replace(found, **{name: getattr(found, name)[:5] for name in ARRAYS}).check()
    with pytest.raises(CompressError, match="same configuration twice"):
        replace(found, choices=np.vstack([found.choices[:19], found.choices[:1]])).check()
    with pytest.raises(CompressError, match="the same loss"):
        replace(found, losses=np.ones(20)).check()
    with pytest.raises(CompressError, match="infinite or NaN"):
        replace(found, losses=np.array([np.inf, *found.losses[1:]])).check()
