"""Ordinary weights that lie on the grid: no smaller, but everything loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import qtensor
from compress.qtensor import QTensor, Solved
from compress.spec import Plan, Scheme

if TYPE_CHECKING:
    from compress.models import Layer


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    return model_dtype


def encode(q: Solved, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:  # noqa: ARG001 - nothing to choose
    """`weight [N, K]` in the dtype of the scales; convolutions and transposed layers are for the writer to reshape."""
    return {"weight": qtensor.dense(q, q.scales.dtype if isinstance(q, QTensor) else q.weight.dtype)}


def layout(
    scheme: Scheme,  # noqa: ARG001 - every scheme becomes the same tensor
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {"weight": (scale_dtype, shape)}


def config(plan: Plan, layers: Sequence[Layer], dense_modules: Sequence[str]) -> None:
    """None: the checkpoint is an ordinary one."""
