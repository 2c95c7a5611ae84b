from __future__ import annotations

import pytest
import torch

from compress import latency, tune
from compress.errors import CompressError
from compress.kernels import dispatch, launch
from compress.kernels.launch import Key, Launch, Table
from compress.progress import silent
from compress.spec import PER_ROW, Scheme

CPU = torch.device("cpu")
START = Launch(64, 16, 1, 4, 2)


@pytest.fixture(autouse=True)
def _own_file(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.FILE, str(tmp_path / "kernels.json"))
    launch.table_of.cache_clear()
    yield
    launch.table_of.cache_clear()


def steps(how):
    return [Launch(64, 16, how.parts + step, 4, 2) for step in (-1, 1) if how.parts + step > 0]


def test_descent_ends_where_no_neighbour_is_faster_and_times_each_once():
    asked = []

    def seconds(how):
        asked.append(how)
        return abs(how.parts - 5) + 1.0

    assert tune.descend(START, steps, seconds) == (Launch(64, 16, 5, 4, 2), 1.0)
    assert len(asked) == len(set(asked)) == 6


def test_descent_takes_no_step_for_noise():
    assert tune.descend(START, steps, lambda how: 1.0 - how.parts * 1e-4)[0] == START


@pytest.mark.parametrize(("firsts", "last"), [([1, 1, 1], 4), ([1, 3, 1], 1), ([3, 1, 1], 0), ([2, 2, 2], 4)])
def test_a_way_is_for_rows_up_to_its_first_defeat(firsts, last):
    assert tune.last_before({M: (float(first), 2.0) for M, first in zip((1, 2, 4), firsts, strict=True)}) == last


def timed(monkeypatch, seconds):
    """Every call runs once; its time is what `seconds` says of its way, its rows and its weight."""

    def timer(calls, _device):
        way, (x, packed) = calls[0].func, calls[0].args[-2:]
        calls[0]()
        return lambda: seconds(way, len(x), packed)

    monkeypatch.setattr(latency, "timer", timer)


def test_a_cpus_turning_points_are_kept_and_used(monkeypatch):
    def seconds(way, M, packed):
        most = 4 if packed.layout == "nibbles" else 32
        return float(M) if way is dispatch.cpu_kernel else float(most)

    timed(monkeypatch, seconds)
    schemes = [Scheme(4, 32), Scheme(8, PER_ROW)]
    table = tune.measure({(32, 64): 1, (16, 32): 1}, schemes, CPU, torch.bfloat16)
    assert table.measured
    assert table.few_rows == {"nibbles": 4, "bytes": 32}
    assert launch.few_rows("nibbles", CPU) == 4
    packed = dispatch.prepare(torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2), None, bits=4)
    ways = []
    monkeypatch.setattr(dispatch, "cpu_kernel", lambda x, _: ways.append("kernel") or x.new_zeros(len(x), 32))
    monkeypatch.setattr(dispatch, "cpu_tiles", lambda x, _: ways.append("tiles") or x.new_zeros(len(x), 32))
    for M in (4, 5):
        dispatch.linear(torch.zeros(M, 64, dtype=torch.bfloat16), packed)
    assert ways == ["kernel", "tiles"]


def test_what_was_measured_before_is_kept(monkeypatch):
    name, before = launch.describe(CPU).name, {Key(1, 2, 3, 4, 5): START}
    launch.write(launch.user_file(), {name: Table(launches=before, few_rows={"nibbles": 9, "bytes": 8}), "other": Table()})
    timed(monkeypatch, lambda *_: 1.0)
    table = tune.measure({(32, 64): 1}, [Scheme(4, 32)], CPU, torch.bfloat16)
    assert table.few_rows == {"nibbles": 512, "bytes": 8}
    assert launch.read(launch.user_file()) == {name: table, "other": Table()}
    assert table.launches == before


def test_a_gpus_launches(monkeypatch):
    """Through the interpreter: which launch is fastest is made up, but all of them run."""
    pytest.importorskip("triton")
    from compress.kernels import wna16

    monkeypatch.setattr(dispatch, "layout_for", lambda *_: "planar")
    monkeypatch.setattr(tune, "ROWS", (1, 2))
    tried = []
    real = wna16.multiply

    def multiply(x, tensors, bias, N, G, bits, how):
        tried.append(how)
        return real(x, tensors, bias, N, G, bits, how)

    monkeypatch.setattr(wna16, "multiply", multiply)
    timed(monkeypatch, lambda way, M, _: 1.5 / M if way is tune._expanded else 2.0 - (tried[-1].stages == 2))
    subject = tune.Subject(Scheme(4, 32), latency.packed_weights(48, 64, Scheme(4, 32), CPU, torch.float16, 1, torch.Generator()))
    table = tune._of_gpu([subject], 1, launch.describe(CPU), CPU, torch.float16, silent)
    assert table.measured
    assert {key.M for key in table.launches} == {1, 2}
    assert {(key.N, key.K, key.group, key.bits) for key in table.launches} == {(48, 64, 32, 4)}
    assert {how.stages for how in table.launches.values()} == {2}
    assert len(set(tried)) > 2
    assert table.fused_rows == 1  # 1.0 against 1.5, and then 0.75


def test_nothing_to_tune_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "layout_for", lambda *_: "words")
    with pytest.raises(CompressError, match="No layer goes through a kernel"):
        tune.measure({(32, 64): 1}, [Scheme(4, 32)], CPU, torch.bfloat16)
    assert not launch.user_file().exists()


def test_a_damaged_file_is_not_overwritten(monkeypatch):
    launch.user_file().write_text("{}")
    timed(monkeypatch, lambda *_: 1.0)
    with pytest.raises(CompressError, match="delete it"):
        tune.measure({(32, 64): 1}, [Scheme(4, 32)], CPU, torch.bfloat16)
    assert launch.user_file().read_text() == "{}"
