"""What the pipeline adds between an opened model and its solved blocks."""

from __future__ import annotations

from dataclasses import replace

import torch

from compress import models, pipeline
from compress.calib.data import Calibration
from compress.pipeline import Dense
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options.of("default"), torch.device("cpu"), torch.float32, torch.float32)


def test_outputs_that_count_together_change_the_result_and_layers_that_stay_dense_need_no_moments(monkeypatch):
    model = tiny.build("llama")
    model.config.use_cache = False
    anatomy = models.anatomy(model)
    opened = Dense({}, {}, model, anatomy, Calibration(tiny.inputs("llama"), "random"), {})
    plan = Plan.uniform(anatomy.in_features, Scheme(2, 32))
    stays = anatomy.layers[3].name
    plan = replace(plan, layers={**plan.layers, stays: LayerSpec()})
    asked: list[str] = []
    output_moments = pipeline.gradients.output_moments

    def spy(model, layers, *rest):
        asked.extend(layer.name for layer in layers)
        return output_moments(model, layers, *rest)

    monkeypatch.setattr(pipeline.gradients, "output_moments", spy)
    coupled = replace(SETTINGS, options=replace(SETTINGS.options, coupled=True))
    apart, together = (
        {one.layer.name: one.solved.codes for block in pipeline.layer_wise(opened, plan, settings) for one in block.layers}
        for settings in (SETTINGS, coupled)
    )
    assert asked == [layer.name for layer in anatomy.layers if layer.name != stays]
    assert apart.keys() == together.keys() == set(asked)
    assert not any(torch.equal(apart[name], together[name]) for name in asked)
