"""Seconds to solve one layer by GPTQ on this machine's CPU, against the textbook form of the same algorithm.

    python -m benchmarks.solver [--append]

The textbook form is that of the paper (arXiv 2210.17323): Cholesky factor, inverse, Cholesky factor of that, and column by
column in blocks of 128 with the others updated lazily. Both round to the same grid; the textbook form gets its scales for free.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.record import Measurement
from compress.calib.stats import LayerStats
from compress.qtensor import QTensor, dequantize, round_to_grid
from compress.solvers import gptq
from compress.solvers.options import Options
from compress.solvers.rtn import output_error
from compress.spec import Scheme

SIZE, BLOCK, RUNS = 4096, 128, 3
SCHEME, OPTIONS = Scheme(4, 128), Options()


def textbook(W: Tensor, H: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The dequantized weights by GPTQ's Algorithm 1, in natural order with given scales."""
    H = H + OPTIONS.damping * H.diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, Q = W.clone(), torch.empty_like(W)
    for start in range(0, len(H), BLOCK):
        stop = start + BLOCK
        block, errors = W[:, start:stop].clone(), torch.empty(len(W), BLOCK)
        for j in range(BLOCK):
            scale, zero = scales[:, start // SCHEME.group_size], zeros[:, start // SCHEME.group_size]
            q = round_to_grid(block[:, j], scale, zero, SCHEME) * scale
            errors[:, j] = (block[:, j] - q) / U[start + j, start + j]
            block[:, j:] -= errors[:, j : j + 1] @ U[start + j : start + j + 1, start + j : stop]
            Q[:, start + j] = q
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q


def measure() -> list[Measurement]:
    """Seconds of both, in turn, on a layer whose inputs are correlated; the textbook form gets our scales."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(SIZE, SIZE, generator=generator)
    x = torch.randn(2 * SIZE, SIZE, generator=generator) * torch.logspace(0, 1, SIZE)
    x += x.roll(1, 1)
    H = x.t() @ x / len(x)
    q: list[QTensor] = []

    def ours() -> Tensor:
        q[:] = [gptq.solve(W, LayerStats(H, len(x)), SCHEME, torch.float16, OPTIONS)]
        return dequantize(q[0])

    forms: dict[str, Callable[[], Tensor]] = {
        "compress": ours,
        "textbook": lambda: textbook(W, H, q[0].scales.float(), q[0].zeros.float()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    errors = {}
    for _ in range(RUNS):
        for name, solve in forms.items():
            start = time.perf_counter()
            Q = solve()
            seconds[name].append(time.perf_counter() - start)
            errors[name] = (output_error(W - Q, H).sum() / output_error(W, H).sum()).item()
    setting = f"{SIZE} x {SIZE}, {SCHEME}"
    ratios = [slow / fast for slow, fast in zip(seconds["textbook"], seconds["compress"], strict=True)]
    return [
        *(Measurement.of(name, setting, "time to solve", "s", each) for name, each in seconds.items()),
        *(Measurement(name, setting, "output error", error, "") for name, error in errors.items()),
        Measurement.of("compress", setting, "times as fast as the textbook form", "x", ratios),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true", help="to results.csv")
    append = parser.parse_args().append
    measured = measure()
    for one in measured:
        print(f"{one.subject:10} {one.metric:36} {one.value:9.4g} {one.unit}  +-{one.spread / 2:.2g}")
    if append:
        record.append("solver", measured, "")


if __name__ == "__main__":
    main()
