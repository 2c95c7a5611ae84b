"""Modules that hold a layer packed and multiply through `kernels.dispatch`; no dense copy of the weight is ever kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from compress.kernels import dispatch, reference
from compress.kernels.dispatch import Packed
from compress.spec import Scheme


class PackedWeight(nn.Module):
    """A packed weight [N, K] and an optional bias.

    The tensors of `packed` are this module's buffers, so they follow `.to(device)` and are laid out anew for another kind of
    device. Casts such as `.half()` reach the bias only: the scales keep the dtype they are stored in.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, scheme: Scheme, bias: Float[Tensor, "N"] | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        self._hold(packed)

    def _hold(self, packed: Packed) -> None:
        self._buffers.clear()
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.packed = replace(packed, tensors=cast("dict[str, Tensor]", self._buffers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        held = dict(self._buffers)
        self._buffers.clear()  # keeps nn.Module from casting them
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(held)
        device = next(iter(self.packed.tensors.values())).device
        target = fn(torch.empty(0, dtype=torch.int32, device=device)).device  # what fn does to an integer tensor is its move
        if target != device:
            self._hold(dispatch.move(self.packed, target))
        return self

    def extra_repr(self) -> str:
        N, K = self.packed.shape
        return f"{K}, {N}, bias={self.bias is not None}, {self.scheme}, layout={self.packed.layout}"


class QuantLinear(PackedWeight):
    """A linear layer; also takes the place of GPT-2's Conv1D, whose weight is the transpose."""

    def __init__(self, packed: Packed, scheme: Scheme, bias: Float[Tensor, "N"] | None = None) -> None:
        super().__init__(packed, scheme, bias)
        self.out_features, self.in_features = packed.shape

    def forward(self, x: Float[Tensor, "*M K"]) -> Float[Tensor, "*M N"]:
        return dispatch.linear(x, self.packed, self.bias)


class QuantConv2d(PackedWeight):
    """A convolution whose weight is the packed matrix [out, in / groups * height * width], dequantized in every call."""

    def __init__(self, packed: Packed, scheme: Scheme, dense: nn.Conv2d, bias: Float[Tensor, "N"] | None = None) -> None:
        """Take the geometry, but no tensors, from `dense`."""
        super().__init__(packed, scheme, bias)
        self.in_channels, self.out_channels, self.groups = dense.in_channels, dense.out_channels, dense.groups
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        self._edges = dense._reversed_padding_repeated_twice

    def forward(self, x: Float[Tensor, "*B C height width"]) -> Float[Tensor, "*B N out_height out_width"]:
        compute = reference.compute_dtype(x)
        weight = dispatch.dequantize(self.packed).to(compute).view(self.out_channels, -1, *self.kernel_size)
        inputs: Tensor = x.to(compute)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            inputs, padding = functional.pad(inputs, self._edges, mode=self.padding_mode), 0
        bias = None if self.bias is None else self.bias.to(compute)
        return functional.conv2d(inputs, weight, bias, self.stride, padding, self.dilation, self.groups).to(x.dtype)
