"""What calibration learns of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compress.linalg import add_cross_, add_gram_, matmul_nt, mirror, narrowed

ROWS_AT_A_TIME = 16384  # bounds the working copies of one update
HELD_OUT_ONE_IN = 5  # of the sequences that are compared with the dense model


@dataclass(frozen=True)
class Seen:
    """What a layer has to do with in one batch: its input, and what its output is added to; None for what there is not."""

    x: Tensor | None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Pull:
    """What layers should make up for, by their inputs X over M tokens, those of the dense model being X~.

    `cross` is C = (X~ - X) X^T / M, of which every layer of these inputs makes W C. Or it is that already of one layer, `alone`:
    (Y~ - Y + W (X~ - X)) X^T / M. Y is what its output is added to, the residual stream, and Y~ that of the dense model.
    """

    cross: Float[Tensor, "R K"]
    alone: bool = False

    def of(self, W: Float[Tensor, "N K"], step: int = 1) -> Float[Tensor, "n K"]:
        """What pulls at every `step`-th row of a layer."""
        return self.cross[::step] if self.alone else matmul_nt(W[::step], self.cross.t())


@dataclass(frozen=True)
class Drift:
    """What the layers before did: `fitted` over most sequences, `held_out` over the others, which are a `share` of it all."""

    fitted: Pull
    held_out: Pull
    share: float

    def whole(self) -> Pull:
        """Over all sequences."""
        return Pull(torch.lerp(self.fitted.cross, self.held_out.cross, self.share), self.fitted.alone)


@dataclass(frozen=True)
class LayerStats:
    """The Hessian of a layer's output error, H = X X^T / M over the M tokens seen; shared by layers with one input.

    `drift` is None where inputs are those of the dense model, or were not compared with them; `notes` then say why not.
    `outputs` is the second moment of the loss's gradient in the layer's outputs, to any scale; None where these count apart.
    """

    H: Float[Tensor, "K K"]
    tokens: int
    drift: Drift | None = None
    notes: tuple[str, ...] = ()
    outputs: Float[Tensor, "N N"] | None = None

    def shrunk(self) -> LayerStats:
        """H with correlations scaled by tokens / (tokens + K / 2): few tokens show more of them than there are.

        GPTQ with the H of fewer tokens than inputs can double the error of rounding to nearest on the distribution they came
        from; with this it was 0.92 to 0.99 times that for flat spectra (eigenvalues i^-0.5), and within a tenth of plain H's
        for steep ones (i^-1.5), from K / 64 tokens on (256 inputs, 3 bits, 2026-11-21).
        """
        weight = self.tokens / (self.tokens + len(self.H) / 2)
        H = weight * self.H
        H.diagonal().copy_(self.H.diagonal())
        return LayerStats(H, self.tokens)


class HessianSum:
    """Accumulates X X^T in float32 (or float64), whatever the dtype of the activations."""

    def __init__(self, K: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.lower = torch.zeros(K, K, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Float[Tensor, "M K"]) -> None:
        if not len(x):  # oneDNN takes no empty product
            return
        for rows in x.split(ROWS_AT_A_TIME):
            add_gram_(self.lower, rows)
        self.tokens += len(x)

    def stats(self) -> LayerStats:
        return LayerStats(mirror(self.lower) / max(self.tokens, 1), self.tokens)


class DriftSum:
    """Accumulates what `Pull` is made of in float32, apart for the sequences that are held out.

    `W` is that of the one layer whose output is added to something. Inputs must keep the batch dimension, or have a row for every
    token: only then is the same row the same token in both models.
    """

    def __init__(self, device: torch.device, W: Float[Tensor, "N K"] | None = None) -> None:
        self.device = device
        self.W = None if W is None else narrowed(W)
        self.sums: tuple[Tensor, Tensor] | None = None  # fitted, held out; None while nothing differs
        self.tokens = [0, 0]
        self.sequences = 0
        self.selected = False

    def add(self, mine: Seen, dense: Seen, module: nn.Module, mask: Bool[Tensor, "B T"] | None, shape: torch.Size) -> None:
        """Add what was seen of one batch of the block's input of `shape`; None where the module was not called."""
        x, dense_x = _sequences(mine.x, shape), _sequences(dense.x, shape)
        if x is None or dense_x is None or x.shape != dense_x.shape:
            self.selected = True
            return
        pairs = [(x, dense_x)]
        if (y := _sequences(mine.residual, shape)) is not None and (dense_y := _sequences(dense.residual, shape)) is not None:
            pairs.append((y, dense_y))
        held_out = _held_out(self.sequences + len(x)) - _held_out(self.sequences)
        self.sequences += len(x)
        for part, cut in enumerate((slice(len(x) - held_out), slice(len(x) - held_out, None))):
            kept = None if mask is None else mask[cut]
            rows = [tuple(rows_of(one[cut], module, kept) for one in pair) for pair in pairs]
            self.tokens[part] += len(rows[0][0])
            if not all(torch.equal(*pair) for pair in rows):
                self._add(part, rows[0][0], [narrowed(theirs - own) for own, theirs in rows])

    def _add(self, part: int, x: Float[Tensor, "M K"], steps: list[Tensor]) -> None:
        step = steps[0] if self.W is None else sum(steps[1:], nn.functional.linear(steps[0], self.W))
        if self.sums is None:
            shape = step.shape[1], x.shape[1]
            self.sums = torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device)
        for d, rows in zip(step.split(ROWS_AT_A_TIME), x.split(ROWS_AT_A_TIME), strict=True):
            add_cross_(self.sums[part], d, narrowed(rows))

    def drift(self) -> tuple[Drift | None, tuple[str, ...]]:
        """The drift, or None and why there is none if it was not measured."""
        if self.selected:
            return None, ("not corrected for drift: which tokens reach it depends on the layers before",)
        if self.sequences < 2:
            return None, ("not corrected for drift: no calibration sample could be held out",)
        if self.sums is None:
            return None, ()
        fitted, held_out = (
            Pull(total / max(count, 1), self.W is not None) for total, count in zip(self.sums, self.tokens, strict=True)
        )
        return Drift(fitted, held_out, self.tokens[1] / max(sum(self.tokens), 1)), ()


def _held_out(sequences: int) -> int:
    """How many of the first sequences are held out: the second, and then one in HELD_OUT_ONE_IN; the last ones of a batch."""
    return (sequences + HELD_OUT_ONE_IN - 2) // HELD_OUT_ONE_IN


def _sequences(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A layer's input with a sequence, or image, to every entry of dimension 0; None where it has none of them whole."""
    if x is None or (len(x) == shape[0] and (x.ndim > 2 or len(shape) != 3)):
        return x
    if x.ndim == 2 and len(shape) == 3 and len(x) == shape[0] * shape[1]:
        return x.view(shape[0], shape[1], -1)
    return None


def rows_of(x: Tensor, module: nn.Module, mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "M K"]:
    """A layer's input as rows of the matrix it multiplies: tokens, or the unfolded patches of a convolution.

    `mask` drops padding where the input has its batch and sequence dimensions.
    """
    if isinstance(module, nn.Conv2d):
        return nn.functional.unfold(x, *unfolding(module)).transpose(1, 2).flatten(0, 1)
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.flatten(0, -2)


def unfolding(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """What `unfold` needs to turn a convolution into a matrix product: kernel size, dilation, padding, stride; () otherwise."""
    if not isinstance(module, nn.Conv2d):
        return ()
    padding = module.padding if isinstance(module.padding, tuple) else ()
    return module.kernel_size, module.dilation, padding, module.stride
