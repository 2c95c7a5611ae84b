"""The verbs, each the whole of its data flow on one page."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from compress import checkpoint, evaluate, hf, models, report, sequential
from compress.calib import data
from compress.calib.data import Calibration
from compress.checkpoint import Writer
from compress.errors import CompressError
from compress.formats import FORMATS, Format
from compress.formats.compatibility import warnings_for
from compress.models import Anatomy, Layer, from_matrix
from compress.report import LayerReport, Report
from compress.sequential import Settings, SolvedBlock
from compress.solvers import NEEDS_CALIBRATION, SOLVERS
from compress.solvers.options import Options, Order
from compress.spec import Plan, Scheme

FormatName = Literal["compressed-tensors", "gptq", "dense"]
Method = Literal["gptq", "rtn"]
LONGEST_DEFAULT = 2048  # tokens per calibration sample where the model takes more
EVALUATED_WINDOWS = 64

Track = Callable[[Iterable[SolvedBlock], int], Iterable[SolvedBlock]]


def quantize(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: Method = "gptq",
    order: Order = "group",
    damping: float = 0.01,
    format: FormatName = "compressed-tensors",  # noqa: A002  (the flag's name)
    plan: str | Path | Plan | None = None,
    skip: Sequence[str] = (),
    calib: str | Path | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    eval: bool = False,  # noqa: A002
    overwrite: bool = False,
    track: Track = lambda blocks, _total: blocks,
) -> Report:
    """Quantize a model folder or hub id (the embedded reference for None) into a new folder, and say what that cost.

    `out` defaults to the model's name and bits in the current folder. `plan` overrides `bits`, `group_size` and `symmetric`
    layer by layer. `calib` is a text file, a hub dataset, or images; None is built-in text. `track` wraps the iterator over
    solved blocks, as a progress bar does. Raises CompressError for anything the user can act on; `out` is then as it was.
    """
    arguments = {name: _plain(value) for name, value in locals().items() if name != "track"}
    start = time.perf_counter()
    source = models.resolve(model)
    out = Path(out or f"{source.resolve().name}-{'mixed' if plan else f'{bits}bit'}")
    scheme, options, encoder = Scheme(bits, group_size, symmetric), Options(order=order, damping=damping), FORMATS[format]
    with Writer(source, out, overwrite) as writer:
        config, stored = models.check_source(source), checkpoint.index(source)
        dense = models.load(source)
        anatomy = models.anatomy(dense, skip)
        chosen = _plan(plan, anatomy, scheme)
        settings = _settings(dense, method, options, encoder, device, dtype)
        names = models.weight_names(dense, chosen.quantized, stored)
        writer.check_space(_size_after(stored, names, chosen, anatomy, encoder, settings))
        linears, left = _split(anatomy, chosen)
        warnings = warnings_for(chosen, linears, format, config, left)
        calibration = _calibration(source, dense, calib, samples, seq_len, seed) if method in NEEDS_CALIBRATION else None

        fitted = {} if plan else report.fitted_notes(anatomy, group_size, chosen.group_sizes)
        layers: list[LayerReport] = []
        replaced: dict[str, list[str]] = {}
        inputs = calibration.inputs if calibration else None
        blocks = sequential.run(dense, anatomy, chosen, inputs, settings)
        for number, block in enumerate(track(blocks, len(anatomy.blocks))):
            tensors = _encoded(block, names, dense, encoder)
            writer.block(number, {name: tensor for group in tensors.values() for name, tensor in group.items()})
            replaced |= {weight: list(group) for weight, group in tensors.items()}
            layers += [LayerReport.of(solved, fitted.get(solved.layer.name, ())) for solved in block.layers]

        quantization = encoder.config(chosen, linears, left)
        files = writer.finish(replaced, *_documents(config, quantization, chosen))
        before, after = _perplexities(source, writer.finished, seq_len, settings) if eval else (None, None)
        size_after = sum(info.nbytes for info in checkpoint.index(writer.finished).values())
        size_before, bits_per_weight = report.sizes(stored, size_after)
        result = Report(
            command=report.command(),
            arguments=arguments,
            versions=report.versions(),
            source=str(source),
            out=str(out),
            format=format,
            calibration=calibration.source if calibration else None,
            layers=tuple(layers),
            dense=anatomy.dense | {name: "dense by plan" for name in anatomy.in_features if name not in names},
            warnings=warnings,
            size_before=size_before,
            size_after=size_after,
            bits_per_weight=bits_per_weight,
            seconds=time.perf_counter() - start,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            perplexity_before=before,
            perplexity_after=after,
            files=files,
        )
        writer.seal(result.to_json())
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return "(given)"
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _plan(plan: str | Path | Plan | None, anatomy: Anatomy, scheme: Scheme) -> Plan:
    if plan is None:
        return Plan.uniform(anatomy.in_features, scheme)
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    loaded.check(anatomy.in_features)
    return loaded


def _settings(
    model: PreTrainedModel, method: str, options: Options, encoder: Format, device: str | None, dtype: str | None
) -> Settings:
    if method not in SOLVERS:
        raise CompressError(f"There is no method {method}; choose one of {', '.join(SOLVERS)}.")
    chosen = models.device(device)
    stored = model.dtype
    return Settings(method, options, chosen, models.dtype(dtype, stored, chosen), encoder.scale_dtype(stored))


def _calibration(
    source: Path, model: PreTrainedModel, calib: str | Path | None, samples: int, seq_len: int | None, seed: int
) -> Calibration:
    if model.main_input_name == "pixel_values":
        return data.images(calib, source, samples=samples, seed=seed)
    length = _seq_len(source, seq_len)
    encoder = not models.is_causal(model)
    return data.text(calib, models.tokenizer(source), samples=samples, seq_len=length, seed=seed, special_tokens=encoder)


def _seq_len(source: Path, asked: int | None) -> int:
    longest = models.max_positions(source)
    if asked is None:
        return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)
    if longest and asked > longest:
        raise CompressError(f"--seq-len is {asked}, but the model was built for at most {longest} positions.")
    return asked


def _size_after(
    stored: Mapping[str, checkpoint.TensorInfo],
    names: Mapping[str, str],
    plan: Plan,
    anatomy: Anatomy,
    encoder: Format,
    settings: Settings,
) -> int:
    """Bytes of the finished tensors, known before any work starts."""
    total = sum(info.nbytes for info in stored.values())
    for layer in anatomy.layers:
        if (scheme := plan.layers[layer.name].scheme) is not None:
            layout = encoder.layout(scheme, (layer.N, layer.K), settings.scale_dtype)
            total += checkpoint.layout_bytes(layout) - stored[names[layer.name]].nbytes
    return total


def _encoded(
    block: SolvedBlock, names: Mapping[str, str], model: PreTrainedModel, encoder: Format
) -> dict[str, dict[str, Tensor]]:
    """For every weight of the source, the tensors that stand for it, named as the source names things."""
    groups = {}
    for solved in block.layers:
        weight = names[solved.layer.name]
        prefix = weight.removesuffix("weight")
        tensors = encoder.encode(solved.q)
        if "weight" in tensors:  # dense: back in the shape and order of the source
            shape = models.weight_of(model.get_submodule(solved.layer.name)).shape
            tensors["weight"] = from_matrix(tensors["weight"], solved.layer.kind, shape).contiguous()
        groups[weight] = {prefix + suffix: tensor for suffix, tensor in tensors.items()}
    return groups


def _split(anatomy: Anatomy, plan: Plan) -> tuple[list[Layer], list[str]]:
    """The layers that the plan quantizes, and the names of all that stay dense."""
    quantized = [layer for layer in anatomy.layers if plan.layers[layer.name].scheme]
    return quantized, [*anatomy.dense, *(name for name, spec in plan.layers.items() if spec.scheme is None)]


def _documents(config: dict[str, Any], quantization: dict[str, Any] | None, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """The new config.json, and further files by name: the plan, and what GPTQ's readers want beside it."""
    extra = {"compress_plan.json": plan.to_json()}
    if quantization is None:
        return config, extra
    if quantization["quant_method"] == "gptq":
        extra["quantize_config.json"] = checkpoint.to_json(quantization)
    return config | {"quantization_config": quantization}, extra


def _perplexities(source: Path, finished: Path, seq_len: int | None, settings: Settings) -> tuple[float, float]:
    """Perplexity of the dense model and of the finished folder, packed as it will be served, on held-out text."""
    windows = data.held_out_text(
        None, models.tokenizer(source), seq_len=_seq_len(source, seq_len), samples=EVALUATED_WINDOWS
    ).inputs["input_ids"]
    before, after = (
        evaluate.perplexity(hf.load(folder, device=settings.device, dtype=settings.dtype), windows)
        for folder in (source, finished)
    )
    return before, after
