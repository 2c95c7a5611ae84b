"""The Triton kernels, compiled where there is a GPU and interpreted where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from compress.kernels import decode, dispatch, launch, planar, wna16
from compress.kernels.launch import Launch

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float16, torch.float32, BFLOAT16]
SHAPES = [  # N, K, group
    (64, 128, 32),
    (130, 256, 64),
    (48, 512, 128),
    (33, 288, 96),
    (7, 45, 45),
    (65, 320, 320),
]
RULES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SMALL = Launch(BN=64, BM=16, parts=1, warps=4, stages=3)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever is allocated starts as NaN, so that an element nobody writes is seen."""
    allocate = torch.empty

    def empty(*size, **options):
        out = allocate(*size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)


def problem(weight, q64, N, K, group, bits, symmetric, M, dtype):
    """Planar tensors, Q in float64, and x between NaNs."""
    codes, scales, zeros = weight(N, K, group, bits, symmetric=symmetric, dtype=torch.float16)
    tensors = {name: tensor.to(DEVICE) for name, tensor in planar.to_planar(codes, scales, zeros, bits).items()}
    around = torch.full(((M + 2) * K,), torch.nan, dtype=dtype, device=DEVICE)
    x = around[K : (M + 1) * K].view(M, K)
    x.copy_(torch.randn(M, K, generator=torch.Generator().manual_seed(M)))
    return tensors, q64(codes, scales, zeros, bits).to(DEVICE), x


def check(out, x, Q, bias):
    """At most twice the error of a dense product in the same precision."""
    truth = x.double() @ Q.t() + (0 if bias is None else bias.double())
    dense = torch.nn.functional.linear(x, Q.to(x.dtype), None if bias is None else bias.to(x.dtype))
    budget = 1e-6 if x.dtype == torch.float32 else 2 * ((dense - truth).norm() / truth.norm()).item()
    assert out.dtype == x.dtype
    assert (out - truth).norm() / truth.norm() <= budget


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_few_rows(weight, q64, N, K, group, bits, symmetric, dtype):
    M = 1 + (N + bits) % 5
    tensors, Q, x = problem(weight, q64, N, K, group, bits, symmetric, M, dtype)
    bias = torch.randn(N, device=DEVICE).to(dtype) if symmetric else None
    check(wna16.multiply(x, tensors, bias, N, K // group, bits, SMALL), x, Q, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "how"),
    [
        (8, Launch(128, 8, 3, 4, 4)),
        (33, Launch(128, 32, 2, 4, 4)),
        (70, Launch(128, 64, 1, 4, 4)),
        (130, Launch(128, 128, 2, 8, 3)),
    ],
)
def test_every_tile_with_parts_of_k(weight, q64, M, how, dtype):
    for bits, symmetric in ((4, True), (3, False), (8, False)):
        tensors, Q, x = problem(weight, q64, 150, 768, 64, bits, symmetric, M, dtype)
        bias = torch.randn(150, device=DEVICE)
        out = wna16.multiply(x, tensors, bias, 150, 12, bits, how)
        check(out, x, Q, bias)
        assert torch.equal(out, wna16.multiply(x, tensors, bias, 150, 12, bits, how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "symmetric", "group"), [(4, True, 64), (3, False, 96), (8, False, 384), (2, True, 32)])
def test_experts_in_one_launch(weight, q64, bits, symmetric, group, dtype):
    N, K, E, per_token = 70, 384, 5, 3
    problems = [problem(weight, q64, N, K, group, bits, symmetric, 9, dtype) for _ in range(E)]
    scaled = [{name: tensor * (2**e if name == "scales" else 1) for name, tensor in p[0].items()} for e, p in enumerate(problems)]
    tensors = {name: torch.stack([t[name] for t in scaled]) for name in scaled[0]}
    Q, x = problems[0][1], problems[0][2]
    experts = torch.randint(0, E - 1, (9 * per_token,), generator=torch.Generator().manual_seed(bits)).to(DEVICE)
    experts[:8] = 2  # more than one expert's tile holds, and one expert without rows
    for how in (SMALL, Launch(64, 16, 2, 4, 3)):
        out = wna16.multiply_experts(x, tensors, experts, N, K // group, bits, how)
        for e in range(E):
            rows = (experts == e).nonzero().flatten()
            if len(rows):
                check(out[rows], x[rows // per_token], 2**e * Q, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized_rows_are_rounded_once(weight, q64, bits, symmetric, dtype):
    for N, K, group in SHAPES:
        tensors, Q, _ = problem(weight, q64, N, K, group, bits, symmetric, 1, dtype)
        for first in range(0, N, 64):
            last = min(first + 64, N)
            part = wna16.expand(tensors, first, last, K, K // group, bits, dtype)
            assert torch.equal(part, Q[first:last].to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_many_rows(weight, q64, dtype):
    for rows in (64, 128, 150):
        tensors, Q, x = problem(weight, q64, 150, 320, 64, 4, False, 70, dtype)
        bias = torch.randn(150, device=DEVICE).to(dtype)
        check(wna16.multiply_expanded(x, tensors, bias, 150, 5, 4, rows), x, Q, bias)


def test_rows_are_expanded_from_whole_tiles_on(weight, q64):
    tensors, _, _ = problem(weight, q64, 150, 320, 64, 4, True, 1, torch.float16)
    with pytest.raises(ValueError, match="multiple of 64"):
        wna16.expand(tensors, 32, 64, 320, 5, 4, torch.float16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dispatch_multiplies_every_number_of_rows(weight, q64, dtype, monkeypatch):
    few = launch.Table(fused_rows=4)
    monkeypatch.setattr(launch, "table_of", lambda _: few)
    tensors, Q, _ = problem(weight, q64, 96, 128, 64, 4, False, 1, dtype)
    packed = dispatch.Packed("planar", 4, (96, 128), 2, tensors)
    bias = torch.randn(96, device=DEVICE).to(dtype)
    for shape in ((128,), (0, 128), (2, 2, 128), (5, 128)):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        out = dispatch.linear(x, packed, bias)
        assert out.shape == (*shape[:-1], 96)
        if x.numel():
            check(out, x, Q, bias)


def test_strided_rows(weight, q64):
    tensors, Q, _ = problem(weight, q64, 96, 128, 64, 4, True, 1, torch.float16)
    packed = dispatch.Packed("planar", 4, (96, 128), 2, tensors)
    x = torch.randn(128, 3, device=DEVICE).half().t()
    check(dispatch.linear(x, packed), x, Q, None)


def test_inputs_in_another_order(weight, q64):
    codes, scales, _ = weight(64, 128, 32, 4)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    tensors = planar.to_planar(codes, scales, None, 4) | {"order": order.int()}
    packed = dispatch.Packed("planar", 4, (64, 128), 4, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    x = torch.randn(3, 128).half().to(DEVICE)
    Q = torch.empty(64, 128, dtype=torch.double)
    Q[:, order] = q64(codes, scales, None, 4)
    check(dispatch.linear(x, packed), x, Q.to(DEVICE), None)
    assert torch.equal(dispatch.dequantize(packed).cpu(), Q.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_is_decoded_exactly(bits, dtype):
    assert decode.decodes(bits, dtype, DEVICE, "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_assembly_decodes_exactly(bits, dtype):
    assert decode.decodes(bits, dtype, DEVICE, decode.assembly(bits, dtype))
    assert decode.code_for(bits, dtype, DEVICE)


def test_a_decode_that_is_wrong_is_noticed(monkeypatch):
    shifted = decode.plane_bits
    monkeypatch.setattr(decode, "from_planar", lambda *args: (planar.from_planar(*args)[0] ^ 1, None))
    assert shifted(3) == 2
    assert not decode.decodes(4, torch.float16, DEVICE, "")


def operands(weight, bits, symmetric):
    codes, scales, zeros = weight(70, 128, 64, bits, symmetric=symmetric)
    t = {name: tensor.to(DEVICE) for name, tensor in planar.to_planar(codes, scales, zeros, bits).items()}
    x = torch.randn(3, 128, device=DEVICE).half()
    bias = None if symmetric else torch.randn(70, device=DEVICE).half()
    return x, t["low"], t.get("high"), t["scales"], t.get("zeros"), bias, 70, 2, bits


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True)])
@pytest.mark.parametrize("name", ["planar_fused", "planar_expanded"])
def test_operators_keep_torchs_rules(weight, name, bits, symmetric):
    torch.library.opcheck(getattr(torch.ops.compress, name), operands(weight, bits, symmetric), test_utils=RULES)


def test_the_experts_operator_keeps_torchs_rules(weight):
    x, low, _, scales, *_ = operands(weight, 4, True)
    experts = torch.tensor([0, 1, 1, 0, 1, 1], device=DEVICE)
    tensors = low.expand(2, *low.shape).contiguous(), None, scales.expand(2, *scales.shape).contiguous(), None
    torch.library.opcheck(torch.ops.compress.planar_experts, (x, experts, *tensors, 70, 2, 4), test_utils=RULES)
    nobody = torch.ops.compress.planar_experts(x, experts[:0], *tensors, 70, 2, 4)
    assert nobody.shape == (0, 70)


COMPILED = """
import torch
from torch import nn
from compress.kernels import dispatch, planar
from compress.nn import QuantLinear, Stack, StackedLinear
from compress.spec import Scheme

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
codes, scales = torch.randint(0, 16, (70, 128), dtype=torch.uint8), torch.rand(70, 2).half()
tensors = {name: tensor.to(device) for name, tensor in planar.to_planar(codes, scales, None, 4).items()}
packed = dispatch.Packed("planar", 4, (70, 128), 2, tensors)
stack = Stack(packed, Scheme(4, 64), None, (0, 40, 70))
gate, up = StackedLinear(stack, 0), StackedLinear(stack, 1)
found = []

def backend(graph, inputs):
    found.append(sum("planar" in str(node.target) for node in graph.graph.nodes))
    return graph

def block(x):
    return gate(x).sum() * up(x) + dispatch.linear(x, packed)[:, :30]

compiled, whole = (torch.compile(block, fullgraph=True, backend=how) for how in (backend, "aot_eager"))
with torch.no_grad():
    for M in (3, 2, 600):
        x = torch.randn(M, 128, device=device).half()
        assert torch.equal(compiled(x), block(x))
        assert torch.equal(whole(x), block(x))
assert set(found) == {2}, found
"""


@pytest.mark.slow
def test_compiled_without_a_break():
    """In a process of its own, where signatures are not checked: torch.compile cannot look through the checks."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", COMPILED], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_bytes(weight):
    packed = dispatch.prepare(*weight(512, 1024, 128, 4), bits=4, device=DEVICE)
    for M in (1, 16, 600):
        x = torch.randn(M, 1024, device=DEVICE).bfloat16()
        expected = dispatch.linear(x, packed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dispatch.linear(x, packed)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
