"""The statistics of a model and its solved layers, gathered once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import CompressError
from compress.mixed import derivatives, hessian
from compress.mixed import gradients as first
from compress.mixed.methods import Subject
from compress.mixed.units import fitted
from compress.models import Layer, matrix
from compress.progress import Track, silent
from compress.proxies import passes
from compress.proxies.operations import INPUTS, Tensors
from compress.proxies.passes import Moments, taken
from compress.proxies.statistics import BY_OPTION, TOTALS, Sample, Statistics, places, scaled, shifted, stacked
from compress.qtensor import dense
from compress.spec import LayerSpec

DENSE_BITS = 16.0  # of a layer that stays as it is
CURVED_TOKENS, EIGENVALUE_TOKENS = 2048, 256  # of the calibration data, for what takes many passes
EIGENVALUE_STEPS, EIGENVALUE_TOLERANCE = 8, 0.02


def gather(
    subject: Subject, letters: Collection[str] = tuple(INPUTS), *, totals: bool = False, track: Track = silent
) -> Statistics:
    """The statistics of a model with solved layers: samples of the inputs named by `letters`, and on request all totals.

    A sample has SIDE rows and columns of a layer, the same for all inputs and options, drawn by the subject's seed; it is then
    scaled (H: shifted) to the mean square (H: mean) of the whole layer, so that only products of inputs are estimates. Raises
    for values that are not finite, with the layer.
    """
    gathering = _Gathering(subject)
    found = {letter: gathering.sampled(letter) for letter in track(list(letters), len(letters), "gathering inputs")}
    names = [layer.name for layer in gathering.layers]
    values = {name: gathering.total(name) for name in track(list(TOTALS), len(TOTALS), "gathering totals")} if totals else {}
    for letter, sample in found.items():
        _check_finite(names, sample, f"{INPUTS[letter].meaning} ({letter})")
    for name, value in values.items():
        _check_finite(names, value, TOTALS[name])
    units = {layer.name: u for u, unit in enumerate(subject.space.units) for layer in unit.layers}
    bits = [[bits_of(option) for option in subject.space.options[units[name]]] for name in names]
    return Statistics(
        layers=tuple(names),
        unit_of=np.array([units[name] for name in names]),
        weights=np.array([float(layer.N * layer.K) for layer in gathering.layers]),
        bits=_padded(bits),
        tensors=found,
        totals=values,
    )


def bits_of(option: LayerSpec) -> float:
    """Of a weight; what pruning sets to zero takes none."""
    bits = float(option.scheme.bits) if option.scheme else DENSE_BITS
    return bits * (1 - option.sparsity.fraction) if option.sparsity else bits


class _Gathering:
    """Computes what is asked for, and keeps what several need."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.layers = subject.anatomy.layers
        self.modules = {layer.name: subject.model.get_submodule(layer.name) for layer in self.layers}
        self.rows: dict[str, Int[np.ndarray, "S"]] = {}
        self.columns: dict[str, Int[np.ndarray, "S"]] = {}
        for i, layer in enumerate(self.layers):
            draw = np.random.default_rng([subject.seed, i])
            self.rows[layer.name], self.columns[layer.name] = places(layer.N, draw), places(layer.K, draw)
        units = {layer.name: u for u, unit in enumerate(subject.space.units) for layer in unit.layers}
        self.specs = {
            layer.name: [fitted(layer, option) for option in subject.space.options[units[layer.name]]] for layer in self.layers
        }
        self.kept: dict[str, Mapping[str, Tensor]] = {}
        self.moments: Mapping[str, Moments] = {}

    def sampled(self, letter: str) -> Tensors:
        made: dict[str, Callable[[Layer], Sequence[Sample]]] = {
            "W": partial(self._by_weight, self._weights),
            "G": partial(self._by_weight, self._gradients),
            "V": partial(self._by_weight, self._virtual),
            "H": self._curvature,
            "A": self._inputs,
            "D": self._output_gradients,
            "E": self._weight_errors,
            "O": self._output_errors,
        }
        return stacked([made[letter](layer) for layer in self.layers])

    def total(self, name: str) -> np.ndarray:
        if name in BY_OPTION:
            return _padded([self._total_errors(layer, name) for layer in self.layers])
        made: dict[str, Callable[[], Mapping[str, float]]] = {
            "snip": self._snip,
            "synflow": self._synflow,
            "eigenvalue": self._eigenvalues,
            "trace": lambda: {name: one.sum(dtype=torch.float64).item() for name, one in self._diagonals().items()},
            "spread": lambda: {name: one.spread for name, one in self._moments().items()},
            "channels": lambda: {layer.name: float(layer.N) for layer in self.layers},
            "overlap": lambda: passes.overlaps(self._moments()),
        }
        found = made[name]()
        return np.array([found[layer.name] for layer in self.layers], np.float64)

    def _once(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def _weights(self) -> Mapping[str, Tensor]:
        return {name: matrix(module).detach().float() for name, module in self.modules.items()}

    def _gradients(self) -> Mapping[str, Tensor]:
        s = self.subject
        return self._once(
            "G", lambda: self._matrices(passes.gradients(s.model, self.layers, s.inputs, self._objective(), s.settings.device))
        )

    def _virtual(self) -> Mapping[str, Tensor]:
        s = self.subject
        given = (s.model, self.layers, s.inputs, s.settings.device)
        return self._once("V", lambda: self._matrices(passes.virtual_gradients(*given)))

    def _diagonals(self) -> Mapping[str, Tensor]:
        s, few = self.subject, taken(self.subject.inputs, CURVED_TOKENS)
        given = (s.model, self.layers, few, self._objective(), s.settings.device)
        return self._once("H", lambda: self._matrices(passes.diagonals(*given, seed=s.seed)))

    def _moments(self) -> Mapping[str, Moments]:
        if not self.moments:
            s = self.subject
            self.moments = passes.moments(s.model, self.layers, s.inputs, s.settings.device)
        return self.moments

    def _objective(self) -> derivatives.Objective:
        s = self.subject
        return derivatives.objective(s.model, s.inputs, s.mask_token, seed=s.seed)

    def _matrices(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _as_matrix(one, self.modules[name]).cpu() for name, one in found.items()}

    def _at(self, W: Tensor, name: str) -> Sample:
        """The sampled entries of a layer's matrix."""
        picked = W[torch.from_numpy(self.rows[name])][:, torch.from_numpy(self.columns[name])]
        return np.asarray(picked.float().cpu().numpy())

    def _by_weight(self, of: Callable[[], Mapping[str, Tensor]], layer: Layer) -> Sequence[Sample]:
        whole = of()[layer.name]
        return [scaled(self._at(whole, layer.name), whole.square().mean(dtype=torch.float64).item())]

    def _curvature(self, layer: Layer) -> Sequence[Sample]:
        whole = self._diagonals()[layer.name]
        return [shifted(self._at(whole, layer.name), whole.mean(dtype=torch.float64).item())]

    def _inputs(self, layer: Layer) -> Sequence[Sample]:
        squares = self._moments()[layer.name].input.numpy()
        return [scaled(np.sqrt(squares[self.columns[layer.name]])[None], float(squares.mean()))]

    def _output_gradients(self, layer: Layer) -> Sequence[Sample]:
        s = self.subject
        given = (s.model, self.layers, s.inputs, self._objective(), s.settings.device)
        squares = self._once("D", lambda: first.output_gradients(*given))[layer.name].float().numpy()
        return [scaled(np.sqrt(squares[self.rows[layer.name]])[:, None], float(squares.mean()))]

    def _weight_errors(self, layer: Layer) -> Sequence[Sample]:
        W = matrix(self.modules[layer.name]).detach().float()
        return [self._weight_error(layer, spec, W) for spec in self.specs[layer.name]]

    def _weight_error(self, layer: Layer, spec: LayerSpec, W: Tensor) -> Sample:
        if spec.dense:
            return np.zeros_like(self._at(W, layer.name))
        E = dense(self.subject.library.solved(layer, spec)).float() - W.cpu()
        return scaled(self._at(E, layer.name), E.square().mean(dtype=torch.float64).item())

    def _output_errors(self, layer: Layer) -> Sequence[Sample]:
        return [self._output_error(layer, spec) for spec in self.specs[layer.name]]

    def _output_error(self, layer: Layer, spec: LayerSpec) -> Sample:
        errors = None if spec.dense else self.subject.library.entry(layer.name, spec).row_errors
        squares = np.zeros(layer.N, np.float32) if errors is None else errors.clamp(min=0).numpy()
        return scaled(np.sqrt(squares[self.rows[layer.name]])[:, None], float(squares.mean()))

    def _snip(self) -> Mapping[str, float]:
        return {name: (W * self._gradients()[name]).abs().sum(dtype=torch.float64).item() for name, W in self._weights().items()}

    def _synflow(self) -> Mapping[str, float]:
        s = self.subject
        made = self._matrices(passes.virtual_gradients(s.model, self.layers, s.inputs, s.settings.device, positive=True))
        return {name: (W.double() * made[name]).abs().sum().item() for name, W in self._weights().items()}

    def _eigenvalues(self) -> Mapping[str, float]:
        s, few = self.subject, taken(self.subject.inputs, EIGENVALUE_TOKENS)
        found = hessian.top_eigenvalues(
            s.model,
            self.layers,
            few,
            self._objective(),
            s.settings.device,
            tolerance=EIGENVALUE_TOLERANCE,
            iterations=EIGENVALUE_STEPS,
            seed=s.seed,
        )
        return {name: one.value for name, one in found.items()}

    def _total_errors(self, layer: Layer, name: str) -> list[float]:
        entries = [None if spec.dense else self.subject.library.entry(layer.name, spec) for spec in self.specs[layer.name]]
        return [
            0.0 if one is None else one.weight_error if name == "weight_error" else one.output_error or 0.0 for one in entries
        ]


def _as_matrix(weight: Tensor, module: nn.Module) -> Tensor:
    """What has the shape of a layer's weight, as a matrix [N, K]."""
    return weight.t() if isinstance(module, Conv1D) else weight.flatten(1)


def _padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    most = max(len(row) for row in rows)
    return np.array([[*row, *[row[-1]] * (most - len(row))] for row in rows], np.float64)


def _check_finite(names: Sequence[str], values: np.ndarray, what: str) -> None:
    for name, value in zip(names, values, strict=True):
        if not np.isfinite(value).all():
            raise CompressError(f"{name}: the {what} is NaN or infinite. Check the model's weights and the calibration data.")
