from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError
from compress.formats import sparse


@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (3, 2, 3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unpack_is_the_inverse_of_pack(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    weight[torch.rand(shape) < 0.6] = 0
    tensors = sparse.pack(weight)
    assert set(tensors) == set(sparse.SUFFIXES)
    assert torch.equal(sparse.unpack(tensors), weight)
    kept = int((weight != 0).sum())
    assert sum(t.nbytes for t in tensors.values()) == sparse.nbytes(weight.numel(), kept, dtype.itemsize, len(shape))


def test_the_bytes_are_fixed():
    weight = torch.tensor([[0, 1.5, 0, 0, -2, 0, 0, 0, 4]])
    tensors = sparse.pack(weight)
    assert tensors["weight_bitmask"].tolist() == [0b00010010, 0b1]
    assert tensors["weight_values"].tolist() == [1.5, -2, 4]


def test_a_missing_value_is_noticed():
    tensors = sparse.pack(torch.ones(2, 8))
    tensors["weight_values"] = tensors["weight_values"][1:]
    with pytest.raises(CompressError, match="15 values for 16 bits"):
        sparse.unpack(tensors)
