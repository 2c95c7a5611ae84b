from __future__ import annotations

import pytest
import torch

from compress.qtensor import QTensor, dequantize, round_to_grid
from compress.spec import Scheme


def example(scheme: Scheme, N: int = 6, K: int = 64) -> QTensor:
    g = torch.Generator().manual_seed(0)
    G = scheme.groups(K)
    codes = torch.randint(scheme.levels, (N, K), generator=g, dtype=torch.uint8)
    zeros = torch.randint(scheme.levels, (N, G), generator=g, dtype=torch.uint8)
    return QTensor(codes, torch.randn(N, G, generator=g), zeros, scheme)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, -1, False), Scheme(8, 16)], ids=str)
def test_dequantize_is_scale_times_code_minus_zero(scheme):
    q = example(scheme)
    for n in range(6):
        for k in range(64):
            g = k // scheme.group(64)
            expected = (int(q.codes[n, k]) - int(q.zeros[n, g])) * q.scales[n, g]
            assert dequantize(q)[n, k] == expected


def test_dequantize_rounds_once():
    q = example(Scheme(8, 32))
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q).bfloat16())


def test_g_idx_says_which_group_an_input_belongs_to():
    q = example(Scheme(4, 16))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    trivial = torch.arange(64) // 16
    shuffled = QTensor(q.codes[:, order], q.scales, q.zeros, q.scheme, g_idx=trivial[order])
    assert torch.equal(dequantize(shuffled), dequantize(q)[:, order])


def test_rows_of_a_stack_are_the_layers_that_were_stacked():
    q = example(Scheme(4, 32))
    parts = [q.rows(0, 2), q.rows(2, 6)]
    assert torch.equal(torch.cat([dequantize(p) for p in parts]), dequantize(q))


def test_round_to_grid_clamps_and_rounds_halves_to_even():
    w = torch.tensor([-100.0, -1.5, -0.5, 0.5, 0.6, 100.0])
    assert round_to_grid(w, torch.tensor(1.0), torch.tensor(8.0), Scheme(4)).tolist() == [-8, -2, 0, 0, 1, 7]
