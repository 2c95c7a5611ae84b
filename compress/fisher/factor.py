"""Cholesky factors, or an error that says what to do."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import CompressError


def factorise(A: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The lower Cholesky factors of matrices that are a Fisher, or stand for one."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(A)
    if bool(info.any()):
        raise CompressError("The Fisher is not positive definite to working precision. Use more damping.")
    return lower
