from __future__ import annotations

import pytest
import torch

from compress.kernels import launch, planar
from compress.kernels.launch import Device, Key, Launch, Table

H200, SMALL = Device("NVIDIA H200", 132, 232448), Device("NVIDIA something", 30, 101376)


@pytest.mark.parametrize("device", [H200, SMALL])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 100, 512])
def test_every_launch_fits_and_divides(M, bits, device):
    for N, K in ((1, 33), (4096, 4096), (28672, 8192)):
        how = launch.rule(M, N, K, bits, device)
        assert how.BN in (64, 128)
        assert how.BM in (8, 16, 32, 64, 128)
        assert 2 <= how.stages <= launch.MOST_STAGES
        assert launch.shared_bytes(how.BN, how.BM, bits, how.stages) <= device.shared
        assert how.parts == 1 or launch.blocks(K, bits) >= how.parts * launch.LEAST_BLOCKS


def test_small_products_are_cut_until_the_chip_is_full():
    assert launch.rule(1, 4096, 4096, 4, H200).parts == 8
    assert launch.rule(1, 8192, 8192, 4, H200).parts == 8
    assert launch.rule(1, 4096, 512, 4, H200).parts == 1
    assert launch.rule(512, 14336, 4096, 4, H200).parts == 1


@pytest.mark.parametrize("M", [1, 16, 32, 64])
@pytest.mark.parametrize(("N", "K"), [(8192, 8192), (28672, 8192), (8192, 28672), (28672, 4096)])
def test_multiprocessors_have_about_the_same_work(M, N, K):
    """28672 rows are 224 tiles of 128, which leave 132 multiprocessors with one or two: 36 of 100 would wait."""
    how = launch.rule(M, N, K, 4, H200)
    programs = -(-N // how.BN) * how.parts
    assert programs / H200.processors / -(-programs // H200.processors) > 0.84


def test_rows_that_make_no_more_tiles_change_nothing():
    """A launch compiles where its sizes are new, and rows come in every number."""
    for few, many in ((1, 8), (9, 16), (33, 64), (65, 128), (129, 256)):
        assert launch.rule(few, 8192, 8192, 4, H200) == launch.rule(many, 8192, 8192, 4, H200)


def test_the_table_comes_before_the_rule(monkeypatch):
    mine = Launch(64, 16, 3, 4, 2)
    table = Table(launches={Key(4, 256, 512, 64, 4): mine})
    monkeypatch.setattr(launch, "TABLES", {"NVIDIA H200": table})
    launch.table_of.cache_clear()
    assert launch.table_of("NVIDIA H200 NVL") is table
    assert launch.choose(3, 256, 512, 8, 4, H200) == mine
    assert launch.choose(5, 256, 512, 8, 4, H200) == launch.rule(5, 256, 512, 4, H200)
    assert launch.choose(3, 256, 512, 8, 4, SMALL) == launch.rule(3, 256, 512, 4, SMALL)
    launch.table_of.cache_clear()


def test_scratch_is_bounded_in_whole_tiles():
    limit = launch.table_of(H200.name).scratch
    for N, K in ((100, 64), (28672, 8192), (1, 1 << 29)):
        rows = launch.scratch_rows(N, K, 2, H200)
        assert rows == N or rows % launch.TILE == 0
        assert rows * K * 2 <= max(limit, launch.TILE * K * 2)


def test_neighbours_differ_in_one_piece_and_fit():
    for how in (launch.rule(16, 4096, 4096, 4, H200), Launch(128, 128, 2, 8, 3)):
        near = launch.neighbours(how, 128, 4096, 4096, 4, H200)
        assert near
        assert how not in near
        for one in near:
            changed = {name for name in ("BN", "BM", "parts", "warps", "stages") if getattr(one, name) != getattr(how, name)}
            assert changed in ({"BN"}, {"warps"}, {"BN", "warps"}, {"BM"}, {"parts"}, {"stages"})
            assert (one.BN, one.warps) in ((64, 4), (128, 4), (128, 8), (256, 16))
            assert launch.shared_bytes(one.BN, one.BM, 4, one.stages) <= H200.shared
            assert how in launch.neighbours(one, 128, 4096, 4096, 4, H200)
    tight = launch.rule(1, 64, 64, 2, SMALL)
    assert all(one.parts == 1 and one.BM == 8 for one in launch.neighbours(tight, 1, 64, 64, 2, SMALL))


def test_tiles_end_where_padded_rows_do():
    for N, widest in ((4096, 256), (4000, 256), (4224, 128), (100, 128)):
        near = launch.neighbours(Launch(128, 64, 2, 8, 3), 64, N, 4096, 4, H200)
        assert max(one.BN for one in near) == widest
        assert planar.to_planar(torch.zeros(N, 64, dtype=torch.uint8), torch.ones(N, 1), None, 4)["scales"].shape[1] % widest == 0


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The user's file, empty before and forgotten after."""
    path = tmp_path / "folder" / "kernels.json"
    monkeypatch.setenv(launch.FILE, str(path))
    launch.table_of.cache_clear()
    yield path
    launch.table_of.cache_clear()


def test_tables_survive_their_file_and_come_first(file):
    mine = Table(True, 100, 1 << 20, {Key(4, 256, 512, 64, 4): Launch(64, 16, 3, 4, 2)}, {"nibbles": 7, "bytes": 0})
    assert launch.table_of("NVIDIA H200") == launch.TABLES["NVIDIA H200"]
    launch.write(file, {"NVIDIA H200": mine, "a CPU": Table()})
    assert launch.read(file) == {"NVIDIA H200": mine, "a CPU": Table()}
    assert launch.table_of("NVIDIA H200") == mine
    assert launch.table_of("NVIDIA H200 NVL") == launch.TABLES["NVIDIA H200"]  # another device
    assert launch.choose(3, 256, 512, 8, 4, H200) == Launch(64, 16, 3, 4, 2)
    assert [path.name for path in file.parent.iterdir()] == ["kernels.json"]


def test_few_rows_of_a_cpu_follow_the_file(file):
    cpu = torch.device("cpu")
    assert launch.few_rows("nibbles", cpu) == 64
    launch.write(file, {launch.describe(cpu).name: Table(few_rows={"nibbles": 3, "bytes": 2})})
    assert launch.few_rows("nibbles", cpu) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "devices": {"a": {"launches": [{}]}}}'])
def test_a_damaged_file_is_named(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"kernels\.json is no file of kernel tables"):
        launch.read(file)
