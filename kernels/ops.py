"""The planar products as operators, which `torch.compile` takes whole; the first call imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import launch

SCHEMA = (
    "(Tensor x, Tensor low, Tensor? high, Tensor scales, Tensor? zeros, Tensor? bias, SymInt N, SymInt G, int bits) -> Tensor"
)

EXPERTS = "(Tensor x, Tensor experts, Tensor low, Tensor? high, Tensor scales, Tensor? zeros, int N, int G, int bits) -> Tensor"


def _tensors(low: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
    given = {"low": low, "high": high, "scales": scales, "zeros": zeros}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


@torch.library.custom_op("compress::planar_fused", mutates_args=(), schema=SCHEMA)
def planar_fused(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    N: int,
    G: int,
    bits: int,
) -> Tensor:
    """`x Q^T + bias` with weights that are decoded on the way into the product: for few rows."""
    from compress.kernels import wna16

    M, K = x.shape
    if not M:
        return x.new_empty(0, N)
    how = launch.choose(M, N, K, G, bits, launch.describe(x.device))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return wna16.multiply(x.contiguous(), _tensors(low, high, scales, zeros), bias, N, G, bits, how)


@torch.library.custom_op("compress::planar_expanded", mutates_args=(), schema=SCHEMA)
def planar_expanded(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    N: int,
    G: int,
    bits: int,
) -> Tensor:
    """`x Q^T + bias` by a dense product with weights dequantized into scratch memory: for many rows."""
    from compress.kernels import wna16

    rows = launch.scratch_rows(N, x.shape[1], x.element_size(), launch.describe(x.device))
    with torch.cuda.device_of(x):
        return wna16.multiply_expanded(x, _tensors(low, high, scales, zeros), bias, N, G, bits, rows)


@planar_fused.register_fake
@planar_expanded.register_fake
def _shape(
    x: Tensor,
    low: Tensor,  # noqa: ARG001
    high: Tensor | None,  # noqa: ARG001
    scales: Tensor,  # noqa: ARG001
    zeros: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    N: int,
    G: int,  # noqa: ARG001
    bits: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], N)


@torch.library.custom_op("compress::planar_experts", mutates_args=(), schema=EXPERTS)
def planar_experts(
    x: Tensor,
    experts: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    N: int,
    G: int,
    bits: int,
) -> Tensor:
    """Every row of x times the weights of the experts it goes to, [len(experts), N]; planar tensors of all experts, stacked."""
    from compress.kernels import wna16

    if not len(experts):
        return x.new_empty(0, N)
    how = launch.rule_for_experts(len(experts), len(low), N, x.shape[1], bits, launch.describe(x.device))
    with torch.cuda.device_of(x):
        return wna16.multiply_experts(x.contiguous(), _tensors(low, high, scales, zeros), experts, N, G, bits, how)


@planar_experts.register_fake
def _experts_shape(
    x: Tensor,
    experts: Tensor,
    low: Tensor,  # noqa: ARG001
    high: Tensor | None,  # noqa: ARG001
    scales: Tensor,  # noqa: ARG001
    zeros: Tensor | None,  # noqa: ARG001
    N: int,
    G: int,  # noqa: ARG001
    bits: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(experts.shape[0], N)
