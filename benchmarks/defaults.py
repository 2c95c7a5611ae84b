"""Which options of our own solver are best: an ablation on trained models, one change from the defaults at a time.

    python -m benchmarks.defaults [--models FOLDER...]

Judged on documents the model was trained on, a tenth of them kept from calibration; the held-out text stays unseen. The measure
is KL(dense || compressed) per token, which is steadier than perplexity. Variants that are no options are patched in: the default
has to beat them, too.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import itertools
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import record
from benchmarks.judge import SAMPLES, SEQ_LEN, Judge
from benchmarks.record import Measurement
from compress import models, qtensor, sequential
from compress.calib import corpus
from compress.calib.stats import LayerStats
from compress.mixed import derivatives, gradients
from compress.models import Anatomy
from compress.qtensor import QTensor, Solved, round_to_grid
from compress.sequential import Settings
from compress.solvers import QUANTIZERS, columns, gptq, grid, target
from compress.solvers.options import Options, Order
from compress.spec import Plan, Scheme

JUDGED = 96  # windows
SCHEMES = [Scheme(bits, group) for bits in (4, 3, 2) for group in (128, 32)]
SET_ASIDE_ONE_IN = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """A way to solve: options, and something to patch while it runs."""

    name: str
    options: Options
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    method: str = "gptq"


def variants() -> list[Variant]:
    """The default, every other value of its options, and changes that are no options."""
    default = Options.of("default")
    others = [Variant("effort fast", Options())]
    others += [Variant(f"{count} sweeps", replace(default, sweeps=count)) for count in (0, 1, 4, 8)]
    others += [Variant("target not corrected", replace(default, corrected=False))]
    others += [Variant(f"order {order}", replace(default, order=order)) for order in get_args(Order)]
    others += [Variant(f"damping {damping:g}", replace(default, damping=damping)) for damping in (0.001, 0.01, 0.05, 0.1)]
    others += [Variant(f"{count} candidates", replace(default, candidates=count)) for count in (1, 4, 8, 16, 32)]
    others += [Variant("effort best", Options.of("best"))]
    patched = {
        "search down to 0.5": lambda: _finest(0.5),
        "search down to 0.8": lambda: _finest(0.8),
        "search weighted by nothing": lambda: _weighted("nothing"),
        "search weighted by diag H": lambda: _weighted("diag H"),
        "search of |error|^2.4": lambda: _power(2.4),
        "ranges 1.1 times as wide": lambda: _scaled(lambda scales, _: scales * 1.1),
        "search, extreme on the larger side": lambda: _scaled(lambda scales, sign: scales * sign),
        "search, scales never negative": lambda: _scaled(lambda scales, _: scales.abs()),
        "residual stream not brought along": lambda: mock.patch.object(sequential.Passes, "watch"),
        "products in float32": lambda: mock.patch.object(sequential, "narrow_"),
        "target corrected in full": lambda: mock.patch.object(target, "_strength", return_value=torch.tensor(1.0)),
        "target corrected by half": lambda: mock.patch.object(target, "_strength", return_value=torch.tensor(0.5)),
        "scales refitted by least squares": lambda: mock.patch.dict(QUANTIZERS, {"gptq": _refitted}),
    }
    return [
        Variant("default", default),
        Variant("round to nearest", Options(), method="rtn"),
        Variant("corrected targets rounded to nearest", default, method="rtn"),
        *(variant for variant in others if variant.options != default),
        *(Variant(name, default, patch) for name, patch in patched.items()),
        Variant("order act, then again with scales fitted to its targets", replace(default, order="act"), _two_passes),
    ]


@contextmanager
def _finest(least: float) -> Iterator[None]:
    with mock.patch.object(grid, "FINEST_SHRINK", least):
        yield


@contextmanager
def _weighted(kind: str) -> Iterator[None]:
    """Other weights for the scale search of a group: none, or the Hessian's diagonal instead of the factor's."""
    factorise, of_columns, fit_group = gptq.factorise, columns.Columns._fit_group, grid.fit_group
    seen: dict[str, Tensor] = {}

    def remember(H: Tensor, *rest: Any) -> Any:
        seen["diagonal"] = H.diagonal()
        return factorise(H, *rest)

    def of_group(self: Any, j: int) -> None:
        seen["weights"] = seen["diagonal"][self.factor.perm[j : j + self.group]]
        of_columns(self, j)

    def other(w: Tensor, _weights: Tensor | None, *rest: Any) -> grid.Grid:
        return fit_group(w, None if kind == "nothing" else seen["weights"], *rest)

    with (
        mock.patch.object(gptq, "factorise", remember),
        mock.patch.object(columns.Columns, "_fit_group", of_group),
        mock.patch.object(grid, "fit_group", other),
    ):
        yield


@contextmanager
def _power(power: float) -> Iterator[None]:
    def errors(w: Tensor, weights: Tensor, tried: grid.Grid, scheme: Scheme, _: Tensor) -> Tensor:
        each = zip(tried.scales, tried.zeros, strict=True)
        off = [round_to_grid(w, scale, zero, scheme) * scale - w for scale, zero in each]
        return torch.stack([weights @ one.abs().pow(power) for one in off])

    with mock.patch.object(grid, "_errors", errors):
        yield


@contextmanager
def _scaled(change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Other symmetric scales, from the usual ones and the sign that was asked for."""
    symmetric = grid._symmetric

    def changed(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
        return change(symmetric(low, high, factor), factor.sign())

    with mock.patch.object(grid, "_symmetric", changed):
        yield


def _refitted(W: Tensor, stats: LayerStats, scheme: Scheme, scale_dtype: torch.dtype, options: Options) -> QTensor:
    """GPTQ, and then for its codes the scales of every row that minimise the layer's error, which is quadratic in them."""
    q = gptq.solve(W, stats, scheme, scale_dtype, options)
    N, K = q.shape
    G = scheme.groups(K)
    H = stats.H.double() + options.damping * stats.H.diagonal().mean() * torch.eye(K)
    levels = (q.codes.double() - q.scheme.levels // 2).view(N, G, -1)
    A, b = torch.empty(N, G, G, dtype=torch.float64), torch.empty(N, G, dtype=torch.float64)
    for h in range(G):
        reached = levels[:, h] @ H.view(G, -1, K)[h]
        A[:, h], b[:, h] = (reached.view(N, G, -1) * levels).sum(-1), (reached * W).sum(-1)
    A.diagonal(dim1=1, dim2=2).add_(1e-9 * A.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
    return replace(q, scales=torch.linalg.solve(A, b).to(scale_dtype))


@contextmanager
def _two_passes() -> Iterator[None]:
    """GPTQ twice, the second time with scales fitted to the targets that the first pass arrived at."""
    run = columns.run

    def again(loops: Sequence[columns.Columns]) -> list[Solved]:
        run(loops)
        for loop in loops:
            targets, weights = torch.empty_like(loop.T), torch.empty_like(loop.factor.D)
            targets[loop.factor.perm], weights[loop.factor.perm] = loop.T, loop.factor.D
            grouped, scheme = targets.t().reshape(targets.shape[1], -1, loop.group), loop.spec.scheme
            assert scheme is not None
            found = weights.view(-1, loop.group), scheme, loop.storage, loop.options.candidates
            fitted = grid.fit(grouped.contiguous(), *found)
            loop.scales, loop.zeros = fitted.scales.t().contiguous(), fitted.zeros.t().contiguous()
            loop.E = loop.W.t().contiguous()[loop.factor.perm]
            loop.T, loop.loss = loop.E.clone(), torch.zeros_like(loop.loss)
        return run(loops)

    with mock.patch.object(columns, "run", again):
        yield


def measure(model: Path, seeds: int, names: Sequence[str] | None = None) -> list[Measurement]:
    """KL to the dense model and processor time per variant and scheme, medians over `seeds` draws of calibration text."""
    dense = models.load(model).float()
    anatomy = models.anatomy(dense)
    tokenizer = models.tokenizer(model)
    judge = Judge(dense, windows(tokenizer, True, 0, JUDGED))
    prefix = "" if model == models.REFERENCE else f"{model.name} "
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(seeds):
        inputs = {"input_ids": windows(tokenizer, False, seed, SAMPLES)}
        for variant in [v for v in variants() if names is None or v.name in names]:
            for scheme in SCHEMES:
                start = time.process_time()
                solved = solve(dense, anatomy, variant, scheme, inputs)
                seconds[variant.name, f"{prefix}{scheme}"].append(time.process_time() - start)
                found[variant.name, f"{prefix}{scheme}"].append(judge(solved).kl)
            shown = "  ".join(f"{scheme} {found[variant.name, f'{prefix}{scheme}'][-1]:.5f}" for scheme in SCHEMES)
            print(f"{prefix}seed {seed}  {variant.name:36}{shown}", flush=True)
    kl = [Measurement.of(*key, "KL to dense", "nats/token", values) for key, values in found.items()]
    return kl + [Measurement.of(*key, "processor time", "s", values) for key, values in seconds.items()]


def solve(
    dense: PreTrainedModel, anatomy: Anatomy, variant: Variant, scheme: Scheme, inputs: dict[str, Tensor]
) -> PreTrainedModel:
    """A copy of a float32 model with the weights that a variant makes."""
    settings = Settings(variant.method, "alps", variant.options, CPU, torch.float32, torch.float16)
    plan = Plan.uniform(anatomy.in_features, scheme)
    solved = copy.deepcopy(dense)
    with variant.patch(), torch.no_grad():
        moments = sequential.NO_MOMENTS
        if variant.options.coupled:
            goal = derivatives.objective(dense, inputs, asked="kl")
            moments = itertools.repeat(gradients.output_moments(dense, anatomy.layers, inputs, goal, CPU))
        for block in sequential.run(dense, anatomy, plan, inputs, settings, moments):
            for one in block.layers:
                solved.get_submodule(one.layer.name).get_parameter("weight").copy_(qtensor.dense(one.solved))
    return solved


def windows(tokenizer: Any, judge: bool, seed: int, count: int) -> Tensor:
    """Windows of training text: of the tenth that judges, or of the rest in an order drawn from `seed`."""
    ids: list[int] = []
    for text in corpus.documents("train", seed=seed):
        if (zlib.crc32(text[::-1].encode()) % SET_ASIDE_ONE_IN == 0) == judge:
            ids += tokenizer.encode(text + "\n\n", add_special_tokens=False)
        if len(ids) >= count * SEQ_LEN:
            break
    return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", default=[models.REFERENCE])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of variants")
    args = parser.parse_args()
    record.append("defaults", [one for model in args.models for one in measure(model, args.seeds, args.only)])


if __name__ == "__main__":
    main()
