"""The fused column loop against the same loop in plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from compress.kernels.columns import BLOCK, State, round_columns_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(layers, C, N, G, bits, symmetric):
    generator = torch.Generator().manual_seed(C + N + bits)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    X = normal(layers, C, 3 * C) + normal(layers, 1, 3 * C)
    H = X @ X.mT / (3 * C) + 0.01 * torch.eye(C)
    R = torch.linalg.cholesky(H.flip(1, 2)).flip(1, 2)
    diagonal = R.diagonal(dim1=1, dim2=2)
    W, carried = normal(layers, C, N), 0.1 * normal(layers, C, N)
    scales = (normal(layers, G, N).abs() + 3) / 2**bits
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 2**bits, scales.shape, generator=generator).float()
    group_of = torch.randint(0, G, (layers, C), generator=generator)
    keep = torch.rand(layers, C, N, generator=generator) < 0.6
    return [t.to(DEVICE) for t in (W, W + carried, R / diagonal[:, None], diagonal.square(), scales, zeros, group_of)], keep.to(
        DEVICE
    )


def one_by_one(W, T, Ut, D, scales, zeros, group_of, levels, keep=None):
    T = T.clone()
    codes, E, loss = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W[:, 0])
    for layer in range(len(W)):
        for j in range(W.shape[1]):
            scale, zero = scales[layer, group_of[layer, j]], zeros[layer, group_of[layer, j]]
            code = (torch.round(T[layer, j] / scale) + zero).clamp(0, levels - 1)
            if keep is not None:
                code = torch.where(keep[layer, j], code, zero)
            codes[layer, j] = code
            E[layer, j] = W[layer, j] - (code - zero) * scale
            loss[layer] += D[layer, j] * (T[layer, j] - (code - zero) * scale) ** 2
            T[layer, j + 1 :] += Ut[layer, j, j + 1 :, None] * E[layer, j]
    return codes.to(torch.uint8), E, loss


def state(W, T, Ut, D, scales, zeros, group_of, keep=None):  # noqa: ARG001
    """Copies of what the loop changes."""
    codes, loss = torch.zeros_like(W, dtype=torch.uint8), torch.zeros_like(W[:, 0])
    return State(W.clone(), T.clone(), D, scales, zeros, group_of.int(), codes, loss, keep)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("layers", "C", "N", "G", "bits"),
    [pytest.param(1, 128, 17, 4, 4, marks=pytest.mark.slow), (3, 16, 33, 1, 2), (2, 34, 7, 2, 3), (1, 1, 5, 1, 8)],
)
def test_codes_errors_and_losses_are_the_loops(layers, C, N, G, bits, symmetric, pruned):
    tensors, keep = problem(layers, C, N, G, bits, symmetric)
    given = keep if pruned else None
    found = state(*tensors, given)
    round_columns_(found, tensors[2], 0, C, 2**bits)
    codes, E, loss = one_by_one(*tensors, 2**bits, given)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.E, E, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-5)
    assert len(codes.unique()) > 1


def test_a_block_in_the_middle_leaves_the_others_alone():
    tensors, _ = problem(2, 24, 5, 3, 4, True)
    whole, found = state(*tensors), state(*tensors)
    round_columns_(found, tensors[2], 8, 19, 16)
    for changed, before in ((found.E, whole.E), (found.codes, whole.codes)):
        assert torch.equal(changed[:, :8], before[:, :8])
        assert torch.equal(changed[:, 19:], before[:, 19:])
        assert not torch.equal(changed[:, 8:19], before[:, 8:19])


def test_halves_round_to_even_as_torch_does():
    W = torch.arange(-40, 40, device=DEVICE)[None, None] / 2.0
    one = torch.ones(1, 1, 1, device=DEVICE)
    scales, zeros = torch.ones(1, 1, 80, device=DEVICE), torch.full((1, 1, 80), 128.0, device=DEVICE)
    found = state(W, W, one, one[0], scales, zeros, torch.zeros(1, 1, device=DEVICE))
    round_columns_(found, one, 0, 1, 256)
    assert torch.equal(found.codes.float() - 128, torch.round(W))
    assert torch.equal(found.E, W - torch.round(W))


def test_larger_blocks_are_refused():
    tensors, _ = problem(1, BLOCK + 1, 3, 1, 4, True)
    with pytest.raises(ValueError, match="129 columns"):
        round_columns_(state(*tensors), tensors[2], 0, BLOCK + 1, 16)
