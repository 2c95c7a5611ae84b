from __future__ import annotations

import pytest

from compress.kernels import launch
from compress.kernels.launch import Device, Key, Launch, Table

H200, SMALL = Device("NVIDIA H200", 132, 232448), Device("NVIDIA something", 30, 101376)


@pytest.mark.parametrize("device", [H200, SMALL])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 100, 512])
def test_every_launch_fits_and_divides(M, bits, device):
    for N, K in ((1, 33), (4096, 4096), (28672, 8192)):
        how = launch.rule(M, N, K, bits, device)
        assert how.BN in (64, 128)
        assert how.BM in (16, 32, 64, 128)
        assert 2 <= how.stages <= launch.MOST_STAGES
        assert how.stages * launch.stage_bytes(how.BN, how.BM, bits) <= device.shared
        assert how.parts == 1 or launch.blocks(K, bits) >= how.parts * launch.LEAST_BLOCKS


def test_small_products_are_cut_until_the_chip_is_full():
    assert launch.rule(1, 4096, 4096, 4, H200).parts == 8
    assert launch.rule(1, 8192, 8192, 4, H200).parts == 4
    assert launch.rule(1, 28672, 4096, 4, H200).parts == 1
    assert launch.rule(1, 4096, 512, 4, H200).parts == 1
    assert launch.rule(512, 14336, 4096, 4, H200).parts == 1


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
