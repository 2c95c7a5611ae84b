"""The best weights on a given support: least squares for every row, by conjugate gradients on all rows at once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.linalg import matmul_nt

ITERATIONS = 32
TOLERANCE = 1e-4  # of the preconditioned residual against the right side: the error is then within 1e-8 of its minimum's scale


def refit(
    W: Float[Tensor, "N K"], H: Float[Tensor, "K K"], keep: Bool[Tensor, "N K"], start: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N K"]:
    """For every row the weights on `keep`, zero elsewhere, that minimise (v - w) H (v - w)^T.

    Each row solves `H_SS v_S = (H w)_S` for its own support S; residuals are masked, so that all rows share the products with
    H, and scaled by its diagonal (Jacobi). The error falls monotonically from that of `start`, by default W with zeros.
    """
    support = keep.to(W.dtype)
    scale = (support / H.diagonal().clamp(min=torch.finfo(W.dtype).tiny)).contiguous()
    V = (W if start is None else start) * support
    R = matmul_nt(W - V, H) * support
    Z = R * scale
    P = Z.clone()
    rz = (R * Z).sum(1, keepdim=True)
    enough = TOLERANCE**2 * (matmul_nt(W, H).square() * scale).sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        if bool((rz <= enough).all()):
            break
        HP = matmul_nt(P, H) * support
        curvature = (P * HP).sum(1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature.clamp(min=torch.finfo(W.dtype).tiny), 0)
        V.addcmul_(P, step)
        R.addcmul_(HP, step, value=-1)
        torch.mul(R, scale, out=Z)
        rz_next = (R * Z).sum(1, keepdim=True)
        P.mul_(rz_next / rz.clamp(min=torch.finfo(W.dtype).tiny)).add_(Z)
        rz = rz_next
    return V
