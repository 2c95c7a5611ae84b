"""How long this machine takes for a layer at each scheme: timed through the kernels that serve it, kept in a file."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kernels import dispatch, launch
from compress.kernels.dispatch import Packed
from compress.models import Anatomy
from compress.progress import Track, silent
from compress.spec import Scheme

TABLE_VERSION = 1
ROUNDS = 5  # timings of each, all schemes of a shape in turn, so that what slows the machine down slows them alike
LEAST_SECONDS = 0.02  # of one timing on a CPU
CACHES = 4  # times the last cache that a set of weights fills, as long as the model has so many
DEFAULT_CACHE = 32 << 20  # bytes, where the system does not say
STANDARD = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}  # how often an 8B Llama has which (N, K)

Shape = tuple[int, int]  # N, K
Call = Callable[[], object]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Machine:
    """What a time holds for: the name of the processor or GPU, and the threads that torch computes with (0 on a GPU)."""

    device: str
    threads: int

    @staticmethod
    def here(device: torch.device) -> Machine:
        if device.type == "cuda":
            return Machine(torch.cuda.get_device_name(device), 0)
        return Machine(launch.processor(), torch.get_num_threads())

    def __str__(self) -> str:
        return f"{self.device}, {self.threads} threads" if self.threads else self.device


@dataclass(frozen=True)
class Timing:
    """Seconds of one product of M rows with a layer; the median, and as `spread` the largest minus the smallest."""

    M: int
    N: int
    K: int
    scheme: Scheme | None
    seconds: float
    spread: float


@dataclass(frozen=True)
class LatencyTable:
    """Times of layers on one machine, activations in `dtype`; `date` and `versions` say what was measured."""

    machine: Machine
    dtype: str
    date: str
    versions: Mapping[str, str]
    timings: tuple[Timing, ...]

    @cached_property
    def _seconds(self) -> dict[tuple[int, int, int, Scheme | None], float]:
        return {(one.M, one.N, one.K, one.scheme): one.seconds for one in self.timings}

    def of(self, N: int, K: int, scheme: Scheme | None, M: int | None = None) -> float:
        """Seconds of a layer of N x K weights for M rows, by default the fewest in the table; None is the dense layer.

        A scheme's group size is fitted to K, as in a plan. Raises CompressError for what was not timed.
        """
        rows = min(one.M for one in self.timings) if M is None else M
        wanted = scheme.fit(K) if scheme else None
        found = self._seconds.get((rows, N, K, wanted))
        if found is None:
            raise CompressError(
                f"The latency table has no time for {rows} rows, {N} x {K} weights, {wanted or 'dense'}. Make one for this model "
                "and these schemes with `compress bench MODEL --latency-table -o FILE`."
            )
        return found

    def to_json(self) -> str:
        return json.dumps({"version": TABLE_VERSION, **asdict(self)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the table, whole or not at all."""
        temporary = Path(f"{path}.tmp")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.rename(path)
        except OSError as error:
            raise CompressError(f"Cannot write the latency table {path}: {error}. Choose another -o.") from error

    @staticmethod
    def from_json(text: str, source: str = "the latency table") -> LatencyTable:
        """Parse `to_json`'s output; `source` names the file in errors."""
        try:
            document = json.loads(text)
            if document["version"] != TABLE_VERSION or not document["timings"]:
                raise ValueError(f"version {document['version']} with {len(document['timings'])} timings")
            timings = tuple(
                Timing(**{**one, "scheme": Scheme(**one["scheme"]) if one["scheme"] else None}) for one in document["timings"]
            )
            return LatencyTable(
                Machine(**document["machine"]), document["dtype"], document["date"], document["versions"], timings
            )
        except (ValueError, KeyError, TypeError, CompressError) as error:
            raise CompressError(
                f"{source} is not a latency table ({error!r}); make one with `compress bench --latency-table -o FILE`."
            ) from error

    @staticmethod
    def load(path: str | Path, device: torch.device) -> LatencyTable:
        """Read a table; raises CompressError for a file that is none, and for one that another machine than `device`'s made."""
        try:
            table = LatencyTable.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CompressError(f"Cannot read the latency table {path}: {error}.") from error
        if (here := Machine.here(device)) != table.machine:
            raise CompressError(
                f"{path} was measured on {table.machine}, and this is {here}: its times do not hold here. "
                "Measure this machine with `compress bench --latency-table -o FILE`."
            )
        return table


def shapes_of(anatomy: Anatomy) -> dict[Shape, int]:
    """How often a model has layers of which shape; raises for convolutions, whose time is not that of a matrix product."""
    if convolution := next((layer.name for layer in anatomy.layers if layer.kind == "conv2d"), None):
        raise CompressError(
            f"{convolution} is a convolution, which is dequantized whenever it runs: no scheme makes it faster. "
            "Latency tables are for models of linear layers."
        )
    return dict(Counter((layer.N, layer.K) for layer in anatomy.layers))


def measure(
    shapes: Mapping[Shape, int],
    schemes: Sequence[Scheme],
    rows: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    track: Track = silent,
) -> LatencyTable:
    """Time layers of every shape, dense and at every scheme, for every number of rows of activations.

    `shapes` says how often the model has each. Weights are random and used in turn, as many as fill the last cache
    `CACHES` times but no more than the model has of all shapes together: a small model is served from the cache, a large one
    from memory. On a GPU the calls are replayed from a captured graph, so that launching them is not in the times.
    """
    weights = sum(N * K * count for (N, K), count in shapes.items())
    timings: list[Timing] = []
    for N, K in track(sorted(shapes), len(shapes), "timing shapes"):
        timings += _timings(N, K, schemes, rows, device, dtype, weights)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return LatencyTable(Machine.here(device), str(dtype).removeprefix("torch."), date, _versions(device), tuple(timings))


def _timings(
    N: int, K: int, schemes: Sequence[Scheme], rows: Sequence[int], device: torch.device, dtype: torch.dtype, weights: int
) -> Iterator[Timing]:
    generator = torch.Generator(device).manual_seed(0)
    fitted = dict.fromkeys([None, *(scheme.fit(K) for scheme in schemes)])
    products = {scheme: _products(N, K, scheme, device, dtype, weights, generator) for scheme in fitted}
    for M in rows:
        x = torch.randn(M, K, generator=generator, device=device).to(dtype)
        timers = {scheme: timer([partial(product, x) for product in each], device) for scheme, each in products.items()}
        seconds: dict[Scheme | None, list[float]] = {scheme: [] for scheme in timers}
        for turn in range(ROUNDS + 1):
            for scheme, seconds_of_a_call in timers.items():
                taken = seconds_of_a_call()
                if turn:  # the first round warms up
                    seconds[scheme].append(taken)
        for scheme, values in seconds.items():
            yield Timing(M, N, K, scheme, statistics.median(values), max(values) - min(values))


def _products(
    N: int,
    K: int,
    scheme: Scheme | None,
    device: torch.device,
    dtype: torch.dtype,
    weights: int,
    generator: torch.Generator,
) -> list[Product]:
    """Products with several weights of one shape and scheme."""
    if scheme is None:
        dense = torch.randn(N, K, generator=generator, device=device).to(dtype)
        return [_dense(dense.clone()) for _ in range(copies(dense.nbytes, N * K, weights, device))]
    return [_packed(packed) for packed in packed_weights(N, K, scheme, device, dtype, weights, generator)]


def packed_weights(
    N: int, K: int, scheme: Scheme, device: torch.device, dtype: torch.dtype, weights: int, generator: torch.Generator
) -> list[Packed]:
    """As many weights with random codes, laid out for the device, as are to be used in turn."""
    codes = torch.randint(0, scheme.levels, (N, K), dtype=torch.uint8, generator=generator, device=device)
    scales = torch.full((N, scheme.groups(K)), 1 / scheme.levels, dtype=dtype, device=device)
    zeros = None if scheme.symmetric else torch.ones(scales.shape, dtype=torch.uint8, device=device)
    packed = dispatch.prepare(codes, scales, zeros, bits=scheme.bits)
    count = copies(sum(tensor.nbytes for tensor in packed.tensors.values()), N * K, weights, device)
    tensors = [{name: tensor.clone() for name, tensor in packed.tensors.items()} for _ in range(count)]
    return [replace(packed, tensors=each) for each in tensors]


def copies(size: int, numel: int, weights: int, device: torch.device) -> int:
    """Weights of `size` bytes and `numel` elements that are used in turn."""
    return max(1, min(math.ceil(CACHES * _cache(device) / size), weights // numel))


def _dense(weight: Tensor) -> Product:
    return lambda x: torch.nn.functional.linear(x, weight)


def _packed(weight: Packed) -> Product:
    return lambda x: dispatch.linear(x, weight)


def timer(calls: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """What gives the seconds of a call when called: on a GPU from a graph of all calls, captured once."""
    if device.type != "cuda":
        return lambda: _seconds_on_cpu(calls)
    graph = _captured(calls, device)
    return lambda: _seconds_of_graph(graph, device) / len(calls)


@torch.inference_mode()
def _seconds_on_cpu(calls: Sequence[Call]) -> float:
    """Seconds of a call: they take turns until `LEAST_SECONDS` have passed, and each has had as many."""
    turns = cycle(calls)
    start, done, taken = time.perf_counter(), 0, 0.0
    while taken < LEAST_SECONDS or done % len(calls):
        next(turns)()
        done += 1
        taken = time.perf_counter() - start
    return taken / done


@torch.inference_mode()
def _captured(calls: Sequence[Call], device: torch.device) -> torch.cuda.CUDAGraph:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # whatever compiles or chooses does so before the capture
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return graph


def _seconds_of_graph(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000


def _cache(device: torch.device) -> int:
    """Bytes of the last cache."""
    if device.type == "cuda":
        size: int = torch.cuda.get_device_properties(device).L2_cache_size
        return size
    largest = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not largest.is_file():
        return DEFAULT_CACHE
    text = largest.read_text().strip()
    return int(text.removesuffix("K")) * 1024 if text.endswith("K") else DEFAULT_CACHE


def _versions(device: torch.device) -> dict[str, str]:
    from compress import __version__

    found = {"compress": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda" and dispatch.HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    return found
