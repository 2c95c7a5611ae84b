"""A quantized layer between the swap and the end of loading: room for the stored tensors under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress import models
from compress.errors import CompressError
from compress.kernels import dispatch
from compress.nn import PackedWeight, QuantConv2d, QuantLinear
from compress.qtensor import QTensor
from compress.spec import Scheme

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name: dtype and shape


class Placeholder(nn.Module):
    """A quantized layer while it loads: its buffers are the stored tensors, under the names they have in the checkpoint."""

    bias: nn.Parameter | None

    def __init__(self, dense: nn.Module, scheme: Scheme, layout: Layout) -> None:
        super().__init__()
        self.scheme, self.layout = scheme, layout
        self._dense = (dense,)  # in a tuple, so that it is no submodule and its weight is not asked for
        self.register_parameter("bias", dict(dense.named_parameters()).get("bias"))

    @property
    def dense(self) -> nn.Module:
        return self._dense[0]

    def __getattr__(self, name: str) -> Any:
        """Also the dense layer's weight, without data, for models that initialize a child's by name; marked as not to be."""
        if name != "weight" or "weight" in self.layout:
            return super().__getattr__(name)
        weight: Any = self.dense.weight
        weight._is_hf_initialized = True
        return weight

    def expect(self, name: str, stored: Layout) -> None:
        """Make room for exactly what is stored; raise where it is not what the scheme needs."""
        for key, (dtype, shape) in self.layout.items():
            found = stored.get(f"{name}.{key}")
            if found is None:
                raise CompressError(
                    f"The checkpoint lacks {name}.{key}, which its config promises ({self.scheme}). Copy or make it again."
                )
            if found[1] != shape or found[0].is_floating_point != dtype.is_floating_point:
                raise CompressError(
                    f"{name}.{key} should be {list(shape)} for an {self.scheme} layer, but is {list(found[1])} of {found[0]}. "
                    "The config belongs to another checkpoint, or the packing is that of compressed-tensors before 0.18 (3 bits)."
                )
            self.register_buffer(key, torch.empty(shape, dtype=found[0], device="meta"))
        if self.bias is not None and f"{name}.bias" not in stored:
            raise CompressError(f"The checkpoint lacks {name}.bias. Copy or make it again.")

    def packed(self, q: QTensor) -> PackedWeight:
        """The layer that serves `q`, where that is."""
        zeros = None if bool((q.zeros == q.scheme.zero).all()) else q.zeros
        packed = dispatch.prepare(
            q.codes,
            q.scales,
            zeros,
            bits=q.scheme.bits,
            g_idx=q.g_idx,
            form=q.scheme.form,
            global_scale=q.global_scale,
        )
        if isinstance(self.dense, nn.Conv2d):
            return QuantConv2d(packed, self.scheme, self.dense, self.bias)
        return QuantLinear(packed, self.scheme, self.bias, self.dense)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """N and K of a layer."""
    N, K = models.matrix(module).shape
    return N, K
