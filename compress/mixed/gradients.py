"""First derivatives of a model's loss, layer by layer: the trace of the Fisher, and squared gradients of a layer's outputs.

Layers are hooked, in one forward and one backward pass over the data: memory is the model in float32 (the model itself where it
is in that), the graph of one batch from the first of the layers on, and for traces their inputs in it. No gradient of a weight
is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from compress.calib.capture import hooks
from compress.calib.stats import rows_of
from compress.fisher.losses import Draw
from compress.linalg import matmul_nt
from compress.mixed.derivatives import Objective, check_reached, differentiable, evaluate, placed
from compress.models import Layer
from compress.progress import Track, silent
from compress.sequential import batches_of

BACKWARD = 3  # times a graph's largest tensor: with them 0.99 to 1.28 of the peak measured (Llama, GPT-2, Mixtral, CPU, 2026-11)


@dataclass(frozen=True)
class Use:
    """One call of a layer: what went in, where that is asked for, and the gradient of what came out."""

    input: Float[Tensor, "B ..."] | None
    gradient: Float[Tensor, "B ..."]


Measure = Callable[[Sequence[Use], nn.Module, int], Tensor]  # of all calls of a layer on so many samples


def fisher_traces(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> dict[str, float]:
    """The trace of every layer's block of the Fisher, the mean of ||g||^2 over predictions: an estimate of the Hessian's.

    The empirical Fisher for given labels, the true one for the sampled labels of kl. Gradients are taken of whole samples:
    those of a sample's predictions add up, and as they are uncorrelated at labels that follow the model, the squared norm of
    their sum has the sum of their squared norms as its mean. Exact for every sample without a backward pass for each, from
    the inputs X and output gradients D of a layer: ||D^T X||^2, as <D D^T, X X^T> where that is cheaper (arXiv 1510.01799;
    for more than one token arXiv 2110.05679). Where samples cannot be told apart in a layer's input they run one by one.
    """
    sums = {layer.name: torch.zeros((), dtype=torch.float64, device=device) for layer in layers}
    found = _means(model, layers, inputs, objective, device, sums, _squared_norms, by_sample=True)
    return {name: one.item() for name, one in found.items()}


def output_gradients(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> dict[str, Float64[Tensor, "N"]]:
    """For every output of a layer the squared gradients of the summed loss, summed over its tokens, per prediction.

    GuidedQuant (arXiv 2505.07004) weighs the squared error of every token by these. Here they are summed, to weigh the mean
    squared error of a row; for text that is about their mean, but an image has many positions and one prediction.
    """
    sums = {layer.name: torch.zeros(layer.N, dtype=torch.float64, device=device) for layer in layers}
    return {name: one.cpu() for name, one in _means(model, layers, inputs, objective, device, sums, _squares).items()}


def output_moments(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
    objective: Objective,
    device: torch.device,
    track: Track = silent,
    doing: str = "weighing outputs by the loss",
) -> dict[str, Float[Tensor, "N N"]]:
    """The second moments of the gradients in every layer's outputs, over all tokens, on the CPU.

    Each is divided by its mean diagonal, and one where the loss does not reach the layer. `doing` is what a progress bar says.
    """
    sums = {layer.name: torch.zeros(layer.N, layer.N, device=device) for layer in layers}
    found = _means(model, layers, inputs, objective, device, sums, _grams, track=track, doing=doing)
    return {name: _relative(moment).cpu() for name, moment in found.items()}


def _relative(moment: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    mean = moment.diagonal().mean()
    return moment.div_(mean) if mean > 0 else torch.eye(len(moment))


def graph_bytes(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> int:
    """What the graph of the first batch takes beside the weights, with its gradients; no more than a forward pass takes now.

    Everything that is saved for the backward pass is counted and let go. On top come three tensors as large as the largest
    of these, usually the logits: their gradient, what it is made of, and what labels are drawn from.
    """
    held: dict[StorageWeakRef, int] = {}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        held[StorageWeakRef(storage)] = storage.nbytes()

    def lost(_: None) -> Tensor:
        raise AssertionError("a graph that was only counted cannot be run backward")

    with differentiable(model, (), device) as (work, _):
        weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*work.parameters(), *work.buffers())}
        batch = batches_of(inputs)[0]
        watched = [_Watched(work.get_submodule(layer.name), 1, torch.empty(()), _grams) for layer in layers]
        with saved_tensors_hooks(count, lost):
            _forward(work, watched, placed(batch, work), objective, objective.draw())
        beside = [nbytes for storage, nbytes in held.items() if storage not in weights]
    return sum(beside) + BACKWARD * max(beside, default=0)


def _means(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
    objective: Objective,
    device: torch.device,
    sums: Mapping[str, Float[Tensor, "..."]],
    measure: Measure,
    by_sample: bool = False,
    track: Track = silent,
    doing: str = "",
) -> Mapping[str, Float[Tensor, "..."]]:
    """What `measure` makes of the gradients of every batch's summed loss, added to `sums`; by the number of predictions.

    `by_sample` is for what needs the layers' inputs, in which samples must not be mixed.
    """
    total, draw = 0, objective.draw()
    with differentiable(model, (), device) as (work, _):
        batches = batches_of(inputs)
        if by_sample and not _apart(work, layers, placed(batches[0], work), objective):
            batches = batches_of(inputs, at_a_time=1)
        for batch in track(batches, len(batches), doing):
            samples = len(next(iter(batch.values())))
            watched = [
                _Watched(work.get_submodule(layer.name), samples, sums[layer.name], measure, by_sample) for layer in layers
            ]
            total += _backward(work, watched, placed(batch, work), objective, draw)
        for value in sums.values():
            value.div_(total)
        check_reached({name: value.sum().item() for name, value in sums.items()}, work, "gradient", objective.instead)
        return sums


@dataclass
class _Watched:
    """A layer during a batch: its calls, and their measurement once all their gradients have arrived, which frees them.

    `total` is what measurements are added to, `scale` times; with `inputs` the layer's inputs are kept for them.
    """

    module: nn.Module
    samples: int
    total: Tensor
    measure: Measure
    inputs: bool = False
    scale: int = 1
    calls: int = 0
    uses: list[Use] = field(default_factory=list)

    def forward(self, source: Float[Tensor, ""], _module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook; an output that needs no gradient is made to depend on `source`."""
        self.calls += 1
        output = output if output.requires_grad else output + source
        output.register_hook(partial(self.backward, args[0].detach() if self.inputs else None))
        return output

    def backward(self, x: Tensor | None, gradient: Tensor) -> None:
        self.uses.append(Use(x, gradient))
        if len(self.uses) == self.calls:
            self.finish()

    def finish(self) -> None:
        """Measure what has arrived: calls that the loss does not depend on have no gradient."""
        if self.uses:
            self.total.add_(self.measure(self.uses, self.module, self.samples), alpha=self.scale)
            self.uses = []


def _backward(
    work: PreTrainedModel, watched: Sequence[_Watched], batch: Mapping[str, Tensor], objective: Objective, draw: Draw
) -> int:
    """Forward and backward with layers watched, from the loss to the first of them; the number of predictions."""
    value, source, count = _forward(work, watched, batch, objective, draw)
    for one in watched:
        one.scale = count**2  # a batch's mean loss is the sum of losses by count
    torch.autograd.grad(value, source)
    for one in watched:
        one.finish()
    return count


def _forward(
    work: PreTrainedModel, watched: Sequence[_Watched], batch: Mapping[str, Tensor], objective: Objective, draw: Draw
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], int]:
    """The loss of a batch with its graph, what that begins with at the first of the layers, and the number of predictions."""
    source = torch.zeros((), dtype=work.dtype, device=work.device, requires_grad=True)
    with hooks([one.module.register_forward_hook(partial(one.forward, source)) for one in watched]):
        value, count = evaluate(work, objective.loss, batch, draw, objective.predictions, objective.instead)
    return value, source, count


def _apart(work: PreTrainedModel, layers: Sequence[Layer], batch: Mapping[str, Tensor], objective: Objective) -> bool:
    """Whether every layer's input has one row of its first dimension for each sample."""
    samples, lengths = len(next(iter(batch.values()))), set()

    def note(_module: nn.Module, args: tuple[Tensor]) -> None:
        lengths.add(len(args[0]))

    modules = [work.get_submodule(layer.name) for layer in layers]
    with hooks([module.register_forward_pre_hook(note) for module in modules]), torch.no_grad():
        objective.loss(work, batch, objective.draw())
    return lengths <= {samples}


def _squared_norms(uses: Sequence[Use], module: nn.Module, samples: int) -> Float64[Tensor, ""]:
    """The squared norms of all samples' gradients of a layer's weight, added up."""
    total = torch.zeros((), dtype=torch.float64, device=uses[0].gradient.device)
    inputs = [use.input.tensor_split(samples) for use in uses if use.input is not None]
    gradients = [use.gradient.tensor_split(samples) for use in uses]
    for i in range(samples):
        X = torch.cat([rows_of(parts[i], module) for parts in inputs])
        D = torch.cat([_gradient_rows(parts[i], module) for parts in gradients])
        total += _squared_norm(X, D).double()
    return total


def _squared_norm(X: Float[Tensor, "T K"], D: Float[Tensor, "T N"]) -> Float[Tensor, ""]:
    """||D^T X||^2 the cheaper way."""
    T, K, N = *X.shape, D.shape[1]
    if T * (N + K) < N * K:
        return ((D @ D.t()) * (X @ X.t())).sum()
    return (D.t() @ X).square().sum()


def _squares(uses: Sequence[Use], module: nn.Module, _samples: int) -> Float64[Tensor, "N"]:
    return torch.stack([_gradient_rows(use.gradient, module).square().sum(0, dtype=torch.float64) for use in uses]).sum(0)


def _grams(uses: Sequence[Use], module: nn.Module, _samples: int) -> Float[Tensor, "N N"]:
    rows = torch.cat([_gradient_rows(use.gradient, module) for use in uses]).t().float()
    return matmul_nt(rows, rows) if rows.numel() else rows.new_zeros(len(rows), len(rows))  # oneDNN takes no empty product


def _gradient_rows(gradient: Float[Tensor, "..."], module: nn.Module) -> Float[Tensor, "T N"]:
    """The gradient of a layer's output, as rows of as many outputs."""
    return gradient.movedim(1, -1).flatten(0, -2) if isinstance(module, nn.Conv2d) else gradient.flatten(0, -2)
