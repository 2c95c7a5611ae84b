"""Quantizing a model that is pruned already: its zeros stay, the report says so, and what would move them is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import checkpoint, opening
from compress.errors import CompressError
from compress.spec import LayerSpec, Plan, Scheme
from tests import tiny

SOME = {"samples": 8, "seq_len": 24}


@pytest.fixture(name="pruned", scope="module")
def _pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama of which all layers but k_proj have a 2:4 pattern, and calibration data for it."""
    folder = tmp_path_factory.mktemp("pruned")
    source, data = tiny.save("llama", folder / "dense"), tiny.calibration("llama", folder / "data")
    compress.prune(source, out=folder / "model", pattern="2:4", method="magnitude", format="dense", skip=["k_proj"])
    return folder / "model", data


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor == 0 for name, tensor in tensors.items() if "_proj" in name}


@pytest.mark.parametrize("arguments", [{}, {"effort": "best"}, {"effort": "fast"}, {"method": "rtn"}], ids=str)
def test_zeros_stay_and_the_report_says_so(pruned, tmp_path, arguments):
    source, data = pruned
    calibrated = {} if "method" in arguments else SOME | {"calib": data}
    out = tmp_path / "out"
    report = compress.quantize(source, out=out, bits=4, group_size=32, format="dense", **arguments, **calibrated)
    before, after = zeros(source), zeros(out)
    assert all(not (before[name] & ~after[name]).any() for name in before if "k_proj" not in name)
    said = [warning for warning in report.warnings if "pruned in the source" in warning]
    assert len(said) == 1
    assert said[0].startswith("12 layers are pruned")  # 7 in each of 2 blocks, without k_proj
    assert report.fallbacks == [] or all("zeros" not in note for one in report.fallbacks for note in one.notes)
    counted = {layer.name: layer.sparsity for layer in report.layers}
    assert all((counted[name] is None) == name.endswith("k_proj") for name in counted)
    assert all(share >= 0.5 for share in counted.values() if share is not None)


def test_zeros_may_be_let_go_of(pruned, tmp_path):
    source, data = pruned
    report = compress.quantize(
        source, out=tmp_path / "out", bits=4, group_size=32, keep_zeros=False, format="dense", calib=data, **SOME
    )
    before, after = zeros(source), zeros(tmp_path / "out")
    assert sum(int((before[name] & ~after[name]).sum()) for name in before) > 0
    assert not any("pruned in the source" in warning for warning in report.warnings)


def test_a_searched_plan_keeps_zeros_too(pruned, tmp_path, monkeypatch):
    source, data = pruned
    monkeypatch.setattr(opening, "JUDGED_TOKENS", 8 * 24)
    report = compress.quantize(
        source, out=tmp_path / "out", avg_bits=4.5, bits="3,4", group_size=32, effort="fast", format="dense", calib=data,
        library=tmp_path / "library", **SOME,
    )  # fmt: skip
    before, after = zeros(source), zeros(tmp_path / "out")
    assert all(not (before[name] & ~after[name]).any() for name in before if "k_proj" not in name)
    assert any("pruned in the source" in warning for warning in report.warnings)


def test_a_rotation_is_refused(pruned, tmp_path):
    source, data = pruned
    with pytest.raises(CompressError, match=r"12 layers are pruned already.*no-keep-zeros"):
        compress.quantize(source, out=tmp_path / "out", bits=4, group_size=32, rotate=True, calib=data, **SOME)
    assert not (tmp_path / "out").exists()


def test_a_dense_layer_of_a_plan_is_as_it_was(pruned, tmp_path):
    source, data = pruned
    names = [name.removesuffix(".weight") for name in checkpoint.index(source) if "_proj" in name]
    plan = Plan({name: LayerSpec(Scheme(4, 32) if "mlp" in name else None) for name in names})
    report = compress.quantize(source, out=tmp_path / "out", plan=plan, format="dense", calib=data, **SOME)
    assert [warning for warning in report.warnings if warning.startswith("6 layers are pruned")]
