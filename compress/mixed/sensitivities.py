"""Tables of what every option of every layer adds to the loss, predicted from derivatives and from the errors of solved layers.

All follow from d^T H d / 2 for a weight error d: the gradient is taken to be zero, as at a minimum (and exactly so for the
divergence from the dense model), and layers to add up. They differ in what they put for H. Where a curvature is negative, by
noise or because the model is at no minimum, its magnitude counts: an error never pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Float64
from torch import Tensor

from compress.mixed.hessian import Eigenvalue, Trace
from compress.models import Layer
from compress.spec import LayerSpec

Table = dict[str, dict[LayerSpec, float]]  # by layer and option: the increase of the mean loss, in nats per prediction
Errors = Mapping[str, Mapping[LayerSpec, float]]  # ||Q - W||^2


def hawq_v1(layers: Sequence[Layer], eigenvalues: Mapping[str, Eigenvalue], weight_errors: Errors) -> Table:
    """lambda / n ||Q - W||^2 / 2 with the top eigenvalue of a layer of n weights (HAWQ, arXiv 1905.03696).

    The paper orders layers by lambda / n. As a loss it is what the top direction alone adds for an error that is spread evenly
    over all directions: exact for a Hessian of rank one, and too small otherwise. An error in the top direction adds n times
    as much.
    """
    return _spread_evenly(layers, {name: one.value for name, one in eigenvalues.items()}, weight_errors)


def hawq_v2(layers: Sequence[Layer], traces: Mapping[str, Trace], weight_errors: Errors) -> Table:
    """Tr(H) / n ||Q - W||^2 / 2: the mean over all directions of the error (HAWQ-v2, arXiv 1911.03852, which omits the half)."""
    return _spread_evenly(layers, {name: one.mean for name, one in traces.items()}, weight_errors)


def fisher(layers: Sequence[Layer], traces: Mapping[str, float], weight_errors: Errors) -> Table:
    """As HAWQ-v2, with the trace of the Fisher, which is never negative, for that of the Hessian."""
    return _spread_evenly(layers, traces, weight_errors)


def output(
    squared_gradients: Mapping[str, Float64[Tensor, "N"]], row_errors: Mapping[str, Mapping[LayerSpec, Float[Tensor, "N"]]]
) -> Table:
    """Half of the rows' expected squared errors per token, times their squared gradients (GuidedQuant, arXiv 2505.07004).

    The Fisher with respect to a layer's outputs, of which only the diagonal counts: errors of different outputs and tokens do not
    interact, and how large they are does not depend on how much the loss depends on them. Unlike the others it knows the
    direction of the error, by the inputs that reach the layer.
    """
    return {
        name: {spec: (weights @ errors.double().cpu()).item() / 2 for spec, errors in row_errors[name].items()}
        for name, weights in squared_gradients.items()
    }


def _spread_evenly(layers: Sequence[Layer], curvatures: Mapping[str, float], weight_errors: Errors) -> Table:
    """The mean of d^T H d / 2 over all directions of d, for the sum of H's eigenvalues."""
    return {
        layer.name: {
            spec: abs(curvatures[layer.name]) / (layer.N * layer.K) * error / 2
            for spec, error in weight_errors[layer.name].items()
        }
        for layer in layers
    }
