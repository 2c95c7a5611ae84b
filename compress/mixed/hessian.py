"""Second derivatives of a model's loss, layer by layer: the top eigenvalue (HAWQ) and the trace (HAWQ-v2) of the Hessian.

Products of the Hessian with vectors are gradients of gradients, which holds the model in float32 (the model itself where it is in
that), as much again for the gradients, the vectors and the products each, and the graph of one batch and of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.fisher.losses import Draw
from compress.mixed.derivatives import WITHOUT_SECOND, Objective, check_reached, differentiable, evaluate, placed
from compress.models import Layer
from compress.sequential import batches_of

TOKENS_AT_A_TIME = 1024  # of one graph
PROBES = 32
TOLERANCE = 1e-3  # of HAWQ's own code
ITERATIONS = 100

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """The eigenvalue of largest magnitude, with its sign; and by what fraction the last step of the iteration changed it."""

    value: float
    change: float


@dataclass(frozen=True)
class Trace:
    """An estimated trace: the mean over probes, and the standard error of that."""

    mean: float
    standard_error: float


def top_eigenvalues(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
    objective: Objective,
    device: torch.device,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> dict[str, Eigenvalue]:
    """The top eigenvalue of every layer's block of the Hessian of the mean loss (HAWQ, arXiv 1905.03696), by power iteration.

    A product with the vectors of all layers at once would mix the blocks, so each takes a backward pass of its own; all layers
    advance together, so that they share the forward pass and the first backward pass of every batch, and a layer's own reaches
    no deeper than the layer. A step thus costs about (2 + layers) passes over the data until layers are done: when their
    eigenvalue changes by less than `tolerance` of itself, or all after `iterations` steps, which `change` then shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with differentiable(model, layers, device) as (work, weights):
        vectors = {name: _unit(torch.randn(weight.shape, generator=generator).to(weight)) for name, weight in weights.items()}
        found = dict.fromkeys(weights, Eigenvalue(0.0, math.inf))
        for _ in range(iterations):
            left = {name: vectors[name] for name, one in found.items() if one.change >= tolerance}
            if not left:
                break
            for name, product in own_products(work, weights, left, inputs, objective).items():
                value = (vectors[name] * product).sum(dtype=torch.float64).item()
                change = abs(value - found[name].value) / abs(value) if value else 0.0
                found[name], vectors[name] = Eigenvalue(value, change), _unit(product)
        check_reached({name: one.value for name, one in found.items()}, work, "second derivative", WITHOUT_SECOND)
        return found


def traces(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
    objective: Objective,
    device: torch.device,
    *,
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, Trace]:
    """The trace of every layer's block of the Hessian of the mean loss (HAWQ-v2, arXiv 1911.03852), by Hutchinson's estimator.

    Every probe is one product with random signs z for all layers at once: z_i^T (H z)_i has the trace of block i as its mean,
    and the other blocks add only noise. The number of probes is fixed, where the authors' code stops once the running mean
    settles, which it also does by chance. Signs are new for every batch too: at no cost, their errors then average out.
    All probes share the forward pass and the first backward pass; raises for less than two, which have no standard error.
    """
    if probes < 2:
        raise CompressError(f"{probes} probes have no standard error; use at least 2.")
    generator, draw = torch.Generator().manual_seed(seed), objective.draw()
    with differentiable(model, layers, device) as (work, weights):
        sums = torch.zeros(probes, len(weights), dtype=torch.float64)
        total = 0
        for batch in batches_of(inputs, TOKENS_AT_A_TIME):
            values, count = _batch_traces(work, weights, placed(batch, work), objective, draw, probes, generator)
            sums += count * values
            total += count
        found = sums / total
        check_reached(dict(zip(weights, found.abs().sum(0).tolist(), strict=True)), work, "second derivative", WITHOUT_SECOND)
        means, errors = found.mean(0).tolist(), (found.std(0) / math.sqrt(probes)).tolist()
        return {name: Trace(mean, error) for name, mean, error in zip(weights, means, errors, strict=True)}


def own_products(
    work: PreTrainedModel, weights: Vectors, vectors: Vectors, inputs: Mapping[str, Tensor], objective: Objective
) -> dict[str, Tensor]:
    """H_ii v_i for the layers i that have a vector: their own blocks of the mean loss's Hessian, times it."""
    found = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    own, draw, total = {name: weights[name] for name in vectors}, objective.draw(), 0
    for batch in batches_of(inputs, TOKENS_AT_A_TIME):
        total += _add_own_products_(found, work, own, vectors, placed(batch, work), objective, draw)
    return {name: product / total for name, product in found.items()}


def _add_own_products_(
    found: Vectors,
    work: PreTrainedModel,
    weights: Vectors,
    vectors: Vectors,
    batch: Mapping[str, Tensor],
    objective: Objective,
    draw: Draw,
) -> int:
    """Add a batch's products times its number of predictions, which is returned; its graph ends with the function."""
    gradients, count = _gradients(work, weights, batch, objective, draw)
    for name, product in found.items():
        own = {name: weights[name]}
        product.add_(_product(gradients, own, {name: vectors[name]}, work)[name], alpha=count)
    return count


def _batch_traces(
    work: PreTrainedModel,
    weights: Vectors,
    batch: Mapping[str, Tensor],
    objective: Objective,
    draw: Draw,
    probes: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "probes layers"], int]:
    """z_i^T (H z)_i of a batch for every probe and layer, and the batch's number of predictions."""
    found, count = probed(work, weights, batch, objective, draw, probes, generator)
    values = [torch.stack([one[name].sum(dtype=torch.float64) for name in weights]).cpu() for one in found]
    return torch.stack(values), count


def probed(
    work: PreTrainedModel,
    weights: Vectors,
    batch: Mapping[str, Tensor],
    objective: Objective,
    draw: Draw,
    probes: int,
    generator: torch.Generator,
) -> tuple[Iterator[dict[str, Tensor]], int]:
    """z * (H z) of a batch's mean loss for every probe's random signs z, one after the other, and its number of predictions.

    The mean over probes has the diagonal of every layer's block. The graph is kept until the last probe was taken; raises for a
    loss that cannot be differentiated twice.
    """
    gradients, count = _gradients(work, weights, batch, objective, draw)

    def probe() -> dict[str, Tensor]:
        signs = {name: _signs(weight, generator) for name, weight in weights.items()}
        products = _product(gradients, weights, signs, work)
        return {name: signs[name] * products[name] for name in weights}

    return (probe() for _ in range(probes)), count


def _gradients(
    work: PreTrainedModel, weights: Vectors, batch: Mapping[str, Tensor], objective: Objective, draw: Draw
) -> tuple[dict[str, Tensor], int]:
    """The gradients of a batch's mean loss, which can be differentiated again, and the number of predictions.

    Attention runs as plain matrix products: the fused kernels have no second derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        value, count = evaluate(work, objective.curved, batch, draw, objective.predictions)
        found = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    if any(_fails(node) for node in _nodes(found)):  # it leads to no weight, so that differentiating would leave it out unseen
        raise _not_twice(work, "its gradient comes from a function that can be differentiated once only")
    return dict(zip(weights, found, strict=True)), count


def _nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """All that the tensors were computed by."""
    stack = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [before for before, _ in node.next_functions]


def _fails(node: Node) -> bool:
    """Whether it stands for a derivative that raises: of a function marked with once_differentiable."""
    return node.name() == "torch::autograd::Error"


def _product(gradients: Vectors, weights: Vectors, vectors: Vectors, work: PreTrainedModel) -> dict[str, Tensor]:
    """What the sum over `vectors` of gradient times vector has as its gradient: the Hessian's product with them."""
    pairs = [(gradients[name], vector) for name, vector in vectors.items() if gradients[name].requires_grad]
    if not pairs:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        with torch.enable_grad():
            along = torch.stack([(gradient * vector).sum() for gradient, vector in pairs]).sum()
        found = torch.autograd.grad(along, list(weights.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no class of its own for a derivative that is missing
        raise _not_twice(work, str(error)) from error
    return dict(zip(weights, found, strict=True))


def _not_twice(work: PreTrainedModel, why: str) -> CompressError:
    name = type(work).__name__
    return CompressError(
        f"The loss of {name} cannot be differentiated twice, which hawq-v1 and hawq-v2 need: {why}. {WITHOUT_SECOND}"
    )


def _signs(weight: Float[Tensor, "..."], generator: torch.Generator) -> Float[Tensor, "..."]:
    return (torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(weight)


def _unit(vector: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    norm = vector.norm()
    return vector / norm if norm > 0 else vector
