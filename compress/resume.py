"""Going on where an interrupted run was: its solved blocks as files that can be read again, and the key that says whose."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from compress import fingerprint, qtensor, report
from compress.checkpoint import TensorInfo, Writer, block_name, disk_errors, size_of
from compress.errors import CompressError
from compress.formats import FORMATS, PACKED, sparse
from compress.mixed.budget import SPARSE, Target, megabytes
from compress.mixed.library import CONFIG, input_bytes, plain, solved_of, tensors_of
from compress.models import Anatomy, Layer, from_matrix, to_matrix
from compress.qtensor import Pruned, QTensor, Solved
from compress.sequential import Settings, SolvedBlock, SolvedLayer
from compress.spec import LayerSpec, Plan

KEY, ROTATION = "key", "rotation"  # beside the blocks: the file that says whose they are, and what was decided for them
ABOUT = "layers"  # in a block's file, what is to be said of its layers
SOLVED = "solved."  # begins the names of tensors that only `Blocks.read` looks at


def key(stored: Mapping[str, TensorInfo], inputs: Mapping[str, Tensor] | None, settings: Settings, *others: object) -> str:
    """Names what solved blocks depend on: model, calibration data, how layers are solved, versions, and what else is given.

    The model's weights, which may be many gigabytes, count by name, size and time of change of their files.
    """
    files = sorted({info.file for info in stored.values()})
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    about = [fingerprint.solving(), report.versions(), plain(settings), stats, others]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in (files[0].with_name(CONFIG).read_bytes(), *input_bytes(inputs)):
        digest.update(part)
    return digest.hexdigest()


class ResumableWriter(Writer):
    """Keeps the blocks of a run that ends early, whatever ends it, for the next one that would solve them in the same way."""

    total = 0  # blocks of such a run

    @property
    def mark(self) -> Path:
        return self.partial / KEY

    @property
    def rotation(self) -> Path:
        """The file that holds the judgement on a rotation: blocks of a rotated model and of a plain one do not go together."""
        return self.partial / ROTATION

    def __enter__(self) -> ResumableWriter:
        with disk_errors(self.out):
            self._lock()
        return self

    def __exit__(self, kind: object, error: object, traceback: object, /) -> None:
        kept = self.blocks if self.mark.is_file() else []
        if not kept:
            super().__exit__(kind, error, traceback)
            return
        with self.lock, suppress(OSError):  # what a full or broken disk does not let go of stays
            if self.total:  # else they are those of another run, and this one did not come as far as to ask for them
                _add(error, self._said(kept))
                self.keep([self.mark, self.rotation, *kept])

    def _said(self, kept: Sequence[Path]) -> str:
        amount = megabytes(sum(map(size_of, kept)))
        blocks = f"What was solved, {len(kept)} of {self.total} blocks, is kept in {self.partial} ({amount})"
        return f"{blocks}; the same command goes on from there."

    def begin(self, key: str | None, total: int) -> list[Path]:
        """The files of the first blocks that a run with the same `key` left whole; all else that any run left is removed.

        The blocks that are written from now on, of `total`, are kept for the next run with this key; with None they are not.
        """
        with disk_errors(self.out):
            same = self.mark.is_file() and self.mark.read_text(encoding="utf-8") == key
            found = _whole(self.blocks) if same else []
            self.keep([self.mark, self.rotation, *found] if found else [])
            if key is not None:
                self.total = total
                if not found:
                    self.mark.write_text(key, encoding="utf-8")
        if found:
            message = "Going on after %d of %d blocks, which an earlier run left in %s."
            logging.getLogger("compress").warning(message, len(found), total, self.partial)
        return found

    def seal(self, report: str) -> None:
        super().seal(report)
        self.mark.unlink(missing_ok=True)


def _whole(blocks: Sequence[Path]) -> list[Path]:
    """The first blocks, up to one that is missing or damaged."""
    numbered = itertools.takewhile(lambda one: one[1].name == block_name(*one), enumerate(blocks))
    return [file for _, file in numbered]


def _add(error: object, sentence: str) -> None:
    """Have an exception end with a sentence more."""
    if isinstance(error, (CompressError, KeyboardInterrupt)):
        error.args = (f"{error} {sentence}".strip(),)
    elif isinstance(error, BaseException) and sys.version_info >= (3, 11):
        error.add_note(sentence)


@dataclass(frozen=True)
class Blocks:
    """The solved blocks of a plan as files: the tensors that a checkpoint holds, and what these lack of the layers as solved."""

    target: Target
    anatomy: Anatomy
    plan: Plan

    def encoded(self, block: SolvedBlock) -> dict[str, dict[str, Tensor]]:
        """For every weight of the source, the tensors that stand for it, named as the source names things."""
        return {self.target.names[one.layer.name]: self._encoded(one.layer, one.solved) for one in block.layers}

    def _encoded(self, layer: Layer, solved: Solved) -> dict[str, Tensor]:
        target, weight = self.target, self.target.names[layer.name]
        if isinstance(solved, QTensor) and target.format in PACKED:
            tensors = FORMATS[target.format].encode(solved)
        else:  # back in the shape and order of the source
            whole = qtensor.dense(solved, target.scale_dtype)
            whole = from_matrix(whole, layer.kind, target.stored[weight].shape).contiguous()
            tensors = sparse.pack(whole) if target.format == SPARSE else {"weight": whole}
        return {_prefix(weight) + suffix: tensor for suffix, tensor in tensors.items()}

    def content(
        self, block: SolvedBlock, encoded: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a block's file, and the texts in it."""
        tensors = {name: tensor for group in encoded.values() for name, tensor in group.items()}
        for one in block.layers:
            if not self._gives_back(one.spec):
                tensors |= {_beside(one.layer) + name: tensor for name, tensor in tensors_of(one.solved).items()}
        about = {one.layer.name: (one.output_error, one.weight_error, one.solved.notes) for one in block.layers}
        return tensors, {ABOUT: json.dumps(about)}

    def readers(self, files: Sequence[Path]) -> list[partial[SolvedBlock]]:
        """What reads each of the first blocks, just as it was solved."""
        return [partial(self._read, name, file) for name, file in zip(self.anatomy.blocks, files, strict=False)]

    def _read(self, name: str, file: Path) -> SolvedBlock:
        layers = {layer.name: layer for layer in self.anatomy.of_block(name)}
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()[ABOUT])
            tensors = {one: opened.get_tensor(one) for one in opened.keys()}  # noqa: SIM118 - not a mapping
        return SolvedBlock(name, tuple(self._solved(layers[one], tensors, *said) for one, said in about.items()))

    def _solved(
        self, layer: Layer, stored: Mapping[str, Tensor], output_error: float | None, weight_error: float, notes: Sequence[str]
    ) -> SolvedLayer:
        spec, given = self.plan.layers[layer.name], self._gives_back(self.plan.layers[layer.name])
        prefix = _prefix(self.target.names[layer.name]) if given else _beside(layer)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if not given:
            solved = solved_of(tensors, layer, spec)
        elif spec.scheme:
            solved = PACKED[self.target.format].decode(tensors, spec.scheme, (layer.N, layer.K))
        else:
            solved = Pruned(to_matrix(tensors["weight"], layer.kind).contiguous())
        return SolvedLayer(layer, replace(solved, notes=tuple(notes)), spec, output_error, weight_error)

    def _gives_back(self, spec: LayerSpec) -> bool:
        """Whether the format holds a layer bit for bit: not where it rounds to the stored dtype, or drops signs of zeros."""
        return self.target.format in PACKED if spec.scheme else self.target.format != SPARSE

    @property
    def beside_bytes(self) -> int:
        """What the files have that the checkpoint does not."""
        exact = replace(self.target, format="compressed-tensors")
        specs = [(layer, self.plan.layers[layer.name]) for layer in self.anatomy.layers]
        return sum(exact.layer_bytes(layer, spec) for layer, spec in specs if not (spec.dense or self._gives_back(spec)))


def _prefix(weight: str) -> str:
    return weight.removesuffix("weight")


def _beside(layer: Layer) -> str:
    return f"{SOLVED}{layer.name}."
