"""Gradients of single mini-batches against plain autograd, in memory and on disk."""

from __future__ import annotations

import pytest
import torch

from compress import models
from compress.errors import CompressError
from compress.fisher import gradients, losses
from compress.fisher.losses import Draw
from tests import tiny

ALL = 1 << 40


def draw(seed: int = 0, mask_token: int | None = None) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), mask_token)


def collected(family, data, loss, *, keep=None, count=3, batch=2, memory=ALL, spill=None):
    model = tiny.build(family)
    layers = models.anatomy(model).layers
    keep = keep or {layer.name: torch.ones(layer.N, layer.K, dtype=torch.bool) for layer in layers}
    with gradients.collect(
        model, layers, keep, data, losses.LOSSES[loss], draw(), count=count, batch=batch, memory=memory, spill=spill
    ) as found:
        return {name: G.clone() for name, G in found.of.items()}, found.mean_square, model


def data(family: str) -> dict[str, torch.Tensor]:
    found = tiny.inputs(family, samples=8, length=8)
    return found if family == "gpt2" else {**found, "labels": torch.arange(8) % 2}


@pytest.mark.parametrize(("family", "loss"), [("bert", "classification"), ("gpt2", "causal-lm"), ("resnet", "classification")])
def test_each_row_is_the_gradient_of_a_mini_batch(family, loss):
    inputs = data(family)
    found, mean_square, model = collected(family, inputs, loss)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:6]
    total = count = 0
    for row, taken in enumerate(order.split(2)):
        model.zero_grad()
        batch = {name: tensor[taken] for name, tensor in inputs.items()}
        model(**batch, **({"labels": batch["input_ids"]} if loss == "causal-lm" else {})).loss.backward()
        for layer in models.anatomy(model).layers:
            gradient = models.weight_of(model.get_submodule(layer.name)).grad
            gradient = (gradient.t() if layer.kind == "conv1d" else gradient).flatten()
            stored = found[layer.name][row].float()
            torch.testing.assert_close(stored, gradient, rtol=2**-8, atol=1e-6)
            total, count = total + float(gradient.square().sum()), count + len(gradient)
    assert mean_square == pytest.approx(total / count, rel=1e-3)


def test_files_hold_what_memory_does_and_are_gone_afterwards(tmp_path):
    held, _, _ = collected("bert", data("bert"), "classification")
    spilled, _, _ = collected("bert", data("bert"), "classification", memory=0, spill=tmp_path)
    assert held.keys() == spilled.keys()
    assert all(torch.equal(held[name], spilled[name]) for name in held)
    assert list(tmp_path.iterdir()) == []


def test_gradients_really_go_to_the_folder(tmp_path):
    model = tiny.build("bert")
    layers = models.anatomy(model).layers
    keep = {layer.name: torch.ones(layer.N, layer.K, dtype=torch.bool) for layer in layers}
    loss = losses.LOSSES["classification"]
    with gradients.collect(model, layers, keep, data("bert"), loss, draw(), count=2, batch=1, memory=0, spill=tmp_path):
        (folder,) = tmp_path.iterdir()
        sizes = sorted(file.stat().st_size for file in folder.iterdir())
        assert sizes == sorted(2 * 2 * layer.N * layer.K for layer in layers)


def test_pruned_weights_have_no_gradient():
    layers = models.anatomy(tiny.build("bert")).layers
    keep = {layer.name: torch.ones(layer.N, layer.K, dtype=torch.bool) for layer in layers}
    for mask in keep.values():
        mask[::2, 1::3] = False
    masked, mean_square, _ = collected("bert", data("bert"), "classification", keep=keep)
    plain, _, _ = collected("bert", data("bert"), "classification")
    live = sum(int(mask.sum()) for mask in keep.values())
    for name, mask in keep.items():
        assert torch.equal(masked[name], plain[name] * mask.flatten())
    assert mean_square == pytest.approx(sum(float(G.double().square().sum()) for G in masked.values()) / (3 * live), rel=1e-2)


def test_a_folder_that_is_not_there_or_a_full_disk_is_said(tmp_path, monkeypatch):
    with pytest.raises(CompressError, match="there is no such folder"):
        collected("bert", data("bert"), "classification", memory=0, spill=tmp_path / "nowhere")
    monkeypatch.setattr(gradients.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CompressError, match=r"need 0\.\d GB on disk, and .* has 0\.0 GB free"):
        collected("bert", data("bert"), "classification", memory=0, spill=tmp_path)


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny.build("bert")
    model.classifier.bias.data[0] = torch.nan
    layers = models.anatomy(model).layers
    keep = {layer.name: torch.ones(layer.N, layer.K, dtype=torch.bool) for layer in layers}
    context = gradients.collect(model, layers, keep, data("bert"), losses.LOSSES["classification"], draw(), count=2, batch=2)
    with pytest.raises(CompressError, match="The loss is NaN or infinite"), context:
        pass
