from __future__ import annotations

import pytest
import torch

from compress.kernels import cpu


def test_the_arrangement_of_planes_is_known_here():
    assert cpu.block_rows() in (16, 32, 64)


@pytest.mark.parametrize("N", [16, 48, 64, 80, 208])
def test_every_nibble_of_a_plane_is_found_again(N):
    codes = torch.randint(0, 16, (N, 96), dtype=torch.uint8)
    plane = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(cpu._codes(plane, cpu._block()), codes)
    assert torch.equal(cpu._plane(codes, cpu._block()), plane)


def test_an_unknown_arrangement_is_noticed_and_said(monkeypatch):
    scrambled = torch.randperm(3 * cpu.PROBE_K // 2, generator=torch.Generator().manual_seed(1))
    true_arrange = cpu._arrange

    def arrange(codes):
        plane = true_arrange(codes)
        return plane[:, scrambled] if plane.shape[1] == len(scrambled) else plane

    monkeypatch.setattr(cpu, "_arrange", arrange)
    cpu.block_rows.cache_clear()
    with pytest.warns(UserWarning, match="plain words"):
        assert cpu.block_rows() is None
    assert not cpu.nibbles_fit(128)
    cpu.block_rows.cache_clear()


def _uneven(block):
    return slice(0, 4), slice(4, block)  # both read half a block's rows into slices of other lengths


def _refused(_block):
    raise RuntimeError("Shape 16 is invalid")


@pytest.mark.parametrize("halves", [_uneven, _refused])
def test_an_arrangement_that_cannot_be_inverted_is_none(monkeypatch, halves):
    monkeypatch.setattr(cpu, "_halves", halves)
    cpu.block_rows.cache_clear()
    with pytest.warns(UserWarning, match="plain words"):
        assert cpu.block_rows() is None
    cpu.block_rows.cache_clear()


@pytest.mark.parametrize(("group", "expected"), [(512, 256), (128, 128), (96, 32), (64, 64), (80, None), (33, None)])
def test_a_coarser_scale_is_repeated_over_groups_of_the_kernel(group, expected):
    assert cpu.kernel_group(group) == expected


def test_bfloat16_scales_are_kept_once(weight):
    for dtype, kept in ((torch.bfloat16, False), (torch.float16, True)):
        codes, scales, zeros = weight(32, 256, 64, 4, dtype=dtype)
        assert ("scales" in cpu.to_nibbles(codes, scales, zeros, 4)) is kept
