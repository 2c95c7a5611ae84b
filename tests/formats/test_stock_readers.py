"""What transformers and compressed-tensors make of our checkpoints, in a process that never imports this package."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from compress.formats import compatibility, facts
from compress.spec import FIXED
from tests.formats.tiny import Checkpoint

Stock = dict[str, dict[str, Tensor | str]]
WIDTHS = [f"int{bits} {group}" for bits in (2, 3, 4, 8) for group in (32, -1)]
FLOATS = [grid for grid, fixed in FIXED.items() if fixed.form != "int"]
GRIDS = ["ternary bfloat16", *(f"{grid} {dtype}" for grid in FLOATS for dtype in ("float16", "bfloat16", "float32"))]
OTHERS = ["fitted", "bfloat16", "tied", "some dense", "mixed", "mixed, some dense", "bert", "dense"]
EXPANDED = [f"{grid} {dtype}" for grid in ("mxfp4", "nvfp4") for dtype in ("float16", "float32")]  # to bfloat16
WRITTEN_BY_DEFAULT = [*WIDTHS, *(case for case in GRIDS if case not in EXPANDED), "int and fp8", *OTHERS]
QUANTIZED = [*WRITTEN_BY_DEFAULT[:-1], *EXPANDED, "asymmetric", "asymmetric, mixed", "conv1d"]
EDITED = ["actorder", "unknown method", "ignored", "unknown format", "no group format", "tied head"]
READERS = {"default": compatibility.TRANSFORMERS, "dequantize": compatibility.DEQUANTIZE}


@pytest.mark.parametrize("case", WRITTEN_BY_DEFAULT)
def test_stock_logits_are_exactly_those_of_the_dequantized_weights(
    case: str, stock: Stock, checkpoints: dict[str, Checkpoint]
) -> None:
    logits = stock[case]["default"]
    assert isinstance(logits, Tensor), logits
    assert torch.equal(logits, checkpoints[case].logits)


@pytest.mark.parametrize("case", EXPANDED)
def test_what_stock_expands_to_another_dtype_stops_it_unless_it_dequantizes_at_once(
    case: str, stock: Stock, checkpoints: dict[str, Checkpoint]
) -> None:
    assert "same dtype" in str(stock[case]["default"])
    assert torch.equal(stock[case]["dequantize"], checkpoints[case].logits)


@pytest.mark.parametrize("case", ["int4 32", "bert", "some dense", "mixed", "mixed, some dense"])
def test_the_base_model_loads_from_the_same_folder(case: str, stock: Stock, checkpoints: dict[str, Checkpoint]) -> None:
    hidden = stock[case]["base"]
    assert isinstance(hidden, Tensor), hidden
    assert torch.equal(hidden, checkpoints[case].hidden)


@pytest.mark.parametrize("how", ["default", "dequantize", "base"])
def test_stock_refuses_layers_that_are_not_linear(how: str, stock: Stock) -> None:
    error = stock["conv1d"][how]
    assert isinstance(error, str)
    assert "module_type" in error


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("case", [*QUANTIZED, *EDITED])
def test_check_foresees_what_stock_readers_do(case: str, how: str, stock: Stock, checkpoints: dict[str, Checkpoint]) -> None:
    folder = checkpoints[case].folder
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        headers = {name: facts.Planned(entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    gathered = facts.gather(json.loads((folder / "config.json").read_text()), headers)
    (verdict,) = (verdict for verdict in compatibility.readers(gathered) if verdict.reader == READERS[how])
    outcome = stock[case][how]
    exact = isinstance(outcome, Tensor) and torch.equal(outcome, checkpoints[case].logits)
    assert verdict.loads == exact, (verdict, outcome if isinstance(outcome, str) else "other numbers")
