from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from compress import latency, models
from compress.errors import CompressError
from compress.kernels import dispatch
from compress.latency import LatencyTable, Machine, Timing
from compress.spec import PER_ROW, Scheme
from tests import tiny

CPU = torch.device("cpu")
FOUR, ROW = Scheme(4, 32), Scheme(4, PER_ROW)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(latency, "LEAST_SECONDS", 1e-4)


def table(*timings: Timing) -> LatencyTable:
    return LatencyTable(Machine.here(CPU), "bfloat16", "2026-11-21", {"torch": "2"}, timings)


def test_every_shape_scheme_and_number_of_rows_is_timed():
    shapes = {(32, 64): 2, (16, 48): 1}
    schemes = [Scheme(bits, 32) for bits in (2, 3, 4, 8)]
    found = latency.measure(shapes, schemes, [1, 3], CPU, torch.bfloat16)
    assert (found.machine, found.dtype) == (Machine.here(CPU), "bfloat16")
    assert found.versions["torch"] == torch.__version__
    assert len(found.timings) == 2 * 2 * 5
    for N, K in shapes:
        for M in (1, 3):
            for scheme in (None, *schemes):
                assert found.of(N, K, scheme, M) > 0
    assert all(one.spread >= 0 for one in found.timings)
    assert {one.scheme.group_size for one in found.timings if one.scheme and one.K == 48} == {16}  # 32 does not divide 48


def test_the_calls_are_the_served_products(monkeypatch):
    seen = []
    real = dispatch.linear
    monkeypatch.setattr(dispatch, "linear", lambda x, packed: seen.append((tuple(x.shape), x.dtype, packed)) or real(x, packed))
    latency.measure({(32, 64): 3}, [FOUR, Scheme(8, PER_ROW), replace(FOUR, symmetric=False)], [2], CPU, torch.float16)
    assert {shape for shape, _, _ in seen} == {(2, 64)}
    assert {dtype for _, dtype, _ in seen} == {torch.float16}
    assert {(packed.bits, packed.shape, packed.G, "zeros" in packed.tensors) for *_, packed in seen} == {
        (4, (32, 64), 2, False),
        (8, (32, 64), 1, False),
        (4, (32, 64), 2, True),
    }


def test_weights_take_turns_until_they_outgrow_the_cache_or_the_model(monkeypatch):
    monkeypatch.setattr(latency, "_cache", lambda _: 1000)
    assert latency.copies(500, 10, 10_000, CPU) == latency.CACHES * 2
    assert latency.copies(300, 10, 10_000, CPU) == -(-latency.CACHES * 1000 // 300)
    assert latency.copies(500, 10, 30, CPU) == 3
    assert latency.copies(10**9, 10**6, 10, CPU) == 1


def test_a_timing_gives_every_call_its_turn():
    counts = [0, 0, 0]

    def call(i):
        counts[i] += 1

    seconds = latency.timer([lambda i=i: call(i) for i in range(3)], CPU)()
    assert seconds > 0
    assert len(set(counts)) == 1


def test_a_table_survives_its_file(tmp_path):
    written = table(Timing(1, 8, 16, None, 2e-6, 1e-7), Timing(1, 8, 16, FOUR, 1e-6, 0.0))
    written.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json", CPU) == written
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_lookups():
    timings = [Timing(M, 8, 48, scheme, M * 1e-6, 0.0) for M in (4, 1) for scheme in (None, Scheme(4, 16))]
    found = table(*timings)
    assert found.of(8, 48, None) == 1e-6  # the fewest rows
    assert found.of(8, 48, FOUR, 4) == 4e-6  # group size 32 becomes 16 for 48 inputs
    for N, K, scheme, M, message in (
        (8, 64, None, None, "1 rows, 8 x 64 weights, dense"),
        (8, 48, Scheme(3, 16), None, "int3 g16"),
        (8, 48, None, 2, "2 rows"),
    ):
        with pytest.raises(CompressError, match=message):
            found.of(N, K, scheme, M)


@pytest.mark.parametrize("other", [Machine("another", torch.get_num_threads()), Machine(Machine.here(CPU).device, 1000)])
def test_another_machines_table_is_refused(tmp_path, other):
    path = tmp_path / "table.json"
    replace(table(Timing(1, 8, 16, None, 1e-6, 0.0)), machine=other).save(path)
    with pytest.raises(CompressError, match=f"was measured on {other}, and this is {Machine.here(CPU)}"):
        LatencyTable.load(path, CPU)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("machine"),
        lambda d: d.update(version=2),
        lambda d: d.update(timings=[]),
        lambda d: d["timings"][0].update(scheme={"bits": 5}),
        lambda d: d["timings"][0].pop("seconds"),
    ],
)
def test_a_damaged_table_is_refused(change):
    document = json.loads(table(Timing(1, 8, 16, FOUR, 1e-6, 0.0)).to_json())
    change(document)
    with pytest.raises(CompressError, match=r"t\.json is not a latency table"):
        LatencyTable.from_json(json.dumps(document), "t.json")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(CompressError, match="Cannot read the latency table"):
        LatencyTable.load(tmp_path / "none.json", CPU)
    (tmp_path / "text.json").write_text("seconds")
    with pytest.raises(CompressError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "text.json", CPU)
    with pytest.raises(CompressError, match="Cannot write"):
        table(Timing(1, 8, 16, FOUR, 1e-6, 0.0)).save(tmp_path / "no" / "table.json")


def test_the_shapes_of_a_model_are_counted():
    assert latency.shapes_of(models.anatomy(tiny.build("llama"))) == {(64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2}
    with pytest.raises(CompressError, match="is a convolution"):
        latency.shapes_of(models.anatomy(tiny.build("resnet")))
