"""Solved layers on disk: every layer under every option, each solved once against the dense model's Hessian."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import fingerprint
from compress.calib import capture
from compress.calib.stats import LayerStats
from compress.checkpoint import TensorInfo
from compress.errors import CompressError
from compress.formats import compressed_tensors
from compress.models import Anatomy, Layer
from compress.qtensor import Pruned, QTensor, Solved, dense
from compress.sequential import NEVER_CALLED, Settings, SolvedBlock, SolvedLayer, finite_weight, kept, stackable, usable, walk
from compress.solvers import solve
from compress.solvers.masks import KEPT
from compress.solvers.rtn import output_error
from compress.spec import LayerSpec, Plan

CHUNK = 1 << 24
CONFIG = "config.json"  # beside the weights: what they are multiplied with depends on it
SOLVED = "solved."  # begins the names of an entry's tensors


@dataclass(frozen=True)
class Entry:
    """A layer under one option: `weight_error` is ||W - Q||^2, `row_errors` the expected squared error of every output.

    To relate these to: `weight` is ||W||^2, and `output` the layer's expected squared output, None without calibration.
    """

    weight_error: float
    row_errors: Float[Tensor, "N"] | None
    output: float | None
    weight: float
    notes: tuple[str, ...]

    @property
    def output_error(self) -> float | None:
        """Relative to the output of the dense layer."""
        if self.row_errors is None or self.output is None:
            return None
        return self.row_errors.sum().item() / max(self.output, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Library:
    """A folder of solved layers that belong to one model, one calibration and one way to solve; entries are whole or absent."""

    folder: Path

    def has(self, layer: str, spec: LayerSpec) -> bool:
        return self._file(layer, spec).is_file()

    def entry(self, layer: str, spec: LayerSpec) -> Entry:
        """The errors of a solved layer, without its weights."""
        with self._open(layer, spec) as file:
            about = json.loads(file.metadata()["entry"])
            rows = file.get_tensor("row_errors") if "row_errors" in file.keys() else None  # noqa: SIM118 - not a mapping
        return Entry(about["weight_error"], rows, about["output"], about["weight"], tuple(about["notes"]))

    def solved(self, layer: Layer, spec: LayerSpec) -> Solved:
        """The layer as its solver left it."""
        with self._open(layer.name, spec) as file:
            names = [name for name in file.keys() if name.startswith(SOLVED)]  # noqa: SIM118 - not a mapping
            tensors = {name.removeprefix(SOLVED): file.get_tensor(name) for name in names}
            notes = tuple(json.loads(file.metadata()["entry"])["notes"])
        return replace(solved_of(tensors, layer, spec), notes=notes)

    def add(self, layer: Layer, spec: LayerSpec, solved: Solved, W: Float[Tensor, "N K"], output: float | None) -> None:
        Q = dense(solved)
        about = {
            "weight_error": (W - Q).square().sum().item(),
            "weight": W.square().sum().item(),
            "output": output,
            "notes": solved.notes,
        }
        stored = {SOLVED + name: tensor.cpu() for name, tensor in tensors_of(solved).items()}
        if solved.error is not None:
            stored["row_errors"] = solved.error.float().contiguous().cpu()
        file = self._file(layer.name, spec)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(stored, temporary, metadata={"entry": json.dumps(about)})
            temporary.rename(file)
        except (OSError, SafetensorError) as error:
            raise CompressError(f"Cannot write {file}: {error}. Free some space, or choose another --library.") from error
        finally:
            with suppress(OSError):  # where the folder cannot be written there is nothing to remove
                temporary.unlink()

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))

    def _file(self, layer: str, spec: LayerSpec) -> Path:
        zeros = spec.sparsity and f"{spec.sparsity.fraction!r} {spec.sparsity.pattern}"  # str() rounds the fraction
        slug = "+".join(str(part) for part in (spec.scheme, zeros) if part)
        return self.folder / layer / f"{slug.replace(' ', '-').replace(':', 'of')}.safetensors"

    def _open(self, layer: str, spec: LayerSpec) -> safe_open:
        file = self._file(layer, spec)
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise CompressError(f"{file} is damaged: {error}. Delete it and search again.") from error


def tensors_of(solved: Solved) -> dict[str, Tensor]:
    """A solved layer as a file can hold it, bit for bit, but for its errors and notes."""
    tensors = compressed_tensors.encode(solved) if isinstance(solved, QTensor) else {"weight": solved.weight}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def solved_of(tensors: Mapping[str, Tensor], layer: Layer, spec: LayerSpec) -> Solved:
    """Inverse of `tensors_of`."""
    if spec.scheme is None:
        return Pruned(tensors["weight"])
    return compressed_tensors.decode(tensors, spec.scheme, (layer.N, layer.K))


def key(stored: Mapping[str, TensorInfo], inputs: Mapping[str, Tensor] | None, settings: Settings) -> str:
    """Names what every entry depends on: bytes of config, weights and calibration data, how layers are solved, and the code."""
    digest = hashlib.sha256(json.dumps([fingerprint.solving(), plain(settings)], sort_keys=True).encode())
    files = {info.file for info in stored.values()}
    for file in sorted(files | {file.with_name(CONFIG) for file in files}):
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    for part in input_bytes(inputs):
        digest.update(part)
    return digest.hexdigest()[:24]


def input_bytes(inputs: Mapping[str, Tensor] | None) -> Iterator[bytes]:
    """Calibration data as a part of a key."""
    for name, tensor in sorted((inputs or {}).items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.contiguous().view(torch.uint8).numpy().tobytes()


def fill(
    library: Library,
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor] | None,
    wanted: Mapping[str, Sequence[LayerSpec]],
    settings: Settings,
) -> Iterator[str]:
    """Solve what the library lacks of every layer's wanted options, and yield the blocks as they are done.

    Unlike `sequential.run` every layer sees the dense model's activations, so that entries can be combined freely.
    """
    lacking = {name: [spec for spec in specs if not spec.dense and not library.has(name, spec)] for name, specs in wanted.items()}
    if not any(lacking.values()):
        return
    with closing(walk(model, anatomy, inputs, settings)) as blocks:
        for name, block, passes in blocks:
            prefix = f"{name}." if name else ""
            left = {layer.name.removeprefix(prefix): layer for layer in anatomy.of_block(name) if lacking.get(layer.name)}
            known = passes.stats(capture.subsets(block, list(left), passes.first)) if passes and left else ()
            for subset, stats in itertools.chain.from_iterable(known):
                together = {local: left.pop(local) for local in subset}
                _add(library, together, block, *usable(stats, block, subset[0]), lacking, settings)
            for local, layer in left.items():
                _add(library, {local: layer}, block, None, (f"solved without calibration: {NEVER_CALLED}",), lacking, settings)
            yield name


def _add(
    library: Library,
    layers: Mapping[str, Layer],
    block: nn.Module,
    stats: LayerStats | None,
    notes: tuple[str, ...],
    lacking: Mapping[str, Sequence[LayerSpec]],
    settings: Settings,
) -> None:
    """Solve layers of one input under each option that any of them lacks; those that may be stacked at once."""
    weights = {layer.name: finite_weight(block.get_submodule(local), layer) for local, layer in layers.items()}
    outputs = {name: None if stats is None else output_error(W, stats.H).sum().item() for name, W in weights.items()}
    for spec, stacked in stackable(layers.values(), lambda layer: lacking[layer.name]):
        W = torch.cat([weights[layer.name] for layer in stacked])
        keep = kept([weights[layer.name] for layer in stacked], spec, settings.options)
        together = solve(W, stats, spec, settings.stored, settings.options, settings.quantizer, settings.pruner, keep)
        start = 0
        for layer in stacked:
            rows = slice(start, start + layer.N)
            kept_here = () if keep is None or keep[rows].all() else (KEPT,)
            solved = replace(together.rows(rows.start, rows.stop), notes=together.notes + notes + kept_here)
            library.add(layer, spec, solved, weights[layer.name], outputs[layer.name])
            start += layer.N


def assembled(library: Library, anatomy: Anatomy, plan: Plan) -> Iterator[SolvedBlock]:
    """The blocks of a plan, copied from a library that has them."""
    for block in anatomy.blocks:
        layers = [layer for layer in anatomy.of_block(block) if not plan.layers[layer.name].dense]
        yield SolvedBlock(block, tuple(_copied(library, layer, plan.layers[layer.name]) for layer in layers))


def _copied(library: Library, layer: Layer, spec: LayerSpec) -> SolvedLayer:
    entry = library.entry(layer.name, spec)
    weight = max(entry.weight, torch.finfo(torch.float32).tiny)
    return SolvedLayer(layer, library.solved(layer, spec), spec, entry.output_error, entry.weight_error / weight)


def complete(library: Library, plan: Plan) -> bool:
    """Whether the library has every layer of a plan as the plan wants it."""
    return all(spec.dense or library.has(name, spec) for name, spec in plan.layers.items())


def plain(settings: Settings) -> dict[str, object]:
    """Settings as JSON can hold them, as a part of a key."""
    return {name: value if isinstance(value, (str, int, float, dict)) else str(value) for name, value in asdict(settings).items()}
