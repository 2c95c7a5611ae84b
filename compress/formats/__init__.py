"""How a solved layer is written: one module per format, plain functions, bit-exact inverse pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import compressed_tensors, dense, gptq
from compress.qtensor import QTensor
from compress.spec import Plan, Scheme

if TYPE_CHECKING:
    from compress.models import Layer


@runtime_checkable
class Format(Protocol):
    """A way to write layers. Tensors are keyed by what follows the layer's name and a dot."""

    def encode(self, q: QTensor, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The tensors that hold `q`. `config` is for writing back into another tool's checkpoint in its own conventions."""

    def layout(
        self, scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor that `encode` yields for a layer of `shape` (N, K)."""

    def config(self, plan: Plan, layers: Sequence[Layer], dense_modules: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config` for config.json, or None; `dense_modules` are the linears left dense."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which scales must be solved, given the model's."""


@runtime_checkable
class PackedFormat(Format, Protocol):
    """A format that keeps the codes, so that it can be read back."""

    def encode(self, q: QTensor, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The tensors that hold `q`, in the convention of the checkpoint's `config`; None means ours."""

    def decode(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], config: Mapping[str, Any] | None = None
    ) -> QTensor:
        """The inverse of `encode`, bit for bit; `config` is the checkpoint's, None for our own conventions."""

    def scheme_of(self, config: Mapping[str, Any], name: str, class_name: str) -> Scheme | None:
        """What any checkpoint's `quantization_config` says of a module; None is dense, CompressError is beyond us."""


PACKED: Mapping[str, PackedFormat] = MappingProxyType({"compressed-tensors": compressed_tensors, "gptq": gptq})
FORMATS: Mapping[str, Format] = MappingProxyType({"compressed-tensors": compressed_tensors, "gptq": gptq, "dense": dense})


def packed_format(config: Mapping[str, Any]) -> PackedFormat:
    """The format of a checkpoint's `quantization_config`; raises for one that is not among ours."""
    method = str(config.get("quant_method"))
    if method not in PACKED:
        raise CompressError(f"The checkpoint is quantized with {method}; only {' and '.join(PACKED)} can be read.")
    return PACKED[method]
