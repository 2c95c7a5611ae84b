"""Layer-wise solvers: W and what calibration learned of its inputs in, a solved layer out. Pure: inputs are not changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.qtensor import QTensor, Solved
from compress.solvers import coupled, fused, gptq, pruners, rtn
from compress.solvers.options import Options
from compress.spec import LayerSpec, Scheme


class Quantizer(Protocol):
    def __call__(
        self, W: Float[Tensor, "N K"], stats: LayerStats | None, scheme: Scheme, scale_dtype: torch.dtype, options: Options
    ) -> QTensor: ...


class Pruner(Protocol):
    def __call__(
        self, W: Float[Tensor, "N K"], stats: LayerStats | None, spec: LayerSpec, stored: torch.dtype, options: Options
    ) -> Solved: ...


QUANTIZERS: dict[str, Quantizer] = {"gptq": gptq.solve, "rtn": rtn.solve}
PRUNERS: dict[str, Pruner] = {
    "alps": pruners.alternating,
    "sparsegpt": pruners.sparsegpt,
    "wanda": pruners.wanda,
    "magnitude": pruners.magnitude,
    "obs": pruners.exact,
}
UNCALIBRATED = frozenset({"rtn", "magnitude"})


def solve(
    W: Float[Tensor, "N K"],
    stats: LayerStats | None,
    spec: LayerSpec,
    stored: torch.dtype,
    options: Options,
    quantizer: str = "gptq",
    pruner: str = "alps",
    keep: Bool[Tensor, "N K"] | None = None,
) -> Solved:
    """Solve a layer as `spec` asks; without statistics by magnitude and rounding to nearest.

    `stored` is the dtype that scales, or weights without a grid, will have on disk. Where `spec` asks for a grid alone, all
    weights outside `keep` are zero in the result.
    """
    if spec.sparsity is not None:
        if stats is not None and not stats.H.any():
            return replace(
                pruners.magnitude(W, None, spec, stored, options),
                notes=("pruned by magnitude: its inputs are all zero on the calibration data",),
            )
        return PRUNERS[pruner if stats else "magnitude"](W, stats, spec, stored, options)
    if spec.scheme is None:
        raise ValueError("nothing to solve: the layer stays dense")
    if keep is not None:
        return _on_mask(W, stats, spec, stored, options, quantizer, keep)
    if quantizer == "gptq" and stats is not None and stats.outputs is not None:
        return coupled.solve(W, stats, spec.scheme, stored, options)
    return QUANTIZERS[quantizer if stats else "rtn"](W, stats, spec.scheme, stored, options)


def _on_mask(
    W: Float[Tensor, "N K"],
    stats: LayerStats | None,
    spec: LayerSpec,
    stored: torch.dtype,
    options: Options,
    quantizer: str,
    keep: Bool[Tensor, "N K"],
) -> Solved:
    """Put the weights in `keep` on a grid, with zeros everywhere else."""
    assert spec.scheme is not None
    if stats is None or quantizer != "gptq":
        return QUANTIZERS["rtn"](W * keep, stats, spec.scheme, stored, options)
    if stats.outputs is not None:
        return coupled.solve(W, stats, spec.scheme, stored, options, keep)
    return pruners.finish(W.float(), ~keep, stats, spec, stored, options)


def solve_alike(
    weights: Sequence[Float[Tensor, "N K"]],
    stats: Sequence[LayerStats | None],
    spec: LayerSpec,
    stored: torch.dtype,
    options: Options,
    quantizer: str = "gptq",
    pruner: str = "alps",
    keeps: Sequence[Bool[Tensor, "N K"] | None] | None = None,
) -> list[Solved]:
    """`solve` for layers of one shape, each with statistics and a mask of its own or with none; GPTQ's on a GPU all at once."""
    found: dict[int, Solved] = {}
    keeps = keeps or [None] * len(weights)
    if quantizer == "gptq" and spec.sparsity is None and spec.scheme and fused.serves(weights[0].device, spec):
        known = {i: one for i, one in enumerate(stats) if one is not None and one.outputs is None and keeps[i] is None}
        together = gptq.solve_alike([weights[i] for i in known], list(known.values()), spec.scheme, stored, options)
        found |= zip(known, together, strict=True)
    for i, (W, one) in enumerate(zip(weights, stats, strict=True)):
        found[i] = found.get(i) or solve(W, one, spec, stored, options, quantizer, pruner, keeps[i])
    return [found[i] for i in range(len(weights))]
