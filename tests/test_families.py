"""Every supported family, from a saved folder through the real transformers class to packed weights and back."""

from __future__ import annotations

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

import compress
from compress import models
from compress.formats import FORMATS
from tests import tiny

CHAINS = {"resnet": ("",), "mobilenet": ("",)}
LEFT_DENSE = {
    "mixtral": {"outside the blocks", "chooses experts"},
    "qwen3_moe": {"outside the blocks", "chooses experts"},
    "resnet": {"output layer"},
    "mobilenet": {"output layer", "grouped convolution"},
    "distilbert": set(),
}


def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(family, samples=2))[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_quantized_and_served_packed_it_equals_its_dense_reference(family, tmp_path):
    source, calib = tiny.save(family, tmp_path / "model"), tiny.calibration(family, tmp_path / "calib")
    arguments = dict(calib=calib, samples=16, seq_len=24, group_size=32)
    packed = compress.quantize(source, out=tmp_path / "packed", **arguments)
    dense = compress.quantize(source, out=tmp_path / "dense", format="dense", **arguments)

    assert [layer.output_error for layer in packed.layers] == [layer.output_error for layer in dense.layers]
    assert all(0 < layer.output_error < 0.05 for layer in packed.layers), packed.layers
    assert set(packed.dense.values()) == LEFT_DENSE.get(family, {"outside the blocks"})
    assert not [layer for layer in packed.fallbacks if "nearest" in str(layer.notes)]

    reference = models.load(tmp_path / "dense")
    served = compress.load(tmp_path / "packed")
    torch.testing.assert_close(logits(served, family), logits(reference, family), rtol=1e-4, atol=1e-4)
    original = logits(models.load(source), family)
    assert not torch.allclose(logits(reference, family), original, atol=1e-5)
    assert packed.size_after < 0.75 * packed.size_before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_and_layers(family):
    model = tiny.build(family)
    anatomy = models.anatomy(model)
    blocks = len(anatomy.blocks)
    assert anatomy.blocks == CHAINS.get(family, anatomy.blocks)
    assert blocks == (1 if family in CHAINS else 6 if family == "gemma3" else 2)
    assert sum(len(anatomy.of_block(block)) for block in anatomy.blocks) == len(anatomy.layers)
    for layer in anatomy.layers:
        module = model.get_submodule(layer.name)
        W = models.matrix(module)
        assert W.shape == (layer.N, layer.K)
        assert torch.equal(models.from_matrix(W, layer.kind, models.weight_of(module).shape), models.weight_of(module))


def test_every_format_is_tried_on_conv1d_which_stores_its_weight_transposed(tmp_path):
    source, calib = tiny.save("gpt2", tmp_path / "model"), tiny.calibration("gpt2", tmp_path / "calib")
    outputs = []
    for name in FORMATS:
        compress.quantize(source, out=tmp_path / name, format=name, calib=calib, samples=16, seq_len=24, bits=8, group_size=32)
        outputs.append(logits(compress.load(tmp_path / name), "gpt2"))
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-2, atol=1e-2)  # gptq stores scales in float16


def test_a_family_that_nothing_here_names_works_by_its_block_list(tmp_path):
    config = StableLmConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=128
    )
    StableLmForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    calib = tiny.calibration("llama", tmp_path / "calib")
    report = compress.quantize(tmp_path / "model", out=tmp_path / "out", calib=calib, samples=16, seq_len=24, group_size=32)
    assert len(report.layers) == 14
    assert report.output_errors[0] < 0.05
    assert logits(compress.load(tmp_path / "out"), "llama").isfinite().all()
