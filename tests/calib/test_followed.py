"""What calibration follows is what the model computes: no stale keys and values, no block that runs twice, no layer unseen."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import compress
from compress import experts, models, sequential
from compress.calib import capture
from compress.calib.capture import Call
from compress.errors import CompressError
from compress.weight_reads import read_by_parents
from tests import tiny

FAMILIES = ["qwen2_5_vl", "gemma3_vl"]
GIVEN = {"samples": 16, "seq_len": 24}
FOUR_BITS = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_use_the_keys_and_values_of_the_weights_as_they_are(family):
    model, inputs = tiny.build(family), tiny.inputs(family)  # which makes a cache, as its config says
    blocks = models.anatomy(model).blocks
    chain = capture.record(model, blocks, [inputs])
    call, block = chain.calls[0][0], model.get_submodule(blocks[0])

    def replayed() -> torch.Tensor:
        with torch.no_grad():
            return capture.replay(block, chain.hidden[0], call, torch.device("cpu"), torch.float32)

    first, again = replayed(), replayed()
    assert torch.equal(first, again)
    with torch.no_grad():
        block.self_attn.v_proj.weight.zero_()
    assert (replayed() - first).norm() > 1e-3 * first.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_language_models_are_calibrated_on_text(family, tmp_path):
    source, data = tiny.save(family, tmp_path / "source"), tiny.calibration(family, tmp_path / "data")
    report = compress.quantize(source, out=tmp_path / "out", calib=data, **FOUR_BITS, **GIVEN)
    assert all(layer.output_error is not None and layer.output_error < 0.05 for layer in report.layers)
    assert {note for layer in report.fallbacks for note in layer.notes} <= {sequential.INPUTS_ALONE}


def test_loading_turns_every_cache_off(tmp_path):
    config = models.load(tiny.save("gemma3_vl", tmp_path / "source")).config
    assert config.use_cache is config.text_config.use_cache is False


def test_a_cache_in_a_call_is_a_mistake():
    with pytest.raises(AssertionError, match="cache"):
        Call((), {"past_key_values": DynamicCache()})


def test_blocks_that_run_more_than_once_are_refused_where_calibration_would_follow_them(tmp_path):
    source, data = tiny.save("albert", tmp_path / "source"), tiny.calibration("albert", tmp_path / "data")
    with pytest.raises(CompressError, match=r"AlbertForMaskedLM runs albert\.encoder\.albert_layer_groups\.0 more than once"):
        compress.quantize(source, out=tmp_path / "out", calib=data, **FOUR_BITS, **GIVEN)
    assert compress.quantize(source, out=tmp_path / "out", method="rtn", **FOUR_BITS).layers


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_that_reads_weights_instead_of_calling_layers_runs_packed(method, tmp_path):
    source, data = tiny.save("mamba", tmp_path / "source"), tiny.calibration("mamba", tmp_path / "data")
    calibrated = {"calib": data, **GIVEN} if method == "gptq" else {}
    out, ids = tmp_path / "out", tiny.inputs("mamba")["input_ids"]
    report = compress.quantize(source, out=out, method=method, bits=8, group_size=32, **calibrated)
    folders = ((AutoModelForCausalLM.from_pretrained, source), (compress.load, out), (AutoModelForCausalLM.from_pretrained, out))
    with torch.no_grad():
        dense, packed, stock = (load(folder)(ids).logits for load, folder in folders)
    assert (packed - dense).norm() < 0.1 * dense.norm()
    torch.testing.assert_close(packed, stock, rtol=1e-3, atol=1e-3)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"in_proj"}
    assert "read by the module around it" in report.dense["backbone.layers.0.mixer.dt_proj"]


def test_layers_whose_weight_is_read_are_found_by_name():
    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(2, 2) for _ in range(3))
            self.b.weight.data.zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(x) @ self.a.weight

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()

        def _init_weights(self) -> None:
            torch.nn.init.zeros_(self.mixer.b.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mixer(x).to(self.mixer.c.weight.dtype)

    layers = ["0.mixer.a", "0.mixer.b", "0.mixer.c"]
    assert list(read_by_parents(torch.nn.Sequential(Block()), layers)) == ["0.mixer.a", "0.mixer.c"]
    assert list(read_by_parents(tiny.build("bloom"), models.anatomy(tiny.build("bloom")).in_features)) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_a_packed_layer_still_gives_its_weight_to_who_reads_it(family, tmp_path):
    """As folders of other tools need, which pack such layers, too."""
    source, out = tiny.save(family, tmp_path / "source"), tmp_path / "out"
    compress.quantize(source, out=out, method="rtn", bits=8, group_size=-1)
    packed, dense = compress.load(out, dtype="float32"), models.load(source)
    for name in models.anatomy(dense).in_features:
        weight, expected = packed.get_submodule(name).weight, dense.get_submodule(name).weight
        assert weight.shape == expected.shape
        assert weight.dtype == torch.float32
        assert (weight - expected).abs().max() < 0.01 * expected.abs().max()
    name = next(iter(models.anatomy(dense).in_features))
    assert packed.to(torch.bfloat16).get_submodule(name).weight.dtype == torch.bfloat16


def test_routers_beside_experts_of_any_kind_are_found():
    """A matrix with a row for every expert, however deep it lies."""

    class Stacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(6, 4, 8))

    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wg = torch.nn.Linear(8, 6)

    block = torch.nn.ModuleDict(
        {"experts": Stacked(), "gate": Gate(), "router": torch.nn.Linear(8, 6), "shared": torch.nn.Linear(8, 12)}
    )
    assert list(experts.routers(torch.nn.ModuleDict({"mlp": block}))) == ["mlp.gate.wg", "mlp.router"]
    assert list(experts.routers(block)) == ["gate.wg", "router"]


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_image_models_stored_in_16_bits(family, tmp_path):
    source, data = tiny.save(family, tmp_path / "source", torch.bfloat16), tiny.calibration(family, tmp_path / "data")
    given = {"calib": data, "samples": 16, "format": "dense"}
    report = compress.quantize(source, out=tmp_path / "out", bits=8, group_size=-1, **given)
    assert all(layer.output_error is not None and layer.output_error < 0.01 for layer in report.layers)
    pruned = compress.prune(source, out=tmp_path / "pruned", sparsity=0.5, method="obert", calib=data, samples=16)
    assert pruned.zeros[0] > 0
