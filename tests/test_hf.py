from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
)
from transformers import CompressedTensorsConfig as StockConfig
from transformers.quantizers import auto

from compress import hf, models
from compress.errors import CompressError
from compress.formats import FORMATS, PACKED, gptq
from compress.nn import PackedWeight, QuantConv2d, QuantLinear, stack
from compress.qtensor import QTensor, dequantize
from compress.spec import LayerSpec, Plan, Scheme

CT = "compressed-tensors"
IDS = torch.arange(24)[None] % 64
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {"intermediate_size": 96, "initializer_range": 0.2, **SMALL, **overrides}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def rounded(w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, g_idx: torch.Tensor | None = None) -> QTensor:
    """Round to nearest; with `g_idx` the groups are those of the inputs sorted by it."""
    N, K = w.shape
    order = torch.arange(K) if g_idx is None else torch.argsort(g_idx, stable=True)
    grouped = w[:, order].float().view(N, scheme.groups(K), -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    half = scheme.levels // 2
    scales = (torch.maximum(-low, high) / half if scheme.symmetric else (high - low) / (scheme.levels - 1)).to(dtype)
    zeros = torch.full_like(low, half) if scheme.symmetric else (-low / scales.float()).round().clamp(0, scheme.levels - 1)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, scheme.levels - 1)
    codes = codes.view(N, K).to(torch.uint8)[:, torch.argsort(order)].contiguous()
    return QTensor(codes, scales, zeros.to(torch.uint8), scheme, g_idx)


def write(
    folder: Path,
    model: PreTrainedModel,
    scheme: Scheme | Callable[[str], Scheme],
    format_name: str = CT,
    shuffled: bool = False,
    **config: object,
) -> PreTrainedModel:
    """Write `model` compressed; returns it dense, with the weights that the checkpoint stands for."""
    form, anatomy = FORMATS[format_name], models.anatomy(model)
    choose = scheme if callable(scheme) else lambda _: scheme
    plan = Plan({layer.name: LayerSpec(choose(layer.name).fit(layer.K)) for layer in anatomy.layers})
    document = form.config(plan, anatomy.layers, list(anatomy.dense))
    document = document if document is None else document | config
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for layer in anatomy.layers:
        module, spec = model.get_submodule(layer.name), plan.layers[layer.name].scheme
        g_idx = torch.randperm(layer.K).int() // spec.group(layer.K) if shuffled else None
        q = rounded(models.matrix(module).data, spec, form.scale_dtype(module.weight.dtype), g_idx)
        weight = models.from_matrix(dequantize(q, module.weight.dtype), layer.kind, module.weight.shape)
        module.weight.data = weight
        del tensors[f"{layer.name}.weight"]
        encoded = gptq.encode(q, document) if format_name == "gptq" else form.encode(q)
        encoded = encoded if format_name != "dense" else {"weight": weight}
        tensors |= {f"{layer.name}.{key}": tensor.contiguous() for key, tensor in encoded.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(about | ({} if document is None else {"quantization_config": document})))
    return model


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


CASES = {
    "ct 4": (CT, Scheme(4, 32)),
    "ct 2 row": (CT, Scheme(2, -1)),
    "ct 3 g16": (CT, Scheme(3, 16)),
    "ct 8": (CT, Scheme(8, 32)),
    "ct 8 row": (CT, Scheme(8, -1)),
    "ct 4 asym": (CT, Scheme(4, 32, symmetric=False)),
    "ct 8 asym": (CT, Scheme(8, 32, symmetric=False)),
    "ct mixed": (CT, lambda name: Scheme(8, -1) if "down" in name else Scheme(3, 32, symmetric="mlp" not in name)),
    "gptq 4": ("gptq", Scheme(4, 32)),
    "gptq 3 asym": ("gptq", Scheme(3, 32, symmetric=False)),
    "gptq mixed": ("gptq", lambda name: Scheme(8, -1) if "down" in name else Scheme(2, 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_equals_the_dense_one_and_saves_identical_tensors(tmp_path, case):
    format_name, scheme = CASES[case]
    untouched = llama()(IDS).logits
    dense = write(tmp_path / "a", llama(), scheme, format_name)
    model = hf.load(tmp_path / "a", device="cpu")
    assert len(packed_layers(model)) == 14
    assert not any(isinstance(m, nn.Linear) for name, m in model.named_modules() if "layers" in name)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (model(IDS).logits - untouched).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    configs = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in "ab"]
    assert configs[0] == configs[1]
    again = hf.load(tmp_path / "b", device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_decode_near_the_dense_one(tmp_path, dtype):
    dense = write(tmp_path / "a", llama().to(dtype), Scheme(4, 32))
    model = hf.load(tmp_path / "a", device="cpu")
    assert model.dtype == dtype
    truth = dense.float()(IDS).logits
    assert (model(IDS).logits.float() - truth).norm() < 0.03 * truth.norm()
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_generates_what_the_dense_model_does(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32))
    model = hf.load(tmp_path / "a", device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


def test_tied_heads_stay_tied_and_dense(tmp_path):
    write(tmp_path / "a", llama(tie_word_embeddings=True), Scheme(4, 32))
    model = hf.load(tmp_path / "a", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_casts_and_deep_copies_lose_nothing(tmp_path):
    write(tmp_path / "a", llama(), Scheme(4, 32))
    model = hf.load(tmp_path / "a", device="cpu")
    with pytest.raises(ValueError, match="half"):
        model.half()
    twin = copy.deepcopy(model).to(torch.float16).to(torch.float32)
    twin.save_pretrained(tmp_path / "b")
    a, b = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a if ".weight_" in name)


def test_the_dtype_of_activations_is_a_choice_that_leaves_the_scales_alone(tmp_path):
    write(tmp_path / "a", llama(), Scheme(4, 32))
    model = hf.load(tmp_path / "a", device="cpu", dtype=torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert saved["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_conventions_and_shuffled_groups(tmp_path, version, symmetric):
    scheme = Scheme(4, 32, symmetric=symmetric)
    versions = {"checkpoint_format": version, "format": version, "desc_act": True}
    dense = write(tmp_path / "a", llama(), scheme, "gptq", shuffled=True, **versions)
    model = hf.load(tmp_path / "a", device="cpu")
    assert "order" in packed_layers(model)["model.layers.0.mlp.up_proj"].packed.tensors
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_gptq_leaves_dense_what_is_stored_dense(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32), "gptq")
    name = "model.layers.1.self_attn.o_proj"

    def store_dense(tensors):
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{key}"]
        tensors[f"{name}.weight"] = dense.get_submodule(name).weight.data.clone()

    edit(tmp_path / "a", store_dense)
    model = hf.load(tmp_path / "a", device="cpu")
    assert isinstance(model.get_submodule(name), nn.Linear)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_gptq_with_bfloat16_scales_of_other_writers(tmp_path):
    write(tmp_path / "a", llama().bfloat16(), Scheme(4, 32), "gptq")
    edit(tmp_path / "a", lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items() if k.endswith(".scales")}))
    hf.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_gpt2_whose_layers_are_transposed(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2))
    for format_name in (CT, "gptq"):
        dense = write(tmp_path / format_name, copy.deepcopy(model).eval(), Scheme(4, 32), format_name)
        loaded = hf.load(tmp_path / format_name, device="cpu")
        assert isinstance(loaded.transformer.h[0].attn.c_attn, QuantLinear)
        torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-4)
        loaded.save_pretrained(tmp_path / "again" / format_name)
        assert_same_tensors(tmp_path / format_name, tmp_path / "again" / format_name)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3)
    dense = write(tmp_path / "a", MobileNetV2ForImageClassification(config).eval(), Scheme(8, -1))
    model = hf.load(tmp_path / "a", device="cpu")
    assert any(isinstance(module, QuantConv2d) for module in model.modules())
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(pixels).logits, dense(pixels).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_classifier_keeps_its_dense_head(tmp_path):
    torch.manual_seed(0)
    dense = write(
        tmp_path / "a",
        BertForSequenceClassification(BertConfig(intermediate_size=96, num_labels=3, **SMALL)).eval(),
        Scheme(4, 32),
    )
    model = hf.load(tmp_path / "a", device="cpu")
    assert type(model) is BertForSequenceClassification
    assert type(model.classifier) is nn.Linear
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_dense_checkpoints_load_too(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32), "dense")
    model = hf.load(tmp_path / "a", device="cpu")
    assert not packed_layers(model)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 32), (8, None)])
def test_what_llm_compressor_writes(tmp_path, bits, group, symmetric):
    model = llama()
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            grouped = module.weight.data.view(module.out_features, -1, group or module.in_features)
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if not symmetric:
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "a")
    compressor.update_config(str(tmp_path / "a"))
    compressor.decompress_model(model)

    loaded = hf.load(tmp_path / "a", device="cpu")
    assert len(packed_layers(loaded)) == 14
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("case", ["ct 4", "ct 3 asym", "gptq act-order"])
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_layers_compute_and_save_the_same(tmp_path, case, bias):
    format_name, scheme, shuffled = {
        "ct 4": (CT, Scheme(4, 32), False),
        "ct 3 asym": (CT, Scheme(3, 32, symmetric=False), False),
        "gptq act-order": ("gptq", Scheme(4, 32), True),
    }[case]
    write(tmp_path / "a", llama(attention_bias=bias), scheme, format_name, shuffled)
    model = hf.load(tmp_path / "a", device="cpu")
    expected, layers = model(IDS).logits, len(packed_layers(model))
    model.save_pretrained(tmp_path / "apart")
    stack(model)
    assert len(packed_layers(model)) == (layers if shuffled else 2 * 4)  # qkv, o, gate and up, down
    torch.testing.assert_close(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "stacked")
    apart, stacked = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("apart", "stacked"))
    assert apart == stacked


def test_stock_transformers_reads_what_was_saved_after_loading(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32))
    hf.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert not packed_layers(stock)
    torch.testing.assert_close(stock(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_enabling_is_undone_by_the_outermost(tmp_path):
    write(tmp_path / "a", llama(), Scheme(4, 32))
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)

    def is_packed() -> bool:
        return bool(packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")))

    assert not is_packed()
    undo = hf.enable_transformers()
    with hf.enable_transformers():
        assert is_packed()
    assert is_packed()
    undo()
    assert not is_packed()
    undo()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before


def test_a_base_model_loads_from_the_file_of_one_with_a_head(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32))
    with hf.enable_transformers():
        model = AutoModel.from_pretrained(tmp_path / "a", dtype="auto")
    assert len(packed_layers(model)) == 14
    expected = dense.model(IDS).last_hidden_state
    torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_dequantize_true_still_means_dense(tmp_path):
    dense = write(tmp_path / "a", llama(), Scheme(4, 32))
    options = {"dtype": "auto", "quantization_config": StockConfig(dequantize=True)}
    with hf.enable_transformers(), pytest.warns(UserWarning, match="quantization_config"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", **options)
    assert not packed_layers(model)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_schemes_without_a_kernel_go_to_the_stock_classes(tmp_path):
    write(tmp_path / "a", llama(), Scheme(4, 32))
    document = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    document["config_groups"]["group_0"]["weights"] |= {"type": "float", "num_bits": 8}
    with hf.enable_transformers():
        assert type(auto.AutoQuantizationConfig.from_dict(document)) is StockConfig


def test_schemes_without_a_kernel_are_named_where_the_stock_packages_are_missing():
    document = {"quant_method": "gptq", "bits": 5, "group_size": 128, "sym": True}
    with hf.enable_transformers(), pytest.raises(CompressError, match=r"5-bit.*optimum"):
        auto.AutoQuantizationConfig.from_dict(document)


def test_loads_without_any_of_the_packages_that_stock_needs(tmp_path):
    write(tmp_path / "ct", llama(), Scheme(4, 32))
    write(tmp_path / "gptq", llama(), Scheme(4, 32), "gptq")
    script = """
import sys
for absent in ("compressed_tensors", "optimum", "gptqmodel"):
    sys.modules[absent] = None
from compress import hf
for folder in sys.argv[1:]:
    model = hf.load(folder, device="cpu")
    assert "QuantLinear" in repr(model)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "ct"), str(tmp_path / "gptq")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.weight_packed"), rf"lacks {NAME}.weight_packed"),
        (lambda t: t.pop(f"{NAME}.weight_scale"), rf"lacks {NAME}.weight_scale"),
        (lambda t: t.update({f"{NAME}.weight_scale": torch.ones(96, 3)}), rf"{NAME}.weight_scale should be \[96, 2\]"),
        (lambda t: t.update({f"{NAME}.weight_packed": torch.ones(96, 8)}), rf"{NAME}.weight_packed should be .*torch.float32"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight_packed": torch.ones(1)}), "no layer there"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    write(tmp_path / "a", llama(), Scheme(4, 32))
    edit(tmp_path / "a", change)
    with pytest.raises(CompressError, match=message):
        hf.load(tmp_path / "a", device="cpu")


def test_missing_tensors_are_an_error_for_from_pretrained_too(tmp_path):
    write(tmp_path / "a", llama(), Scheme(4, 32), "gptq")
    edit(tmp_path / "a", lambda tensors: tensors.pop(f"{NAME}.qweight"))
    with hf.enable_transformers(), pytest.raises(CompressError, match=f"lacks {NAME}.qweight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(CompressError, match="nowhere"):
        hf.load(tmp_path / "nowhere")
    write(tmp_path / "a", llama(), Scheme(4, 32))
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CompressError, match=r"model\.safetensors"):
        hf.load(tmp_path / "a", device="cpu")
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a", llama(), Scheme(4, 32))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(CompressError, match=r"config\.json"):
        hf.load(tmp_path / "a", device="cpu")


def test_offloading_is_refused():
    with hf.enable_transformers():
        config = auto.AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "group_size": 128})
        quantizer = auto.AutoHfQuantizer.from_config(config)
    with pytest.raises(CompressError, match="offload"):
        quantizer.validate_environment(device_map={"model": 0, "lm_head": "disk"})
    quantizer.validate_environment(device_map={"": "cpu"})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("format_name", [CT, "gptq"])
def test_weights_are_laid_out_on_the_device_they_are_for(format_name, device, tmp_path, monkeypatch):
    expected = write(tmp_path / "a", llama(), Scheme(4, 32), format_name)(IDS).logits
    form, seen = PACKED[format_name], []

    def decode(tensors, *rest, real=form.decode):
        seen.extend(tensor.device.type for tensor in tensors.values())
        return real(tensors, *rest)

    monkeypatch.setattr(form, "decode", decode)
    model = hf.load(tmp_path / "a", device=device)
    assert set(seen) == {device}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    torch.testing.assert_close(model(IDS.to(device)).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
