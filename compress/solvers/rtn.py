"""Round to nearest: the baseline, and the fallback where a Hessian cannot be factorised. Needs no calibration."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.linalg import matmul_nt
from compress.qtensor import QTensor, dequantize, round_to_grid
from compress.solvers import grid
from compress.solvers.options import Options
from compress.spec import Scheme


def solve(
    W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
) -> QTensor:
    """The nearest grid point of every weight, after a search of each group's range for the least squared error."""
    N, K = W.shape
    grouped = W.float().view(N, scheme.groups(K), -1)
    fitted = grid.fit(grouped, None, scheme, scale_dtype, options.candidates)
    codes = round_to_grid(grouped, fitted.scales[..., None], fitted.zeros[..., None], scheme.levels)
    q = QTensor(codes.view(N, K).byte(), fitted.scales.to(scale_dtype), fitted.zeros.byte(), scheme)
    return q if stats is None else replace(q, error=output_error(W.float() - dequantize(q), stats.H))


def output_error(E: Float[Tensor, "N K"], H: Float[Tensor, "K K"]) -> Float[Tensor, "N"]:
    """diag(E H E^T): the expected squared error of every output, for weights that are off by E."""
    return (matmul_nt(E, H) * E).sum(1)
