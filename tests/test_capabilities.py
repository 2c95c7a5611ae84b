"""Packed weights are served on every processor: what torch picks by its instruction sets is tried with fewer of these, too."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.nn import PackedWeight
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
NAME = "ATEN_CPU_CAPABILITY"
SERVED = ("tests/kernels/test_cpu.py", "tests/kernels/test_dispatch.py", f"tests/{Path(__file__).name}")


def test_load_and_generate(tmp_path: Path) -> None:
    """A 4-bit folder, as it is served packed, says what its on-grid weights say when they are dense."""
    source = tiny.save("llama", tmp_path / "source")
    for form in ("compressed-tensors", "dense"):
        compress.quantize(source, out=tmp_path / form, bits=4, group_size=32, method="rtn", format=form)
    packed = compress.load(tmp_path / "compressed-tensors")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert {m.packed.layout for m in packed.modules() if isinstance(m, PackedWeight)} == {"nibbles"}
    ids = tiny.inputs("llama")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(packed.generate(ids, **arguments), dense.generate(ids, **arguments))
        rough = packed.to(torch.bfloat16)(ids).logits.float()  # few rows in bfloat16 go to the processor's 4-bit kernel
        one_row = packed(ids[:1, :1]).logits.float()
    assert (rough - dense(ids).logits).norm() < 0.05 * rough.norm()
    assert (one_row - dense(ids[:1, :1]).logits).norm() < 0.05 * one_row.norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are names of x86 instruction sets")
@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_with_fewer_instructions(capability: str | None) -> None:
    """Where the whole suite runs under this capability, the tests that a subprocess would run are part of it."""
    here = os.environ.get(NAME)
    if capability == here or (here is None and capability == torch.backends.cpu.get_cpu_capability().lower()):
        pytest.skip("the suite itself runs so")
    environment = {name: value for name, value in os.environ.items() if name != NAME and not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({NAME: capability} if capability else {})
    others = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "not with_fewer", *SERVED]
    done = subprocess.run(others, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
