"""Modules that hold a layer packed and multiply through `kernels.dispatch`; no dense copy of the weight is ever kept.

On a GPU layers that read the same input are stacked: one product over all their rows makes the most of a chip that one layer
leaves half empty. The module of each stays where it was and answers with its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.experts import PARTS, SplitExperts
from compress.kernels import dispatch, reference
from compress.kernels.dispatch import Packed
from compress.spec import Scheme

SPARSE_ROWS, SPARSE_INPUTS = 64, 64  # multiples that torch's 2:4 kernels take in 16 bits, whichever library they come from
Restored = tuple[Tensor, Tensor, Tensor, "Tensor | None"]
STACKABLE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # siblings that read the same input


class PackedWeight(nn.Module):
    """A packed weight [N, K] and an optional bias.

    The tensors of `packed` are this module's buffers, so they follow `.to(device)` and are laid out anew for another kind of
    device. Casts such as `.half()` reach the bias only: the scales keep the dtype they are stored in.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, scheme: Scheme, bias: Float[Tensor, "N"] | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        self.dtype = torch.get_default_dtype() if self.bias is None else self.bias.dtype  # of `weight`
        self._hold(packed)

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """The dense weight, decoded anew each time, for modules that read a layer's weight rather than call the layer."""
        return dispatch.dequantize(self.packed).to(self.dtype)

    def _hold(self, packed: Packed) -> None:
        self._buffers.clear()
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.packed = replace(packed, tensors=cast("dict[str, Tensor]", self._buffers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        held = dict(self._buffers)
        self._buffers.clear()  # keeps nn.Module from casting them
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(held)
        device = next(iter(self.packed.tensors.values())).device
        target = fn(torch.empty(0, dtype=torch.int32, device=device)).device  # what fn does to an integer tensor is its move
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if target != device:
            self._hold(dispatch.move(self.packed, target))
        return self

    def restore(self) -> Restored:
        """What was packed: codes, scales, zeros and g_idx."""
        return dispatch.restore(self.packed)

    def extra_repr(self) -> str:
        N, K = self.packed.shape
        return f"{K}, {N}, bias={self.bias is not None}, {self.scheme}, layout={self.packed.layout}"


class QuantLinear(PackedWeight):
    """A linear layer; also takes the place of GPT-2's Conv1D, whose weight is the transpose."""

    def __init__(
        self, packed: Packed, scheme: Scheme, bias: Float[Tensor, "N"] | None = None, dense: nn.Module | None = None
    ) -> None:
        """Take the dtype and the orientation of `weight`, but no tensors, from the layer's `dense` form."""
        super().__init__(packed, scheme, bias)
        self.out_features, self.in_features = packed.shape
        self.transposed = isinstance(dense, Conv1D)
        self.dtype = self.dtype if dense is None else dense.get_parameter("weight").dtype

    @property
    def weight(self) -> Float[Tensor, "_ _"]:
        """The dense weight, decoded anew each time: [N, K], or [K, N] in the place of a Conv1D."""
        return super().weight.t() if self.transposed else super().weight

    def forward(self, x: Float[Tensor, "*M K"]) -> Float[Tensor, "*M N"]:
        return dispatch.linear(x, self.packed, self.bias)


class QuantConv2d(PackedWeight):
    """A convolution whose weight is the packed matrix [out, in / groups * height * width], dequantized in every call."""

    def __init__(self, packed: Packed, scheme: Scheme, dense: nn.Conv2d, bias: Float[Tensor, "N"] | None = None) -> None:
        """Take the geometry, but no tensors, from `dense`."""
        super().__init__(packed, scheme, bias)
        self.in_channels, self.out_channels, self.groups = dense.in_channels, dense.out_channels, dense.groups
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        self._edges = dense._reversed_padding_repeated_twice
        self.dtype = dense.weight.dtype

    @property
    def weight(self) -> Float[Tensor, "N C height width"]:
        """The dense weight, decoded anew each time."""
        return super().weight.view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Float[Tensor, "*B C height width"]) -> Float[Tensor, "*B N out_height out_width"]:
        compute = reference.compute_dtype(x)
        weight = dispatch.dequantize(self.packed).to(compute).view(self.out_channels, -1, *self.kernel_size)
        inputs: Tensor = x.to(compute)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            inputs, padding = functional.pad(inputs, self._edges, mode=self.padding_mode), 0
        bias = None if self.bias is None else self.bias.to(compute)
        return functional.conv2d(inputs, weight, bias, self.stride, padding, self.dilation, self.groups).to(x.dtype)


@dataclass(frozen=True)
class Product:
    """A stack's product with an input, kept until every part has had its rows; `version` tells an input changed in place."""

    x: Tensor
    version: int
    out: Tensor
    parts: frozenset[int]

    def serves(self, x: Tensor, part: int) -> bool:
        return self.x is x and self.version == _version(x) and part in self.parts


class Stack(PackedWeight):
    """Layers with one input as one weight, their rows one after the other; `rows` are where each begins, and the end."""

    def __init__(self, packed: Packed, scheme: Scheme, bias: Float[Tensor, "N"] | None, rows: Sequence[int]) -> None:
        super().__init__(packed, scheme, bias)
        self.rows = tuple(rows)
        self._product: Product | None = None

    def forward(self, x: Float[Tensor, "*M K"], part: int) -> Float[Tensor, "*M n"]:
        """The rows of one layer: computed for all of them when the first asks."""
        held = self._product
        if held is None or not held.serves(x, part):
            everyone = frozenset(range(len(self.rows) - 1))
            held = Product(x, _version(x), dispatch.linear(x, self.packed, self.bias), everyone)
        waiting = held.parts - {part}
        self._product = replace(held, parts=waiting) if waiting else None
        return held.out[..., self.rows[part] : self.rows[part + 1]]


class StackedLinear(nn.Module):
    """A linear layer whose weight lies in a stack; the first of its parts has the stack as a submodule."""

    def __init__(self, stack: Stack, part: int) -> None:
        super().__init__()
        self.part, self.scheme, self._stack = part, stack.scheme, (stack,)
        if part == 0:
            self.stack = stack
        self.in_features = stack.packed.shape[1]
        self.out_features = stack.rows[part + 1] - stack.rows[part]

    @property
    def rows(self) -> slice:
        """The layer's rows of the stack."""
        return slice(*self._stack[0].rows[self.part : self.part + 2])

    @property
    def bias(self) -> Tensor | None:
        bias = self._stack[0].bias
        return None if bias is None else bias[self.rows]

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """The dense weight, decoded anew each time."""
        return self._stack[0].weight[self.rows]

    def restore(self) -> Restored:
        """What was packed of this layer: codes, scales, zeros and g_idx."""
        codes, scales, zeros, g_idx = self._stack[0].restore()
        return codes[self.rows], scales[self.rows], zeros[self.rows], g_idx

    def forward(self, x: Float[Tensor, "*M K"]) -> Float[Tensor, "*M N"]:
        out: Tensor = self._stack[0](x, self.part)
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}, part {self.part} of a stack"
        )


class StackedExperts(nn.Module):
    """All experts of a block as two weights of one launch each: gates with what they multiply, and what comes after.

    Casts leave it as it is; it stays on the kind of device that it was made for.
    """

    def __init__(self, experts: SplitExperts) -> None:
        super().__init__()
        self.act_fn = experts[0].get_submodule("act_fn")
        self.packed: dict[str, Packed] = {}
        self.schemes: dict[str, Scheme] = {}
        for name, parts in PARTS.items():
            found = [[cast("QuantLinear", expert.get_submodule(part)) for part in parts] for expert in experts]
            each = [_joined(layers) for layers in found]
            tensors = {key: torch.stack([one.tensors[key] for one in each]) for key in each[0].tensors}
            self.packed[name] = replace(each[0], tensors=tensors)
            self.schemes[name] = found[0][0].scheme
            for key, tensor in tensors.items():
                self.register_buffer(f"{name}_{key}", tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedExperts:
        probe = fn(torch.empty(0, dtype=torch.int32, device=next(self.buffers()).device))  # what fn does to integers is its move
        if probe.device.type not in ("meta", next(self.buffers()).device.type):
            raise ValueError(f"stacked experts cannot move to {probe.device}; load the model there")
        super()._apply(lambda tensor: tensor.to(probe.device), recurse)  # type: ignore[no-untyped-call]
        for name, packed in self.packed.items():
            tensors = {key: self.get_buffer(f"{name}_{key}") for key in packed.tensors}
            self.packed[name] = replace(packed, tensors=tensors)
        return self

    def parts(self) -> Iterator[tuple[str, Scheme, Restored]]:
        """What was packed: every matrix under its name within the experts."""
        for name, parts in PARTS.items():
            packed, scheme = self.packed[name], self.schemes[name]
            for e in range(len(packed.tensors["scales"])):
                one = replace(packed, tensors={key: tensor[e] for key, tensor in packed.tensors.items()})
                codes, scales, zeros, g_idx = dispatch.restore(one)
                rows = len(codes) // len(parts)
                for i, part in enumerate(parts):
                    cut = slice(i * rows, (i + 1) * rows)
                    yield f"{e}.{part}", scheme, (codes[cut], scales[cut], zeros[cut], g_idx)

    def forward(
        self, hidden: Float[Tensor, "M H"], top_k_index: Int[Tensor, "M k"], top_k_weights: Float[Tensor, "M k"]
    ) -> Float[Tensor, "M H"]:
        expert = top_k_index.flatten()
        gate, up = dispatch.linear_experts(hidden, expert, self.packed["gate_up_proj"]).chunk(2, dim=-1)
        out = dispatch.linear_experts(self.act_fn(gate) * up, expert, self.packed["down_proj"])
        return (out.view(*top_k_index.shape, -1) * top_k_weights[..., None]).sum(1).to(hidden.dtype)


def stack(model: nn.Module) -> None:
    """Stack the packed layers of `model` that read the same input and have the same scheme, and experts, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts) and _stackable(module):
            model.set_submodule(name, StackedExperts(module))
    for parent in list(model.modules()):
        for names in STACKABLE:
            layers = [parent._modules.get(name) for name in names]
            found = [layer for layer in layers if type(layer) is QuantLinear]
            if len(found) == len(names) and _alike(found):
                together = _stacked(found)
                for part, name in enumerate(names):
                    setattr(parent, name, StackedLinear(together, part))


def _alike(layers: Sequence[QuantLinear]) -> bool:
    """Whether one packed weight can hold all of them without loss."""
    first = layers[0]
    about = {
        (
            layer.scheme,
            layer.packed.shape[1],
            layer.packed.G,
            layer.packed.layout,
            layer.bias is None,
            frozenset((name, tensor.device, tensor.dtype) for name, tensor in layer.packed.tensors.items()),
        )
        for layer in layers
    }
    order = first.packed.tensors.get("order")
    same_order = all(order is None or torch.equal(order, layer.packed.tensors["order"]) for layer in layers)
    return len(about) == 1 and same_order and first.packed.layout != "words"


def _stackable(experts: SplitExperts) -> bool:
    """Whether the grouped kernel can serve these experts: planar, without biases, each matrix alike in all of them."""
    for parts in PARTS.values():
        found = [expert.get_submodule(part) for expert in experts for part in parts]
        layers = [layer for layer in found if type(layer) is QuantLinear]
        if len(layers) < len(found) or not _alike(layers):
            return False
        if layers[0].packed.layout != "planar" or layers[0].bias is not None or "order" in layers[0].packed.tensors:
            return False
    return True


def _joined(layers: Sequence[QuantLinear]) -> Packed:
    """One packed weight with the rows of all layers, in the layout that they have."""
    first = layers[0].packed
    codes, scales, zeros, g_idx = zip(*(layer.restore() for layer in layers), strict=True)
    return dispatch.prepare(
        torch.cat(codes),
        torch.cat(scales),
        torch.cat(zeros) if "zeros" in first.tensors else None,
        bits=first.bits,
        g_idx=g_idx[0],
    )


def _stacked(layers: Sequence[QuantLinear]) -> Stack:
    first = layers[0]
    packed = _joined(layers)
    bias = None if first.bias is None else torch.cat([cast("Tensor", layer.bias).data for layer in layers])
    return Stack(packed, first.scheme, bias, [0, *accumulate(layer.out_features for layer in layers)])


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count in inference mode, nor while it compiles."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def use_sparse_kernels(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let torch's 2:4 kernels multiply the named linear layers that are on a CUDA device; the names of those they fit.

    A layer must be in float16 or bfloat16, of a size that the kernels take, and have two zeros in every four inputs of a row;
    any other stays dense. For serving: `save_pretrained` cannot write the result.
    """
    taken = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and _fits_sparse_kernels(module.weight):
            module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
            taken.append(name)
    return taken


def _fits_sparse_kernels(weight: Float[Tensor, "N K"]) -> bool:
    N, K = weight.shape
    if (
        weight.device.type != "cuda"
        or weight.dtype not in (torch.float16, torch.bfloat16)
        or N % SPARSE_ROWS
        or K % SPARSE_INPUTS
    ):
        return False
    return bool(((weight.view(N, -1, 4) == 0).sum(-1) == 2).all())
