"""Layer-wise solvers: `solve(W, stats, scheme, scale_dtype, options) -> QTensor`. Pure: inputs are not changed."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.qtensor import QTensor
from compress.solvers import gptq, rtn
from compress.solvers.options import Options
from compress.spec import Scheme


class Solver(Protocol):
    def __call__(
        self, W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
    ) -> QTensor: ...


SOLVERS: dict[str, Solver] = {"gptq": gptq.solve, "rtn": rtn.solve}
NEEDS_CALIBRATION = frozenset({"gptq"})
