"""What the pipeline adds between an opened model and its solved blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress import api, models, pipeline
from compress.calib.data import Calibration
from compress.errors import CompressError
from compress.mixed import weighing
from compress.mixed.weighing import Weighing
from compress.opening import Dense
from compress.progress import silent
from compress.sequential import Settings
from compress.solvers import coupled
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options.of("default"), torch.device("cpu"), torch.float32, torch.float32)


def test_outputs_that_count_together_change_the_result_and_layers_that_stay_dense_need_no_moments(monkeypatch):
    monkeypatch.setattr(coupled, "BLOCKS", 2)
    model = tiny.build("llama")
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    opened = Dense({}, {}, model, anatomy, Calibration(tiny.inputs("llama"), "random"), {})
    plan = Plan.uniform(anatomy.in_features, Scheme(2, 32))
    stays = anatomy.layers[3].name
    plan = replace(plan, layers={**plan.layers, stays: LayerSpec()})
    asked: list[str] = []
    output_moments = weighing.gradients.output_moments

    def spy(model, layers, *rest):
        asked.extend(layer.name for layer in layers)
        return output_moments(model, layers, *rest)

    monkeypatch.setattr(weighing.gradients, "output_moments", spy)
    weighed = replace(opened, weighing=Weighing.of(model, anatomy, opened.inputs, SETTINGS.device, silent))
    apart, together = (
        {one.layer.name: one.solved.codes for block in pipeline.layer_wise(source, plan, SETTINGS) for one in block.layers}
        for source in (opened, weighed)
    )
    assert asked == [layer.name for layer in anatomy.layers if layer.name != stays]
    assert apart.keys() == together.keys() == set(asked)
    assert not any(torch.equal(apart[name], together[name]) for name in asked)


def test_as_many_passes_as_memory_makes_necessary_write_the_same_bytes_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(coupled, "BLOCKS", 2)
    source, calib = tiny.save("llama", tmp_path / "model"), tiny.calibration("llama", tmp_path / "calib")
    given = dict(bits=3, group_size=32, effort="best", samples=8, seq_len=24, calib=calib)
    bars: list[tuple[str, int, int]] = []

    def track(steps, total, name):
        bars.append((name, total, 0))
        at = len(bars) - 1
        for count, step in enumerate(steps):
            bars[at] = (name, total, count + 1)
            yield step

    once = api.quantize(source, out=tmp_path / "once", track=track, **given)
    assert bars == [("solving blocks", 2, 2), ("weighing outputs by the loss", 1, 1)]
    monkeypatch.setattr(Weighing, "_fitting", lambda _self, _blocks: 1)
    twice = api.quantize(source, out=tmp_path / "twice", track=track, **given)
    parts = [(f"weighing outputs by the loss, blocks {i} to {i} of 2", 1, 1) for i in (1, 2)]
    assert bars[2:] == [("solving blocks", 2, 2), *parts]
    assert once.files == twice.files
    assert (tmp_path / "once" / "model.safetensors").read_bytes() == (tmp_path / "twice" / "model.safetensors").read_bytes()
    assert [note for note in twice.warnings if note not in once.warnings] == [
        "Memory did not hold what gradients say about all blocks at once: that took 2 backward passes."
    ]


def test_memory_that_effort_best_lacks_is_missed_before_work_starts(tmp_path, monkeypatch):
    source, calib = tiny.save("llama", tmp_path / "model"), tiny.calibration("llama", tmp_path / "calib")
    monkeypatch.setattr(weighing, "free_memory", lambda _device: 1000)
    monkeypatch.setattr(pipeline, "judge", lambda *_: pytest.fail("work has started"))
    given = dict(bits=4, group_size=32, rotate=True, samples=8, seq_len=24, calib=calib)
    with pytest.raises(CompressError, match=r"--effort best needs .* Use --effort default"):
        api.quantize(source, out=tmp_path / "out", effort="best", **given)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, calib.name}


def test_other_efforts_ask_for_no_memory(tmp_path, monkeypatch):
    source, calib = tiny.save("llama", tmp_path / "model"), tiny.calibration("llama", tmp_path / "calib")
    monkeypatch.setattr(weighing, "free_memory", lambda _device: 1000)
    for effort in ("default", "fast"):
        given = dict(bits=4, group_size=32, samples=8, seq_len=24, calib=calib, effort=effort)
        assert api.quantize(source, out=tmp_path / effort, **given).layers
