"""Packed products on a GPU against bfloat16, torch's int4 kernel and gemlite, by rows; decoding with and solving of an 8B shape.

    python -m benchmarks.kernels [--append] [--only products decoding solving]

Weights are used in turn, more of them than the last cache holds four times over, in a captured graph, so that nothing is found in
the cache and no launch is waited for. `--append` and speed-ups need the kernels' tests to pass first, which this runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels_model, record
from benchmarks.kernels_model import graph_seconds
from benchmarks.record import ROOT, Measurement
from compress.kernels import dispatch

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (65536, 16384))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BITS, GROUP = 4, 128
CACHES = 4  # times the last cache that a set of weights fills
SIDE = 8192  # of the product that measures the matrix units
COPIED = 1 << 31  # bytes that measure the memory
TINYGEMM_ROWS = 256  # above, torch's int4 kernel is ten times slower than bfloat16 and only takes time
TILES = 8  # of torch's int4 layout

TESTS = (
    "tests/kernels/test_wna16.py",
    "tests/kernels/test_planar.py",
    "tests/kernels/test_routing.py",
    "tests/kernels/test_columns.py",
    "tests/solvers/test_fused.py",
)
SPREAD = ("--dist", "worksteal", "--maxprocesses", "16")  # every test compiles kernels of its own, a second or more on a core

Product = Callable[[Tensor], Tensor]


def copy_bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    a = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * COPIED / min(graph_seconds([lambda: b.copy_(a)]))


def matmul_rate() -> float:
    """Operations per second of a large bfloat16 product."""
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    return 2 * SIDE**3 / min(graph_seconds([lambda: a @ a.t()]))


def copies(size: int) -> int:
    """Weights of `size` bytes that fill the last cache several times; two at least."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(CACHES * cache / size))


def packed_products(N: int, K: int) -> tuple[list[Product], int]:
    """Our products with random weights, and the bytes of one."""
    scales = torch.rand(N, K // GROUP, device="cuda").add_(0.5).mul_(0.01).to(torch.bfloat16)

    def one() -> dispatch.Packed:
        codes = torch.randint(0, 2**BITS, (N, K), dtype=torch.uint8, device="cuda")
        return dispatch.prepare(codes, scales.clone(), None, bits=BITS)

    weights = [one() for _ in range(copies(N * K * BITS // 8))]
    size = sum(tensor.nbytes for tensor in weights[0].tensors.values())
    return [_bind(lambda x, weight: dispatch.linear(x, weight), weight) for weight in weights], size


def dense_products(N: int, K: int) -> tuple[list[Product], int]:
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
    return [_bind(lambda x, weight: torch.nn.functional.linear(x, weight), weight) for weight in weights], weights[0].nbytes


def tinygemm_products(N: int, K: int) -> tuple[list[Product], int]:
    scales = torch.rand(K // GROUP, N, 2, device="cuda").mul_(0.01).to(torch.bfloat16)

    def one() -> Tensor:
        nibbles = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        arranged: Tensor = torch.ops.aten._convert_weight_to_int4pack(nibbles, TILES)
        return arranged

    def product(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales)
        return out

    weights = [one() for _ in range(copies(N * K * BITS // 8))]
    return [_bind(product, weight) for weight in weights], weights[0].nbytes + scales.nbytes


def gemlite_products(N: int, K: int) -> tuple[list[Product], int]:
    import gemlite

    def one() -> Any:
        kind = gemlite.DType.BF16
        layer = gemlite.GemLiteLinear(
            BITS, group_size=GROUP, in_features=K, out_features=N, input_dtype=kind, output_dtype=kind, scaled_activations=False
        )
        codes = torch.randint(0, 2**BITS, (N, K), dtype=torch.uint8, device="cuda")
        scales = torch.rand(N * K // GROUP, 1, device="cuda").mul_(0.01).to(torch.bfloat16)
        layer.pack(codes, scales, torch.full_like(scales, 2 ** (BITS - 1)), None)
        return layer

    weights = [one() for _ in range(copies(N * K * BITS // 8))]
    return [_bind(lambda x, weight: weight(x), weight) for weight in weights], N * K * BITS // 8


def _bind(product: Callable[[Tensor, Any], Tensor], weight: Any) -> Product:
    return lambda x: product(x, weight)


def _call(product: Product, x: Tensor) -> Callable[[], Tensor]:
    return lambda: product(x)


PEERS = {"bfloat16": dense_products, "packed": packed_products, "torch int4": tinygemm_products, "gemlite": gemlite_products}


def products(green: bool) -> Iterator[Measurement]:
    """Times of every product; with passing tests also speed-ups, and how near they come to what the chip can do."""
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    yield Measurement("the device", record.ALL, "copy bandwidth", bandwidth / 1e12, "TB/s")
    yield Measurement("the device", record.ALL, "bfloat16 product", rate / 1e12, "TFLOP/s")
    for N, K in SHAPES:
        seconds: dict[tuple[str, int], list[float]] = {}
        sizes: dict[str, int] = {}
        for peer, make in PEERS.items():
            if peer == "gemlite" and importlib.util.find_spec("gemlite") is None:
                continue
            calls, sizes[peer] = make(N, K)
            for M in ROWS:
                if peer == "torch int4" and M > TINYGEMM_ROWS:
                    continue
                x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
                seconds[peer, M] = graph_seconds([_call(call, x) for call in calls])
            del calls
            torch.cuda.empty_cache()
        for (peer, M), taken in seconds.items():
            setting = f"{N} x {K}, {M} rows"
            yield Measurement.of(peer, setting, "product", "us", [1e6 * each for each in taken])
            if not green:
                continue
            moved, middle = sizes[peer] + 2 * M * (N + K), statistics.median(taken)
            yield Measurement(peer, setting, "fraction of copy bandwidth", moved / middle / bandwidth, "")
            yield Measurement(peer, setting, "fraction of the matmul rate", 2 * M * N * K / middle / rate, "")
            dense = statistics.median(seconds["bfloat16", M])
            yield Measurement(peer, setting, "speed / bfloat16's", dense / middle, "x")


def tests_pass() -> bool:
    """Whether the kernels' tests pass on this machine, those that need its GPU among them."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, *SPREAD, "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout[-2000:] if run.returncode else run.stdout.splitlines()[-1], flush=True)
    return run.returncode == 0


def table(rows: Sequence[Measurement]) -> str:
    """Speed-ups over bfloat16, a line for every shape and side and a column for every number of rows."""
    found = {(row.subject, row.setting): row.value for row in rows if row.metric == "speed / bfloat16's"}
    lines = ["speed / bfloat16's".ljust(26) + "".join(f"{M:7}" for M in ROWS)]
    for N, K in SHAPES:
        for peer in PEERS:
            values = [found.get((peer, f"{N} x {K}, {M} rows")) for M in ROWS]
            if peer != "bfloat16" and any(values):
                cells = "".join("      -" if value is None else f"{value:7.2f}" for value in values)
                lines.append(f"{N:6} x {K:<6} {peer:10}" + cells)
    others = [row for row in rows if row.setting.startswith((kernels_model.SHAPED, kernels_model.EXPERTS_SETTING))]
    return "\n".join([*lines, *(f"{row.subject}, {row.setting}: {row.metric} {row.value:.4g} {row.unit}" for row in others)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true", help="to results.csv")
    parts = ("products", "decoding", "solving")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("These kernels run on GPUs; torch finds none here. benchmarks/compiled.py needs none.")
    green = tests_pass()
    rows: list[Measurement] = []
    if "products" in args.only:
        rows += products(green)
    if "decoding" in args.only:
        rows += kernels_model.decoding(green)
    if "solving" in args.only:
        rows += kernels_model.solving()
    for row in rows:
        print(f"{row.subject:12} {row.setting:28} {row.metric:30} {row.value:10.4g} {row.unit} +-{row.spread:.2g}")
    if not green:
        sys.exit("The kernels' tests fail: no speed-up is computed, and nothing is appended.")
    if args.append:
        packages = [name for name in ("triton", "gemlite") if importlib.util.find_spec(name)]
        peers = ", ".join(f"{name} {version(name)}" for name in packages)
        record.append("kernels", rows, peers, accelerator=torch.cuda.get_device_name(0))
    print(table(rows))


if __name__ == "__main__":
    main()
