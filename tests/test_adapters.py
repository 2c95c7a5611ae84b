"""LoRA of PEFT trains around packed layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import compress
from compress import adapters
from compress.errors import CompressError
from compress.nn import PackedWeight
from tests import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # PEFT asks for what has another name now
STEPS = 12


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    compress.quantize(tiny.save("llama", folder / "source"), out=folder / "packed", bits=4, group_size=32, method="rtn")
    return folder / "packed"


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = adapters.lora(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(compress.load(folder, dtype=dtype), config)


def packed_of(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, PackedWeight)]
    return [tensor.clone() for layer in layers for tensor in layer.packed.tensors.values()]


def train(model: PreTrainedModel) -> list[float]:
    ids = tiny.inputs("llama", samples=4, length=24)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_steps_lower_the_loss_and_leave_packed_weights_alone(folder, dtype, checkpointing):
    model = adapted(folder, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    before = packed_of(model)
    assert len(before) > 14
    losses = train(model.train())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(one, other) for one, other in zip(before, packed_of(model), strict=True))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_adapters_are_saved_apart_and_loaded_again(folder, tmp_path):
    model = adapted(folder)
    train(model.train())
    model.eval().save_pretrained(tmp_path)
    ids = tiny.inputs("llama", samples=2)["input_ids"]
    again = adapted(folder).eval()
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(str(tmp_path)))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 100_000


def test_merging_is_refused(folder):
    with pytest.raises(CompressError, match="cannot be merged into packed weights"):
        adapted(folder).merge_and_unload()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_initial_values_that_change_the_base_weight_are_refused(init):
    with pytest.raises(CompressError, match=f"init_lora_weights='{init}' changes the weights.*gaussian"):
        adapters.lora(init_lora_weights=init)


@pytest.mark.parametrize(
    "arguments", [{"init_lora_weights": init} for init in ("gaussian", "orthogonal", "mica")] + [{"use_dora": True}]
)
def test_an_adapter_begins_with_the_model_as_it_was(folder, arguments):
    ids = tiny.inputs("llama", samples=2)["input_ids"]
    model = peft.get_peft_model(compress.load(folder), adapters.lora(r=4, target_modules=["q_proj", "down_proj"], **arguments))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, compress.load(folder)(input_ids=ids).logits)


def test_layers_cannot_be_chosen_by_their_class():
    with pytest.raises(CompressError, match=r"all-linear.*Name them"):
        adapters.lora(target_modules="all-linear")


def test_a_saved_adapter_is_loaded_by_peft(folder, tmp_path):
    model = adapted(folder)
    train(model.train())
    model.eval().save_pretrained(tmp_path)
    config = adapters.lora(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(compress.load(folder, dtype=torch.float32), tmp_path, config=config)
    ids = tiny.inputs("llama", samples=2)["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
