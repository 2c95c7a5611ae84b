"""What can be checked of the GPU benchmark without a GPU: its model, its table, and that failing tests stop it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from benchmarks import kernels, kernels_model, record
from benchmarks.record import Measurement
from compress.nn import Stack

SMALL = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_the_models_own(monkeypatch, packed):
    monkeypatch.setattr(kernels_model, "CONTEXT", 5)
    monkeypatch.setattr(kernels_model, "SCHEME", kernels_model.Scheme(4, 32))
    torch.manual_seed(0)
    model = kernels_model.random_llama(SMALL, CPU, packed).float()
    assert sum(isinstance(module, Stack) for module in model.modules()) == (4 if packed else 0)
    ids = torch.randint(0, 64, (3, 6))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        before = DynamicCache(config=SMALL)
        model(ids[:, :5], past_key_values=before)
    cache = [(keys.float(), values.float()) for keys, values in kernels_model.empty_cache(SMALL, 3, CPU)]
    for (keys, values), layer in zip(cache, before.layers, strict=True):
        keys[:, :, :5], values[:, :, :5] = layer.keys, layer.values
    found = kernels_model.step(model, ids[:, 5:], cache, kernels_model.through_layer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


COMPILED = """
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig
from benchmarks import kernels_model
from tests.test_kernels_benchmark import CPU, SMALL

kernels_model.SCHEME = kernels_model.Scheme(4, 32)
compiled = torch.compile(kernels_model.through_layer, fullgraph=True, dynamic=False, backend="aot_eager")
for packed in (False, True):
    counters.clear()
    model, ids = kernels_model.random_llama(SMALL, CPU, packed), torch.zeros(2, 1, dtype=torch.long)
    cache = kernels_model.empty_cache(SMALL, 2, CPU)
    expected = kernels_model.step(model, ids, cache, kernels_model.through_layer)
    assert torch.equal(kernels_model.step(model, ids, cache, compiled), expected)
    assert counters["stats"]["unique_graphs"] == 1, counters
"""


@pytest.mark.slow
def test_all_layers_share_one_compiled_graph():
    """In a process of its own, where signatures are not checked: torch.compile cannot look through the checks."""
    command = [sys.executable, "-W", "error", "-c", COMPILED]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=record.ROOT)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_table_has_a_line_for_every_shape_and_side():
    rows = [
        Measurement("packed", "4096 x 4096, 1 rows", "speed / bfloat16's", 2.5, "x"),
        Measurement("packed", "4096 x 4096, 16 rows", "product", 8.0, "us"),
        Measurement("packed", "8B-shaped Llama, batch 1", "decoding", 321.5, "tokens/s"),
    ]
    head, line, last = kernels.table(rows).splitlines()
    assert head.split()[-len(kernels.ROWS) :] == [str(M) for M in kernels.ROWS]
    assert line.split() == ["4096", "x", "4096", "packed", "2.50", *["-"] * (len(kernels.ROWS) - 1)]
    assert "321.5 tokens/s" in last


def test_failing_tests_leave_no_speed_up(monkeypatch, capsys):
    def measured(green: bool) -> list[Measurement]:
        assert not green
        return [Measurement("packed", "4096 x 4096, 1 rows", "product", 8.0, "us")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "tests_pass", lambda: False)
    monkeypatch.setattr(kernels, "products", measured)
    monkeypatch.setattr(record, "append", lambda *_, **__: pytest.fail("appended"))
    monkeypatch.setattr(sys, "argv", ["kernels", "--append", "--only", "products"])
    with pytest.raises(SystemExit, match="tests fail"):
        kernels.main()
    assert "speed" not in capsys.readouterr().out
