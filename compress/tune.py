"""How this machine's kernels are fastest, by measurement: launches and turning points, in a file that later processes find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compress import latency
from compress.errors import CompressError
from compress.kernels import cpu, dispatch, launch
from compress.kernels.dispatch import Packed
from compress.kernels.launch import Device, Key, Launch, Table
from compress.latency import Shape
from compress.progress import Track, silent
from compress.spec import Scheme

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 3  # timings of each, of which the fastest counts
GAIN = 0.99  # of the time so far that another launch has to stay below

Way = Callable[[Tensor, Packed], Tensor]


@dataclass(frozen=True)
class Subject:
    """Weights of one shape and scheme, to be used in turn."""

    scheme: Scheme
    packed: Sequence[Packed]

    def seconds(self, way: Way, x: Tensor) -> float:
        """Of one product with x."""
        timer = latency.timer([partial(way, x, one) for one in self.packed], x.device)
        return min(timer() for _ in range(ROUNDS))


def measure(
    shapes: Mapping[Shape, int],
    schemes: Sequence[Scheme],
    device: torch.device,
    dtype: torch.dtype,
    track: Track = silent,
) -> Table:
    """Measure, add to the file what was found, and return the device's table; `shapes` as in `latency.measure`.

    On a GPU: the launch for every shape, scheme and number of rows up to the next power of two, by descent from the rule's, and
    the number of rows from which dense products win. On a CPU, whose kernels have no launches: that number for each layout.
    Raises CompressError where nothing can be tuned.
    """
    described = launch.describe(device)
    wanted = [(N, K, fits) for N, K in sorted(shapes) for scheme in schemes if (fits := scheme.fit(K))]
    weights = sum(N * K * count for (N, K), count in shapes.items())
    subjects = _subjects(wanted, weights, device, dtype)
    found = (_of_gpu if device.type == "cuda" else _of_cpu)(subjects, len(wanted), described, device, dtype, track)
    file = launch.user_file()
    try:
        tables = launch.read(file)
        before = tables.get(described.name, Table())
        table = replace(found, launches={**before.launches, **found.launches}, few_rows={**before.few_rows, **found.few_rows})
        launch.write(file, {**tables, described.name: table})
    except (OSError, ValueError) as error:
        raise CompressError(f"Cannot keep what was measured: {error}.") from error
    return table


def _subjects(
    wanted: Sequence[tuple[int, int, Scheme]], weights: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Subject]:
    generator = torch.Generator(device).manual_seed(0)
    for N, K, scheme in dict.fromkeys(wanted):
        yield Subject(scheme, latency.packed_weights(N, K, scheme, device, dtype, weights, generator))


def _of_cpu(
    subjects: Iterable[Subject], count: int, described: Device, device: torch.device, dtype: torch.dtype, track: Track
) -> Table:
    """For each layout the most rows up to which its kernel takes no longer than tiles do, over all weights in it."""
    seconds: dict[str, dict[int, list[float]]] = {}
    for subject in track(subjects, count, "timing layers"):
        layout, K = subject.packed[0].layout, subject.packed[0].shape[1]
        if layout not in cpu.FEW_ROWS:
            continue
        for M in ROWS:
            x = torch.ones(M, K, dtype=dtype, device=device)
            total = seconds.setdefault(layout, {}).setdefault(M, [0.0, 0.0])
            for i, way in enumerate((dispatch.cpu_kernel, dispatch.cpu_tiles)):
                total[i] += subject.seconds(way, x)
    if not seconds:
        raise CompressError(f"No layer goes through a kernel that can be tuned on {described.name}.")
    return Table(measured=True, few_rows={layout: last_before(found) for layout, found in seconds.items()})


def _of_gpu(
    subjects: Iterable[Subject], count: int, described: Device, device: torch.device, dtype: torch.dtype, track: Track
) -> Table:
    launches: dict[Key, Launch] = {}
    seconds: dict[int, list[float]] = {}
    for subject in track(subjects, count, "timing layers"):
        (N, K), G, bits = subject.packed[0].shape, subject.packed[0].G, subject.scheme.bits
        if subject.packed[0].layout != "planar":
            continue
        for M in ROWS:
            x = torch.ones(M, K, dtype=dtype, device=device)
            total = seconds.setdefault(M, [0.0, 0.0])
            how, taken = descend(
                launch.rule(M, N, K, bits, described),
                partial(launch.neighbours, M=M, N=N, K=K, bits=bits, device=described),
                partial(_fused_seconds, subject, x),
            )
            launches[Key(M, N, K, K // G, bits)] = how
            total[0] += taken
            total[1] += subject.seconds(partial(_expanded, described), x)
    if not launches:
        raise CompressError(f"No layer goes through a kernel that can be tuned on {described.name}; is Triton installed?")
    return Table(measured=True, fused_rows=last_before(seconds), launches=launches)


def descend(
    start: Launch, near: Callable[[Launch], Iterable[Launch]], seconds: Callable[[Launch], float]
) -> tuple[Launch, float]:
    """The launch from which no neighbour is faster, and its time; each is timed once."""
    times = {start: seconds(start)}
    best = start
    while True:
        for one in near(best):
            if one not in times:
                times[one] = seconds(one)
        fastest = min(times, key=lambda one: times[one])
        if times[fastest] >= GAIN * times[best]:
            return best, times[best]
        best = fastest


def last_before(seconds: Mapping[int, Sequence[float]]) -> int:
    """The most rows up to which the first of two ways takes no longer than the second."""
    last = 0
    for M, (first, second) in sorted(seconds.items()):
        if first > second:
            break
        last = M
    return last


def _fused_seconds(subject: Subject, x: Tensor, how: Launch) -> float:
    """Infinite for a launch that the device has no room for."""
    import triton

    from compress.kernels import wna16

    def product(x: Tensor, packed: Packed) -> Tensor:
        return wna16.multiply(x, packed.tensors, None, packed.shape[0], packed.G, packed.bits, how)

    try:
        return subject.seconds(product, x)
    except triton.TritonError:  # more registers or shared memory than there are
        return math.inf


def _expanded(described: Device, x: Tensor, packed: Packed) -> Tensor:
    from compress.kernels import wna16

    N, K = packed.shape
    rows = launch.scratch_rows(N, K, x.element_size(), described)
    return wna16.multiply_expanded(x, packed.tensors, None, N, packed.G, packed.bits, rows)
