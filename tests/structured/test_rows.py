from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as T  # noqa: N812

from compress import checkpoint, evaluate, models
from compress.calib import data
from compress.checkpoint import Writer
from compress.errors import CompressError
from compress.models import matrix
from compress.sequential import Settings
from compress.solvers.options import Options
from compress.structured import rows
from compress.structured.families import FAMILIES, Part, shrinkage
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
PRUNABLE = [family for family in tiny.FAMILIES if family not in ("bloom", "mixtral", "qwen3_moe", "resnet", "mobilenet")]
WITH_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "vit"]
SIZE = {"opt": "ffn_dim", "gpt2": "n_inner", "distilbert": "hidden_dim"}


def prune(
    source: Path, out: Path, inputs: dict[str, torch.Tensor] | None, fraction: float, method: rows.Method = "obs"
) -> rows.Shrunk:
    model = models.load(source)
    anatomy, stored = models.anatomy(model), checkpoint.index(source)
    config = json.loads((source / "config.json").read_text())
    with Writer(source, out) as writer:
        shrunk = rows.prune_rows(writer, model, anatomy, stored, config, inputs, fraction, SETTINGS, method)
        writer.finish(shrunk.replaced, shrunk.config, {})
        writer.seal("{}")
    return shrunk


def stock(folder: Path, family: str) -> T.PreTrainedModel:
    """The model as transformers alone loads it; missing or surplus weights are errors."""
    model, info = tiny.FAMILIES[family][0].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(family, samples=3))[0]


def save_lively(family: str, folder: Path) -> Path:
    """A model whose blocks and biases matter: fresh ones have small weights and zeros for biases."""
    tiny.save(family, folder)
    model = tiny.build(family)
    with torch.no_grad():
        for layer in models.anatomy(model).layers:
            models.weight_of(model.get_submodule(layer.name)).mul_(4)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return folder


def units_left(old: torch.Tensor, new: torch.Tensor, part: Part) -> torch.Tensor:
    """Which units of a part are left, found by looking for the new rows among the old ones."""
    widths = next(iter(part.makers.values()))
    first = part.units * widths[0]
    kept = (old[:first, None] == new[None, : len(new) * widths[0] // sum(widths)]).all(-1).any(1)
    return kept.view(part.units, -1).all(1)


def zeroed(dense: torch.nn.Module, small: torch.nn.Module, blocks: tuple[str, ...], parts: tuple[Part, ...]) -> None:
    """Make a dense model into what the small one should compute: units that are gone are zeros, their readers are as found."""
    for block in blocks:
        for part in parts:
            maker = f"{block}.{next(iter(part.makers))}"
            kept = units_left(matrix(dense.get_submodule(maker)), matrix(small.get_submodule(maker)), part)
            assert int((~kept).sum()) == part.remove
            for name, widths in part.makers.items():
                module = dense.get_submodule(f"{block}.{name}")
                gone = ~torch.cat([kept.repeat_interleave(width) for width in widths])
                matrix(module)[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
            reader, found = dense.get_submodule(f"{block}.{part.reader}"), small.get_submodule(f"{block}.{part.reader}")
            matrix(reader)[:] = 0
            matrix(reader)[:, kept.repeat_interleave(part.width)] = matrix(found)
            if reader.bias is not None:
                reader.bias.copy_(found.bias)


@pytest.mark.parametrize("family", PRUNABLE)
def test_the_small_model_loads_in_stock_transformers_and_computes_what_the_zeroed_dense_one_does(family, tmp_path):
    source = save_lively(family, tmp_path / "model")
    shrunk = prune(source, tmp_path / "out", tiny.inputs(family), 0.3)
    small, dense = stock(tmp_path / "out", family), stock(source, family)
    original = logits(dense, family)
    with torch.no_grad():
        zeroed(dense, small, models.anatomy(dense).blocks, shrunk.shrinkage.parts)
    torch.testing.assert_close(logits(small, family), logits(dense, family), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(small, family), original, atol=1e-3)

    before, after = dense.config, small.config
    assert getattr(before, SIZE.get(family, "intermediate_size")) == 96
    assert getattr(after, SIZE.get(family, "intermediate_size")) == 96 - 29
    assert after.hidden_size == before.hidden_size
    if family in WITH_HEADS:
        assert after.num_attention_heads < before.num_attention_heads
        assert after.head_dim == 16
        assert shrunk.shrinkage.notes == ()
    else:
        assert after.num_attention_heads == before.num_attention_heads
        assert "attention heads stay" in shrunk.shrinkage.notes[0]
    assert small.num_parameters() < dense.num_parameters()
    assert set(shrunk.replaced) <= checkpoint.index(source).keys()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_report_has_the_shapes_and_the_errors(family, tmp_path):
    source = tiny.save(family, tmp_path / "model")
    shrunk = prune(source, tmp_path / "out", tiny.inputs(family), 0.3)
    small = models.anatomy(models.load(tmp_path / "out")).shapes
    assert {one.layer.name: one.shape for one in shrunk.layers} == {
        one.layer.name: small[one.layer.name] for one in shrunk.layers
    }
    for one in shrunk.layers:
        reads = one.layer.name.endswith(("o_proj", "down_proj", "c_proj"))
        assert (one.output_error is not None) == reads
        assert 0 < one.weight_error < 1
        assert one.output_error is None or 0 < one.output_error < 0.7
        assert one.notes == ()


def test_neurons_are_chosen_on_inputs_that_saw_the_heads_go(tmp_path):
    """The reported error is that of the finished small model against the dense weights on its own inputs."""
    source = tiny.save("phi3", tmp_path / "model")
    shrunk = prune(source, tmp_path / "out", tiny.inputs("phi3"), 0.5)
    dense, small = models.load(source), stock(tmp_path / "out", "phi3")
    made = {}
    mlp = small.model.layers[1].mlp
    with torch.no_grad():
        mlp.register_forward_pre_hook(lambda _module, args: made.setdefault("x", args[0]))
        small(**tiny.inputs("phi3"))
        got = mlp(made["x"]).double()
        expected = dense.model.layers[1].mlp(made["x"]).double()
    error = float((got - expected).square().sum() / expected.square().sum())
    report = {one.layer.name: one for one in shrunk.layers}["model.layers.1.mlp.down_proj"]
    assert report.output_error == pytest.approx(error, rel=1e-3)


def test_a_bias_takes_over_the_mean_of_what_is_gone(tmp_path):
    """With all activations positive the mean is most of them, and only the bias can stand in for the last neurons."""
    model = tiny.build("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.fill_(3.0)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    shrunk = prune(tmp_path / "model", tmp_path / "out", tiny.inputs("opt"), 0.9)
    errors = [one.output_error for one in shrunk.layers if one.layer.name.endswith("fc2")]
    assert max(errors) < 0.05  # 90 % of the neurons are gone


def test_magnitude_needs_no_calibration_and_moves_nothing(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    shrunk = prune(source, tmp_path / "out", None, 0.25, "magnitude")
    dense, small = models.load(source), stock(tmp_path / "out", "llama")
    for old, new in zip(dense.model.layers, small.model.layers, strict=True):
        sizes = old.mlp.down_proj.weight.norm(dim=0)
        kept = sizes.argsort(descending=True)[: 96 - 24].sort().values
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, kept])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[kept])
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
    assert all(one.output_error is None for one in shrunk.layers)
    with pytest.raises(ValueError, match="needs calibration inputs"):
        prune(source, tmp_path / "other", None, 0.25)


def test_the_same_twice_is_the_same_bytes(tmp_path):
    source = tiny.save("qwen2", tmp_path / "model")
    for name in ("one", "two"):
        prune(source, tmp_path / name, tiny.inputs("qwen2"), 0.4)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_stored_in_sixteen_bits_it_stays_in_sixteen_bits(tmp_path):
    source = tiny.save("llama", tmp_path / "model", torch.bfloat16)
    prune(source, tmp_path / "out", tiny.inputs("llama"), 0.5)
    assert {info.dtype for info in checkpoint.index(tmp_path / "out").values()} == {"BF16"}
    assert logits(stock(tmp_path / "out", "llama"), "llama").isfinite().all()


@pytest.mark.parametrize(
    ("family", "fraction", "heads", "note"),
    [
        ("llama", 0.5, 2, None),
        ("llama", 0.25, 4, "attention heads stay: 0.25 of their 2 groups"),
        ("phi3", 0.25, 3, None),
        ("phi3", 0.75, 1, None),
        ("vit", 0.25, 3, None),
        ("mistral", 0.9, 2, None),  # one group stays
        ("bert", 0.25, None, "BertForSequenceClassification makes them hidden_size / heads wide"),
    ],
)
def test_how_many_heads_go(family, fraction, heads, note):
    plan = shrinkage(tiny.build(family), fraction)
    assert plan.config.get("num_attention_heads", 4) == (heads or 4)
    assert len(plan.notes) == (note is not None)
    assert note is None or note in plan.notes[0]


def test_a_number_of_heads_that_the_config_refuses_is_not_chosen():
    """LlamaConfig and Gemma3TextConfig want hidden_size to be a multiple of the number of heads; 64 is none of 3."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**tiny.LLAMA, num_key_value_heads=4))
    plan = shrinkage(model, 0.3)
    assert "num_attention_heads" not in plan.config
    assert plan.notes == ("4 of 4 attention heads stay: LlamaConfig does not accept 3 of them, and nothing in between",)
    assert shrinkage(model, 0.5).config["num_attention_heads"] == 2


def test_families_that_cannot_shrink_are_refused_by_name():
    with pytest.raises(CompressError, match=r"BloomForCausalLM has no neurons or heads that could go: .* 4 x hidden_size"):
        shrinkage(tiny.build("bloom"), 0.5)
    with pytest.raises(CompressError, match=r"Which layers of ResNetForImageClassification .* rows go for llama, mistral"):
        shrinkage(tiny.build("resnet"), 0.5)
    with pytest.raises(CompressError, match="Which layers of MixtralForCausalLM"):
        shrinkage(tiny.build("mixtral"), 0.5)
    with pytest.raises(CompressError, match="removes none of the 96 neurons"):
        shrinkage(tiny.build("bert"), 0.001)


def test_a_skipped_layer_is_refused_by_name():
    model = tiny.build("llama")
    anatomy = models.anatomy(model, ["layers.1.mlp.up"])
    with pytest.raises(CompressError, match=r"Rows cannot go from model\.layers\.1\.mlp\.up_proj \(skipped by request\)"):
        rows.stored_names(model, anatomy, shrinkage(model, 0.5), model.state_dict())


def test_blocks_that_differ_from_the_config_are_refused_by_name():
    model = tiny.build("bert")
    model.bert.encoder.layer[1].intermediate.dense = torch.nn.Linear(64, 80)
    with pytest.raises(CompressError, match=r"bert\.encoder\.layer\.1\.intermediate\.dense is 80 x 64"):
        rows.stored_names(model, models.anatomy(model), shrinkage(model, 0.5), model.state_dict())


def test_every_family_of_the_table_is_tested():
    tested = {tiny.FAMILIES[family][1].model_type for family in PRUNABLE}
    assert tested == FAMILIES.keys()


def test_on_the_reference_model_obs_is_far_better_than_removal_alone(tmp_path):
    source = models.resolve(None)
    tokenizer = models.tokenizer(source)
    inputs = data.text(None, tokenizer, samples=16, seq_len=256, seed=0).inputs
    windows = data.held_out_text(None, tokenizer, seq_len=256, samples=6).inputs["input_ids"]
    prune(source, tmp_path / "obs", inputs, 0.25)
    prune(source, tmp_path / "plain", None, 0.25, "magnitude")
    dense, with_obs, plain = (
        evaluate.perplexity(T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), windows, batch=4)
        for folder in (source, tmp_path / "obs", tmp_path / "plain")
    )
    assert dense < with_obs
    assert (with_obs / dense - 1) < 0.3 * (plain / dense - 1), (dense, with_obs, plain)
