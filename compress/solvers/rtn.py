"""Round to nearest: the baseline, and the fallback where a Hessian cannot be factorised. Needs no calibration."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import matmul_nt
from compress.qtensor import QTensor, codes_of, dequantize, round_to_grid
from compress.solvers import grid
from compress.solvers.options import Options
from compress.spec import Scheme


def solve(
    W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
) -> QTensor:
    """The nearest grid point of every weight, after a search of each group's range for the least squared error."""
    N, K = W.shape
    grouped = W.float().view(N, scheme.groups(K), -1)
    storage = grid.Storage.of(scheme, W, scale_dtype)
    fitted = grid.fit(grouped, None, scheme, storage, options.candidates)
    zeros = fitted.zeros[..., None]
    codes = codes_of(round_to_grid(grouped, fitted.scales[..., None], zeros, scheme), zeros, scheme)
    scales = storage.of_rounded(fitted.scales)
    q = QTensor(codes.view(N, K), scales, fitted.zeros.byte(), scheme, global_scale=storage.global_scale)
    return q if stats is None else replace(q, error=output_error(W.float() - dequantize(q), stats.H))


def output_error(E: Float[Tensor, "N K"], H: Float[Tensor, "K K"]) -> Float[Tensor, "N"]:
    """diag(E H E^T): the expected squared error of every output, for weights that are off by E."""
    return (matmul_nt(E, H) * E).sum(1)
