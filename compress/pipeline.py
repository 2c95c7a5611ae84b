"""What every verb shares, on one page: a dense model in, a plan, solved blocks, a finished folder and its report out."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from compress import (
    checkpoint,
    evaluate,
    hf,
    integrity,
    left_dense,
    machine,
    models,
    report,
    resume,
    sequential,
    side_files,
    skips,
)
from compress.calib import data
from compress.checkpoint import Writer
from compress.errors import CompressError
from compress.formats import FORMATS, Format, dense, sparse
from compress.formats.compatibility import OURS, readers, said_of
from compress.formats.facts import gather
from compress.job import Job
from compress.mixed.budget import SPARSE, Target
from compress.mixed.search import Found, Request, Source, search
from compress.mixed.weighing import Weighing
from compress.models import Layer, matrix
from compress.opening import Dense, opened, seq_len, settings_of
from compress.proxies.bench import Bench
from compress.proxies.measuring import Wanted, measured
from compress.report import LayerReport, Report
from compress.resume import Blocks, ResumableWriter
from compress.rotate import checkpoint as rotated
from compress.rotate.choose import Judgement, judge
from compress.rotate.folding import folds
from compress.sequential import Settings, SolvedBlock
from compress.solvers.masks import weights_to_keep
from compress.spec import LayerSpec, Plan, Scheme
from compress.structured import rows

EVALUATED_WINDOWS = 64
ONLY_OURS = "Only compress.load reads format sparse; every program reads --format dense, which is as large as the source."


Solve = Callable[[Dense, Plan, Settings], Iterator[SolvedBlock]]


@dataclass(frozen=True)
class Chosen:
    """A plan, and how to solve it; None is layer by layer, which can go on where an interrupted run was."""

    plan: Plan
    solve: Solve | None = None
    notes: tuple[str, ...] = ()  # for the report


Choose = Callable[[Dense, Settings], Chosen]


@dataclass(frozen=True)
class Written:
    """What the blocks' files hold, `resumed` of them from an earlier run, and what goes beside them, for `Writer.finish`."""

    layers: Sequence[LayerReport]
    dense: Mapping[str, str]
    warnings: tuple[str, ...]
    replaced: Mapping[str, Sequence[str]]
    config: Mapping[str, Any]
    extra: Mapping[str, str]
    resumed: int = 0


def layer_wise(
    source: Dense, plan: Plan, settings: Settings, done: Sequence[Callable[[], SolvedBlock]] = ()
) -> Iterator[SolvedBlock]:
    """Solve every layer against the Hessian of its inputs, block by block; of its outputs too, if the options say so."""
    moments = sequential.NO_MOMENTS
    if source.weighing is not None and source.inputs is not None:
        left = [_weighed(source.anatomy.of_block(name), plan) for name in source.anatomy.blocks[len(done) :]]
        moments = source.weighing.moments(source.model, [*([] for _ in done), *left], source.inputs)
    return sequential.run(source.model, source.anatomy, plan, source.inputs, settings, moments, done)


def _weighed(layers: Sequence[Layer], plan: Plan) -> list[Layer]:
    """Those whose solver reads moments: not what prunes, or stays dense."""
    return [layer for layer in layers if (spec := plan.layers[layer.name]).scheme and not spec.sparsity]


def run(job: Job, choose: Choose) -> Report:
    """Open the model, choose a plan, solve its blocks, write them as they come, and seal the folder with its report.

    Blocks that a run of the same job has left, which was interrupted, are not solved again.
    """
    start = time.perf_counter()
    encoder = dense if job.format == SPARSE else FORMATS[job.format]
    with ResumableWriter(job.source, job.out, job.overwrite) as writer:
        source = opened(job)
        settings = settings_of(job, source.model, encoder)
        source = replace(source, weighing=_weighing(job, source, settings))
        chosen = choose(source, settings)
        plan = chosen.plan
        plan.check(source.anatomy.shapes)
        _config_of(encoder, source, plan)  # raises for a plan that the format cannot hold
        others = (plan.to_json(), job.format, job.rotate, job.seed)  # with these a rotation is chosen again
        key = None if chosen.solve else resume.key(source.stored, source.inputs, settings, *others)
        found = writer.begin(key, len(source.anatomy.blocks))
        source, rotation = _rotated(job, writer, source, plan, settings) if job.rotate else (source, ())
        names = models.weight_names(source.model, plan.changed, source.stored)
        files = Blocks(Target(source.stored, names, job.format, settings.stored), source.anatomy, plan)
        writer.check_space(files.target.tensor_bytes(source.anatomy.layers, plan.layers), files.beside_bytes)

        layers: list[LayerReport] = []
        replaced: dict[str, list[str]] = {}
        became = dict.fromkeys(plan.layers, LayerSpec())  # dense, unless it comes out solved
        blocks = (chosen.solve or partial(layer_wise, done=files.readers(found)))(source, plan, settings)
        for number, block in enumerate(_tracked(job, blocks, len(found), len(source.anatomy.blocks))):
            tensors = files.encoded(block)
            if number >= len(found):
                writer.block(number, *files.content(block, tensors))
            replaced |= {weight: list(group) for weight, group in tensors.items()}
            layers += [LayerReport.of(solved, job.group_size) for solved in block.layers]
            became |= {solved.layer.name: solved.spec for solved in block.layers}

        stayed = source.anatomy.dense | {
            name: sequential.NEVER_CALLED if name in names else _why_dense(K, job.scheme)
            for name, K in source.anatomy.in_features.items()
            if became[name].dense
        }
        warnings = integrity.notes(source.model) + side_files.left_behind(job.source)
        warnings += tuple(skips.needless(job.skip, source.anatomy.dense, models.SKIPPED))
        warnings += report.kept_zeros(layers, plan) + rotation + chosen.notes
        warnings += source.weighing.notes if source.weighing else ()
        warnings += tuple(left_dense.warnings(source.model, stayed))
        documents = _documents(source.config, _config_of(encoder, source, Plan(became)), Plan(became))
        return _seal(job, writer, source, settings, Written(layers, stayed, warnings, replaced, *documents, len(found)), start)


def find(job: Job, request: Request) -> Found:
    """Open the model and search a plan for it; nothing is written but the library of solved layers."""
    source = opened(job)
    return found(job, source, settings_of(job, source.model, FORMATS[job.format]), request)


def found(job: Job, source: Dense, settings: Settings, request: Request) -> Found:
    """Search a plan for a model that is open."""
    return search(_searchable(job, source, settings), _fast(settings), request, job.track)


def find_bench(job: Job, name: str, wanted: Wanted) -> Bench:
    """Open the model and measure its bench, in the folder `job.out`, or read it where it is there."""
    source = opened(job)
    settings = settings_of(job, source.model, FORMATS[job.format])
    return measured(_searchable(job, source, settings), _fast(settings), name, wanted, job.out, job.track)


def _fast(settings: Settings) -> Settings:
    """Layers of the library are solved by effort fast: they rank options alike."""
    return replace(settings, options=replace(settings.options, sweeps=0, corrected=False, coupled=False))


def _searchable(job: Job, source: Dense, settings: Settings) -> Source:
    names = models.weight_names(source.model, source.anatomy.in_features, source.stored)
    target = Target(source.stored, names, job.format, settings.stored)
    assert source.inputs is not None
    return Source(source.model, source.anatomy, source.inputs, source.judged, target, models.mask_token(job.source))


def run_rows(job: Job, fraction: float, method: rows.Method) -> Report:
    """Remove neurons and heads block by block, and write the smaller dense model."""
    start = time.perf_counter()
    with Writer(job.source, job.out, job.overwrite) as writer:
        source = opened(job)
        settings = settings_of(job, source.model, dense)
        writer.check_space(sum(info.nbytes for info in source.stored.values()))
        shrunk = rows.prune_rows(
            writer,
            source.model,
            source.anatomy,
            source.stored,
            source.config,
            source.inputs,
            fraction,
            settings,
            method,
            job.track,
        )
        layers = [LayerReport.shrunk(one) for one in shrunk.layers]
        stayed = source.anatomy.dense | {
            name: "as it was" for name in source.anatomy.in_features if name not in {one.layer.name for one in shrunk.layers}
        }
        notes = side_files.left_behind(job.source) + tuple(shrunk.shrinkage.notes)
        written = Written(layers, stayed, notes, shrunk.replaced, shrunk.config, {})
        return _seal(job, writer, source, settings, written, start)


def _seal(job: Job, writer: Writer, source: Dense, settings: Settings, written: Written, start: float) -> Report:
    """Put the folder together, measure it, and add its report."""
    stem = sparse.STEM if job.format == SPARSE else checkpoint.STEM
    files = writer.finish(written.replaced, written.config, written.extra, stem)
    before, after = _perplexities(job, writer.finished, settings) if job.eval else (None, None)
    tensors = checkpoint.index(writer.finished)
    facts = gather(written.config, tensors)
    warnings = (ONLY_OURS,) if job.format == SPARSE else said_of(facts)
    size_after = sum(info.nbytes for info in tensors.values())
    size_before, bits_per_weight = report.sizes(source.stored, size_after)
    result = Report(
        command=report.command(),
        arguments=dict(job.arguments),
        versions=report.versions(),
        source=str(job.source),
        out=str(job.out),
        format=job.format,
        calibration=source.calibration.source if source.calibration else None,
        layers=tuple(written.layers),
        dense=dict(written.dense),
        warnings=warnings + written.warnings,
        readers=(OURS,) if job.format == SPARSE else tuple(one.reader for one in readers(facts) if one.loads),
        size_before=size_before,
        size_after=size_after,
        bits_per_weight=bits_per_weight,
        seconds=time.perf_counter() - start,
        peak_memory=machine.peak_memory(),
        perplexity_before=before,
        perplexity_after=after,
        files=files,
        resumed_blocks=written.resumed,
    )
    writer.seal(result.to_json())
    return result


def _tracked(job: Job, blocks: Iterator[SolvedBlock], found: int, total: int) -> Iterator[SolvedBlock]:
    """Pass blocks through, those `found` in an earlier run with a bar of their own: they tell nothing of the time others take."""
    if found:
        yield from job.track(itertools.islice(blocks, found), found, "reading solved blocks")
    yield from job.track(blocks, total - found, "solving blocks")


def _rotated(job: Job, writer: ResumableWriter, source: Dense, plan: Plan, settings: Settings) -> tuple[Dense, tuple[str, ...]]:
    """The model to go on with, rotated if that helps, and what was measured; its copy lies beside the solved blocks."""
    _check_no_zeros(source, settings)
    changes = folds(source.model, source.anatomy.blocks, job.seed)
    turned = rotated.write(job.source, writer.partial / "rotated", source.model, changes)
    model = models.load(turned)
    assert source.inputs is not None
    helps, said = _judged(writer, partial(judge, source.model, model, source.anatomy, plan, source.inputs, settings))
    if not helps:
        shutil.rmtree(turned)
        return source, (said,)
    writer.source = turned
    return replace(source, model=model, stored=checkpoint.index(turned)), (said,)


def _judged(writer: ResumableWriter, judge_it: Callable[[], Judgement]) -> tuple[bool, str]:
    """Whether a rotation helps, and what was measured: as an interrupted run judged whose blocks are kept, or anew."""
    if writer.rotation.is_file():
        helps, said = json.loads(writer.rotation.read_text(encoding="utf-8"))
        return bool(helps), str(said)
    judgement = judge_it()
    writer.rotation.write_text(json.dumps([judgement.helps, str(judgement)]), encoding="utf-8")
    return judgement.helps, str(judgement)


def _check_no_zeros(source: Dense, settings: Settings) -> None:
    """Raise where layers are pruned already and are to stay so: a rotation mixes their zeros with other weights."""
    weights = ((layer, matrix(source.model.get_submodule(layer.name))) for layer in source.anatomy.layers)
    pruned = [layer.name for layer, W in weights if settings.options.keep_zeros and weights_to_keep(W.float()) is not None]
    if pruned:
        raise CompressError(
            f"{len(pruned)} layers are pruned already, {pruned[0]} first, and a rotation would fill their zeros in. Leave out "
            "--rotate, or give --no-keep-zeros."
        )


def _weighing(job: Job, source: Dense, settings: Settings) -> Weighing | None:
    """For effort best, before any work: raises where the model or the memory cannot do it."""
    if not settings.options.coupled or settings.quantizer != "gptq" or source.inputs is None:
        return None
    return Weighing.of(source.model, source.anatomy, source.inputs, settings.device, job.track)


def _why_dense(K: int, scheme: Scheme | None) -> str:
    """Why a plan leaves a layer with K inputs dense; `scheme` is the one asked for."""
    if scheme and scheme.fit(K) is None:
        return f"its {K} inputs are no multiple of {scheme.group_size}, the group size of {scheme.grid}"
    return "dense by plan"


def _config_of(encoder: Format, source: Dense, plan: Plan) -> dict[str, Any] | None:
    """Say in terms of config.json which layers a plan quantizes, and which matrices stay dense; None for no quantized layer."""
    quantized = [layer for layer in source.anatomy.layers if plan.layers[layer.name].scheme]
    left = [*source.anatomy.dense, *(name for name, spec in plan.layers.items() if spec.scheme is None)]
    others = models.unloaded(source.model, {name: info.shape for name, info in source.stored.items()})
    return encoder.config(plan, quantized, [*left, *others]) if quantized else None


def _documents(config: dict[str, Any], quantization: dict[str, Any] | None, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """The new config.json, and further files by name: the plan, and what GPTQ's readers want beside it."""
    extra = {checkpoint.PLAN: plan.to_json()}
    if quantization is None:
        return config, extra
    if quantization["quant_method"] == "gptq":
        extra["quantize_config.json"] = checkpoint.to_json(quantization)
    return config | {"quantization_config": quantization}, extra


def _perplexities(job: Job, finished: Path, settings: Settings) -> tuple[float, float]:
    """Perplexity of the dense model and of the finished folder, packed as it will be served, on held-out text."""
    tokenizer = models.tokenizer(job.source)
    windows = data.held_out_text(None, tokenizer, seq_len=seq_len(job), samples=EVALUATED_WINDOWS).inputs["input_ids"]
    before, after = (
        _perplexity(job, hf.load(folder, device=settings.device, dtype=settings.dtype), windows, when)
        for folder, when in ((job.source, "before"), (finished, "after"))
    )
    return before, after


def _perplexity(job: Job, model: PreTrainedModel, windows: Int64[Tensor, "n T"], when: str) -> float:
    return evaluate.perplexity_of(job.track(evaluate.losses(model, windows), len(windows), f"perplexity {when}"))
