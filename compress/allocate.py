"""Where zeros go: plans that give every layer its share of them, exact in total to one unit of the pattern."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import models
from compress.errors import CompressError
from compress.linalg import damped_inverse
from compress.models import Anatomy, Layer, matrix, weight_of
from compress.sequential import Settings, batches_of, dense_stats
from compress.solvers.rtn import output_error
from compress.spec import LayerSpec, Plan, Sparsity

Score = Literal["magnitude", "wanda", "obs"]
Loss = Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]

LAYER_CAP = 0.99  # of a layer's units, where a method might take all of them
OUTLIER = 5.0  # times the mean score of its block (OWL's M)
OWL_RANGE = 0.08  # OWL's lambda: block sparsities lie in a band twice as wide
OWL_NM_RANGE = 0.25  # the same for N of every M, as a fraction of M: the paper's 2 of 8
ECOFLAP_RANGE = 0.1  # how far above the request a block's sparsity may be
ECOFLAP_STEP = 1e-3
LOW_BITS = 15  # of a non-negative float32, which orders like its 31 bits read as an integer; the others make the first histogram


def uniform(anatomy: Anatomy, sparsity: Sparsity) -> Plan:
    """The same fraction everywhere, rounded so that the layers' counts add up to the request."""
    _check_fit(anatomy, sparsity)
    if sparsity.nm:
        return Plan({layer.name: LayerSpec(sparsity=sparsity) for layer in anatomy.layers})
    return _plan(anatomy, sparsity, {layer.name: sparsity.fraction for layer in anatomy.layers}, cap=1.0)


def global_threshold(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor] | None,
    sparsity: Sparsity,
    settings: Settings,
    score: Score = "wanda",
    cap: float = LAYER_CAP,
) -> Plan:
    """As many zeros in every layer as it has units below one threshold, the same for all layers; ties go by order.

    Scores of single weights, added up over blocks: "magnitude" w^2, which needs no `inputs`; "wanda" w^2 H_jj and "obs"
    w^2 / [H^-1]_jj, what removing the weight adds to the layer's squared output error without and with the others making up
    for it, over the squared output per weight of the layer. No layer loses more than `cap` of its units. Statistics come from
    one pass of the dense model; scores are computed twice from them and never held for more than one layer.
    """
    _check_fit(anatomy, sparsity)
    if sparsity.nm:
        raise CompressError(f"A global threshold cannot give every layer pattern {sparsity.pattern}; use uniform or owl.")
    if score != "magnitude" and inputs is None:
        raise ValueError(f"score {score} needs calibration inputs")
    columns = None if inputs is None or score == "magnitude" else _columns(model, anatomy, inputs, settings, score)
    units = [sparsity.units(layer.N, layer.K) for layer in anatomy.layers]
    caps = _caps(units, cap)
    total = _total(units, sparsity, caps)
    counts = _below_one_threshold(lambda: _scores(model, anatomy.layers, columns, sparsity, settings.device), caps, total)
    return _with_counts(anatomy, sparsity, counts)


def owl(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], sparsity: Sparsity, settings: Settings) -> Plan:
    """Fewer zeros for blocks with more outliers (OWL, arXiv 2310.05175): all layers of a block share a fraction.

    A block's outlier ratio is the fraction of its scores |w_ij| ||x_j|| above `OUTLIER` times their mean; scaled to
    0 .. 2 `OWL_RANGE` it is added to the density. The paper then centres the plain mean over blocks; here the shift makes the
    total exact. Pattern N:M gives each block a whole N between 1 and M-1; the kept weights then fall short of the request
    by less than one N of one block, and where all blocks are of one size not at all.
    """
    _check_fit(anatomy, sparsity)
    _check_blocks(anatomy, "owl")
    ratios = _outlier_ratios(model, anatomy, inputs, settings)
    low, high = min(ratios), max(ratios)
    spread = [(ratio - low) / (high - low) if high > low else 0.5 for ratio in ratios]
    if sparsity.nm:
        return _owl_nm(anatomy, sparsity.nm, spread)
    fractions = {
        layer.name: sparsity.fraction - 2 * OWL_RANGE * more
        for block, more in zip(anatomy.blocks, spread, strict=True)
        for layer in anatomy.of_block(block)
    }
    return _plan(anatomy, sparsity, fractions, LAYER_CAP)


def ecoflap(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    sparsity: Sparsity,
    settings: Settings,
    loss: Loss | None = None,
    seed: int = 0,
) -> Plan:
    """Fewer zeros for blocks on which the loss depends more (ECoFLaP, arXiv 2310.02998, its zeroth-order variant).

    A block's importance is the sum over batches of |L(w + e z) - L(w - e z)| / 2e with normal noise z on its weights: two
    forward passes of the whole model per block, and no backward. Each block keeps 1 - s - `ECOFLAP_RANGE` of its weights, and
    the rest of the budget in proportion to importance until it is full. The authors round shares up and, where that
    overshoots, their code adds to the largest groups what it should take from them; shares here are exact to start with.
    `loss` is by default that of the next token. Holds the whole model in float32: differences this small drown in 16 bits.
    """
    _check_fit(anatomy, sparsity)
    _check_blocks(anatomy, "ecoflap")
    if sparsity.nm:
        raise CompressError(f"ECoFLaP's fractions cannot be given to pattern {sparsity.pattern}; use uniform or owl.")
    if loss is None and not models.is_causal(model):
        raise CompressError(f"ECoFLaP needs a loss, and {type(model).__name__} predicts no next token; use owl or global.")
    importance = _importance(model, anatomy, inputs, settings, loss or next_token_loss, seed)
    units = [sum(sparsity.units(layer.N, layer.K) for layer in anatomy.of_block(block)) for block in anatomy.blocks]
    kept = _filled(units, sparsity.fraction, importance)
    fractions = {
        layer.name: 1 - share / of
        for block, share, of in zip(anatomy.blocks, kept, units, strict=True)
        for layer in anatomy.of_block(block)
    }
    return _plan(anatomy, sparsity, fractions, LAYER_CAP)


def next_token_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The mean loss of a causal model on its own next tokens, padding left out."""
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    found: Tensor = model(**batch, labels=labels).loss
    return found


def _check_fit(anatomy: Anatomy, sparsity: Sparsity) -> None:
    if sparsity.pattern == "row":
        raise CompressError("Pattern row takes the same number of neurons from every block; it cannot be allocated.")
    uniformly = LayerSpec(sparsity=sparsity)
    Plan({layer.name: uniformly for layer in anatomy.layers}).check(anatomy.shapes)


def _check_blocks(anatomy: Anatomy, method: str) -> None:
    if len(anatomy.blocks) < 2:
        raise CompressError(f"{method} shares zeros out between blocks, and the model has only one; use global or uniform.")


def _caps(units: Sequence[int], cap: float) -> list[int]:
    """The most units that each layer may lose; never all of them."""
    return [min(math.floor(cap * count), count - 1) for count in units]


def _total(units: Sequence[int], sparsity: Sparsity, caps: Sequence[int]) -> int:
    total = round(sparsity.fraction * sum(units))
    if total > sum(caps):
        raise CompressError(
            f"A sparsity of {sparsity.fraction:g} needs {total:,} zeros; with some left in every layer there can be "
            f"{sum(caps):,}. Ask for less."
        )
    return total


def _plan(anatomy: Anatomy, sparsity: Sparsity, fractions: Mapping[str, float], cap: float) -> Plan:
    """Every layer near its fraction, all shifted alike so that the total is exact and no layer has less than 0 or over `cap`."""
    units = [sparsity.units(layer.N, layer.K) for layer in anatomy.layers]
    caps = _caps(units, cap)
    total = _total(units, sparsity, caps)
    wanted = [fractions[layer.name] for layer in anatomy.layers]
    shares = _shifted(wanted, units, [0.0] * len(units), [limit / count for limit, count in zip(caps, units, strict=True)], total)
    return _with_counts(anatomy, sparsity, _rounded(shares, caps, total))


def _with_counts(anatomy: Anatomy, sparsity: Sparsity, counts: Sequence[int]) -> Plan:
    """A plan in which `Sparsity.pruned` gives back these counts."""
    return Plan(
        {
            layer.name: LayerSpec(sparsity=Sparsity(count / sparsity.units(layer.N, layer.K), sparsity.pattern))
            for layer, count in zip(anatomy.layers, counts, strict=True)
        }
    )


def _shifted(
    levels: Sequence[float], sizes: Sequence[int], lows: Sequence[float], highs: Sequence[float], total: int
) -> list[float]:
    """size * clamp(level + shift, low, high) for the one shift with which they add up to `total`, found by bisection."""

    def shares(shift: float) -> list[float]:
        return [
            size * min(max(level + shift, low), high) for level, size, low, high in zip(levels, sizes, lows, highs, strict=True)
        ]

    below, above = min(lows) - max(levels), max(highs) - min(levels)
    for _ in range(100):
        middle = (below + above) / 2
        if sum(shares(middle)) < total:
            below = middle
        else:
            above = middle
    return shares(above)


def _rounded(shares: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each at most its cap, and next to its share: largest remainders are rounded up."""
    counts = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    left = total - sum(counts)
    while left > 0:
        for i in by_remainder:
            if left and counts[i] < caps[i]:
                counts[i] += 1
                left -= 1
    return counts


def _columns(
    model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], settings: Settings, score: Score
) -> dict[str, Float[Tensor, "K"]]:
    """For every layer what its squared weights are multiplied by, per input, relative to its squared output per weight.

    Per weight, because small layers would else seem worth more than all others: perplexity 40 instead of 32 at 70 % on the
    reference model with SparseGPT (2026-11), uniformly 30. A layer that calibration never reaches counts as if its inputs were
    uncorrelated and all of one size.
    """
    columns = {}
    for layer, W, stats in dense_stats(model, anatomy, inputs, settings):
        H = torch.eye(layer.K, device=W.device) if stats is None or not stats.H.any() else stats.H
        diagonal = H.diagonal()
        if score == "obs":
            diagonal = 1 / damped_inverse(H.double(), settings.options.damping)[0].diagonal().float()
        squared_output = output_error(W, H).sum().clamp(min=torch.finfo(torch.float32).tiny)
        columns[layer.name] = diagonal / (squared_output / W.numel())
    return columns


def _scores(
    model: PreTrainedModel,
    layers: Iterable[Layer],
    columns: Mapping[str, Tensor] | None,
    sparsity: Sparsity,
    device: torch.device,
) -> Iterator[Int32[Tensor, "U"]]:
    """The scores of every layer's units, one layer at a time, as integers of the same order."""
    rows, cols = sparsity.block
    for layer in layers:
        scores = _weight(model, layer, device).square()
        if columns is not None:
            scores *= columns[layer.name]
        if sparsity.block != (1, 1):
            scores = scores.view(layer.N // rows, rows, layer.K // cols, cols).sum((1, 3))
        yield scores.flatten().view(torch.int32)


def _weight(model: PreTrainedModel, layer: Layer, device: torch.device) -> Float[Tensor, "N K"]:
    return matrix(model.get_submodule(layer.name)).detach().to(device, torch.float32)


def _below_one_threshold(scores: Callable[[], Iterable[Tensor]], caps: Sequence[int], total: int) -> list[int]:
    """How many of each layer's scores are among the `total` smallest, when none may have more than its cap.

    Two passes over the scores, by their high and then their low bits, as a radix sort would.
    """
    bins = 1 << (31 - LOW_BITS)
    coarse = torch.stack([torch.bincount(bits >> LOW_BITS, minlength=bins).int().cpu() for bits in scores()])
    nothing = [0] * len(caps)
    high, below = _crossing(coarse, nothing, caps, total)
    fine = torch.stack(
        [
            torch.bincount(bits[bits >> LOW_BITS == high] & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS).int().cpu()
            for bits in scores()
        ]
    )
    low, below = _crossing(fine, below, caps, total)
    counts = [min(count, cap) for count, cap in zip(below, caps, strict=True)]
    for i, ties in enumerate(fine[:, low].tolist()):
        counts[i] += min(ties, caps[i] - counts[i], total - sum(counts))
    return counts


def _crossing(histograms: Int32[Tensor, "L B"], below: Sequence[int], caps: Sequence[int], total: int) -> tuple[int, list[int]]:
    """The first bin at which the capped counts of all layers reach `total`, and each layer's count below it."""
    reached = torch.zeros(histograms.shape[1], dtype=torch.int64)
    for row, start, cap in zip(histograms, below, caps, strict=True):
        reached += (row.cumsum(0) + start).clamp(max=cap)
    at = int((reached >= total).nonzero()[0])
    return at, [start + int(row[:at].sum()) for row, start in zip(histograms, below, strict=True)]


def _outlier_ratios(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], settings: Settings) -> list[float]:
    """For every block the fraction of its Wanda scores that exceed `OUTLIER` times their mean."""
    norms = {
        layer.name: stats.H.diagonal().sqrt()
        for layer, _, stats in dense_stats(model, anatomy, inputs, settings)
        if stats is not None
    }
    ratios = []
    for block in anatomy.blocks:
        layers = [layer for layer in anatomy.of_block(block) if layer.name in norms]

        def scores(layers: Sequence[Layer] = layers) -> Iterator[Tensor]:
            return (_weight(model, layer, settings.device).abs() * norms[layer.name] for layer in layers)

        weights = sum(layer.N * layer.K for layer in layers)
        mean = sum(part.sum(dtype=torch.float64).item() for part in scores()) / max(weights, 1)
        outliers = sum(int((part > OUTLIER * mean).sum()) for part in scores())
        ratios.append(outliers / max(weights, 1))
    return ratios


def _owl_nm(anatomy: Anatomy, nm: tuple[int, int], spread: Sequence[float]) -> Plan:
    N, M = nm
    sizes = [sum(layer.N * layer.K // M for layer in anatomy.of_block(block)) for block in anatomy.blocks]
    levels = [N + 2 * OWL_NM_RANGE * M * more for more in spread]
    lows, highs = [1.0] * len(sizes), [M - 1.0] * len(sizes)
    shares = [share / size for share, size in zip(_shifted(levels, sizes, lows, highs, N * sum(sizes)), sizes, strict=True)]
    kept = [math.floor(share + 1e-9) for share in shares]  # bisection may end a hair below a whole number
    left = N * sum(sizes) - sum(count * size for count, size in zip(kept, sizes, strict=True))
    for i in sorted(range(len(kept)), key=lambda i: kept[i] - shares[i]):
        if kept[i] < M - 1 and sizes[i] <= left:
            kept[i] += 1
            left -= sizes[i]
    specs = zip(anatomy.blocks, (LayerSpec(sparsity=Sparsity.of(f"{count}:{M}", None)) for count in kept), strict=True)
    return Plan({layer.name: spec for block, spec in specs for layer in anatomy.of_block(block)})


def _filled(units: Sequence[int], fraction: float, importance: Sequence[float]) -> list[float]:
    """What every block keeps: its floor, and of what is left of the budget a part like its importance, until it is full."""
    budget = (1 - fraction) * sum(units)
    floors = [count * max(0.0, 1 - fraction - ECOFLAP_RANGE) for count in units]
    weights = [value / max(importance) for value in importance]

    def kept(factor: float) -> list[float]:
        return [min(float(count), floor + factor * weight) for count, floor, weight in zip(units, floors, weights, strict=True)]

    low, high = 0.0, max(units) / min(weight for weight in weights if weight > 0)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(kept(middle)) < budget:
            low = middle
        else:
            high = middle
    return kept(high)


def _importance(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    settings: Settings,
    loss: Loss,
    seed: int,
) -> list[float]:
    """How much the loss moves when the weights of a block do, for every block."""
    there = model.dtype == torch.float32 and model.device.type == settings.device.type
    work = model if there else copy.deepcopy(model)
    nn.Module.to(work, settings.device, torch.float32)
    batches = [{name: value.to(settings.device) for name, value in batch.items()} for batch in batches_of(inputs)]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in anatomy.blocks:
        weights = [weight_of(work.get_submodule(layer.name)) for layer in anatomy.of_block(block)]
        noise = [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]
        stored = [weight.detach().clone() for weight in weights]
        try:
            sides = []
            for sign in (1, -1):
                _set(weights, stored, noise, sign * ECOFLAP_STEP)
                with torch.no_grad():
                    sides.append([loss(work, batch).double().item() for batch in batches])
        finally:
            _set(weights, stored, noise, 0.0)
        found.append(sum(abs(up - down) for up, down in zip(*sides, strict=True)) / (2 * ECOFLAP_STEP))
    if not max(found) > 0 or not math.isfinite(sum(found)):
        raise CompressError(f"The loss on the calibration data does not react to the weights of {type(model).__name__}: {found}.")
    return found


def _set(weights: Sequence[Tensor], stored: Sequence[Tensor], noise: Sequence[Tensor], step: float) -> None:
    """weights = stored + step * noise, in place."""
    with torch.no_grad():
        for weight, was, z in zip(weights, stored, noise, strict=True):
            weight.copy_(was if step == 0 else was + step * z)
