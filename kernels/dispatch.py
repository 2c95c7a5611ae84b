"""One entry for every packed layer: which layout a device wants, the way there and back without loss, and the product."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from compress.kernels import cpu, launch, ops, planar, reference
from compress.kernels.minifloat import Form
from compress.kernels.packing import pack, unpack

Layout = Literal["words", "nibbles", "bytes", "planar"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
FUSED_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """A quantized weight [N, K] as one layout's tensors; nothing else holds its codes.

    "words" is the bit stream of `packing` with "scales" [N, G], "zeros" [N, G] unless symmetric, and "g_idx" [K] for groups of
    unequal size; `cpu` describes "nibbles" and "bytes", `planar` its own. "order" [K], in any layout, sorts the inputs by group.
    Codes of a `form` other than "int" have no kernel: they are "words" everywhere, their scales divided by `global_scale`.
    """

    layout: Layout
    bits: int
    shape: tuple[int, int]
    G: int
    tensors: Mapping[str, Tensor]
    form: Form = "int"
    global_scale: float = 1.0


def prepare(
    codes: UInt8[Tensor, "N K"],
    scales: Shaped[Tensor, "N G"],
    zeros: UInt8[Tensor, "N G"] | None,
    *,
    bits: int,
    g_idx: Int[Tensor, "K"] | None = None,
    device: torch.device | None = None,
    form: Form = "int",
    global_scale: float = 1.0,
) -> Packed:
    """Lay a weight out for `device`; `zeros` is None for a symmetric grid's own code of zero. Inverse of `restore`."""
    (N, K), G = codes.shape, scales.shape[1]
    device = device or codes.device
    index: dict[str, Tensor] = {}
    if g_idx is not None:
        codes, index = _sort_inputs(codes, g_idx, G)
    elif K % G:
        raise ValueError(f"{G} groups do not divide {K} inputs; give g_idx")
    served = form == "int" and "g_idx" not in index
    layout: Layout = layout_for(device, N, K, G, bits, zeros is None) if served else "words"

    if layout == "words":
        tensors = {"words": pack(codes, bits), "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    elif layout == "planar":
        moved = (codes.to(device), scales.to(device), None if zeros is None else zeros.to(device))
        tensors = planar.to_planar(*moved, bits)
    elif layout == "bytes":
        tensors = cpu.to_bytes(codes.cpu(), scales.cpu())
    else:
        tensors = cpu.to_nibbles(codes.cpu(), scales.cpu(), None if zeros is None else zeros.cpu(), bits)
    there = {name: tensor.to(device) for name, tensor in (tensors | index).items()}
    return Packed(layout, bits, (N, K), G, there, form, global_scale)


def layout_for(device: torch.device, N: int, K: int, G: int, bits: int, symmetric: bool) -> Layout:
    """The layout that serves groups of equal size on a device: the first that fits."""
    if device.type == "cuda" and HAS_TRITON and planar.fits(K, G):
        return "planar"
    if device.type == "cpu" and bits == 8 and symmetric and cpu.bytes_fit(N, K, G):
        return "bytes"
    if device.type == "cpu" and cpu.nibbles_fit(K // G):
        return "nibbles"
    return "words"


def restore(
    packed: Packed,
) -> tuple[UInt8[Tensor, "N K"], Shaped[Tensor, "N G"], UInt8[Tensor, "N G"], Int[Tensor, "K"] | None]:
    """Codes, scales, zeros and g_idx, exactly as given to `prepare`; a symmetric grid's zeros are filled in."""
    (N, K), bits, tensors = packed.shape, packed.bits, packed.tensors
    if packed.layout == "words":
        codes, scales = unpack(tensors["words"], bits, K), tensors["scales"]
    elif packed.layout == "planar":
        codes, scales = planar.from_planar(tensors, N, K, packed.G, bits)
    elif packed.layout == "bytes":
        codes, scales = cpu.from_bytes(tensors)
    else:
        codes, scales = cpu.from_nibbles(tensors, N, packed.G, bits)
    if "order" in tensors:
        order = tensors["order"]
        codes, g_idx = codes[:, torch.argsort(order)], torch.argsort(order) // (K // packed.G)
        return codes, scales, _zeros(packed), g_idx.to(torch.int32)
    return codes, scales, _zeros(packed), tensors.get("g_idx")


def move(packed: Packed, device: torch.device) -> Packed:
    """The same weight laid out for another device."""
    if device.type in ("meta", packed.tensors["scales" if "scales" in packed.tensors else "kernel_scales"].device.type):
        return replace(packed, tensors={name: tensor.to(device) for name, tensor in packed.tensors.items()})
    codes, scales, zeros, g_idx = restore(packed)
    given = zeros if "zeros" in packed.tensors else None
    return prepare(
        codes,
        scales,
        given,
        bits=packed.bits,
        g_idx=g_idx,
        device=device,
        form=packed.form,
        global_scale=packed.global_scale,
    )


def dequantize(packed: Packed) -> Float[Tensor, "N K"]:
    """Q in float32, whole."""
    return reference.dequantize(*restore(packed), packed.form, packed.global_scale)


def linear(x: Float[Tensor, "*M K"], packed: Packed, bias: Float[Tensor, "N"] | None = None) -> Float[Tensor, "*M N"]:
    """`x Q^T + bias`.

    On a GPU few rows of 16-bit activations are multiplied by weights that are decoded on the way, and more by dequantized ones.
    On a CPU the kernels, which compute in bfloat16, take few rows of 16-bit activations. Everything else is multiplied by
    dequantized tiles, in float32 unless the activations are bfloat16: who keeps a model in float32 on a CPU wants its accuracy.
    The product has a gradient in `x` and in `bias`, for adapters that are trained around packed weights.
    """
    rows = x.reshape(-1, packed.shape[1])
    if torch.is_grad_enabled() and (rows.requires_grad or (bias is not None and bias.requires_grad)):
        product: Tensor = _Differentiable.apply(rows, packed)  # type: ignore[no-untyped-call]
        out = product if bias is None else product + bias.to(product.dtype)
    else:
        out = _product(rows, packed, bias)
    return out.view(*x.shape[:-1], packed.shape[0])


def _product(x: Float[Tensor, "M K"], packed: Packed, bias: Float[Tensor, "N"] | None = None) -> Float[Tensor, "M N"]:
    """`linear` for a matrix of activations, without gradients."""
    tensors, bits, N = packed.tensors, packed.bits, packed.shape[0]
    if "order" in tensors:
        x = x[:, tensors["order"]]
    few = x.dtype in FUSED_DTYPES and len(x) <= _few_rows(packed.layout, x.device)
    if packed.layout == "planar":
        product = ops.planar_fused if few else ops.planar_expanded
        whole: Tensor = product(
            x, tensors["low"], tensors.get("high"), tensors["scales"], tensors.get("zeros"), bias, N, packed.G, bits
        )
        return whole
    if packed.layout == "words":
        scales, zeros = tensors["scales"], _zeros(packed)
        kind = (bits, tensors.get("g_idx"), packed.form, packed.global_scale)
        out = reference.linear_words(x, tensors["words"], scales, zeros, *kind)
    else:
        out = cpu_kernel(x, packed) if few else cpu_tiles(x, packed)
    return out if bias is None else out + bias.to(out.dtype)


class _Differentiable(torch.autograd.Function):
    """`x Q^T` with a gradient in x: the kernels have none, and their tiles would keep all of Q for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "M K"], packed: Packed) -> Float[Tensor, "M N"]:
        ctx.packed = packed
        return _product(x, packed)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "M N"]) -> tuple[Float[Tensor, "M K"], None]:
        return times_weight(gradient, ctx.packed), None


def times_weight(y: Float[Tensor, "M N"], packed: Packed) -> Float[Tensor, "M K"]:
    """`y Q` with exact weights, dequantized a tile of rows at a time.

    Sums are in float32, or in float64 where y is, and rounded once to y's dtype.
    """
    N, K = packed.shape
    compute = torch.promote_types(y.dtype, torch.float32)
    codes, scales, zeros, g_idx = restore(packed)
    out = torch.zeros(len(y), K, dtype=compute, device=y.device)
    rows = max(1, (reference.SCRATCH_GPU if y.is_cuda else reference.SCRATCH_CPU) // K)
    for tile in (slice(start, start + rows) for start in range(0, N, rows)):
        Q = reference.dequantize(codes[tile], scales[tile], zeros[tile], g_idx, packed.form, packed.global_scale)
        out.addmm_(y[:, tile].to(compute), Q.to(compute))
    return out.to(y.dtype)


def linear_experts(x: Float[Tensor, "M K"], expert: Int[Tensor, "R"], packed: Packed) -> Float[Tensor, "R N"]:
    """`x Q^T` row by row, each by the weight of the expert that `expert` names.

    Every row of x is multiplied R / M times in succession. `packed` is planar, with the tensors of all experts stacked. The
    product has a gradient in `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _DifferentiableExperts.apply(x, expert, packed)  # type: ignore[no-untyped-call]
        return product
    return _product_of_experts(x, expert, packed)


def _product_of_experts(x: Float[Tensor, "M K"], expert: Int[Tensor, "R"], packed: Packed) -> Float[Tensor, "R N"]:
    t = packed.tensors
    out: Tensor = ops.planar_experts(
        x, expert, t["low"], t.get("high"), t["scales"], t.get("zeros"), packed.shape[0], packed.G, packed.bits
    )
    return out


class _DifferentiableExperts(torch.autograd.Function):
    """`linear_experts` with a gradient in x."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "M K"], expert: Int[Tensor, "R"], packed: Packed) -> Float[Tensor, "R N"]:
        ctx.save_for_backward(expert)
        ctx.packed, ctx.M = packed, len(x)
        return _product_of_experts(x, expert, packed)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "R N"]) -> tuple[Float[Tensor, "M K"], None, None]:
        (expert,) = ctx.saved_tensors
        K = ctx.packed.shape[1]
        out = gradient.new_zeros(len(expert), K)
        for e in expert.unique().tolist():
            one = replace(ctx.packed, tensors={name: tensor[e] for name, tensor in ctx.packed.tensors.items()})
            rows = (expert == e).nonzero().flatten()
            out[rows] = times_weight(gradient[rows], one)
        return out.view(ctx.M, -1, K).sum(1), None, None


def cpu_kernel(x: Float[Tensor, "M K"], packed: Packed) -> Float[Tensor, "M N"]:
    """`x Q^T` by torch's kernel for a CPU's layout."""
    if packed.layout == "bytes":
        return cpu.linear_bytes(x, packed.tensors)
    return cpu.linear_nibbles(x, packed.tensors, packed.shape[0])


def cpu_tiles(x: Float[Tensor, "M K"], packed: Packed) -> Float[Tensor, "M N"]:
    """`x Q^T` by dequantized tiles of a CPU's layout."""
    if packed.layout == "bytes":
        return cpu.tiled_bytes(x, packed.tensors)
    return cpu.tiled_nibbles(x, packed.tensors, packed.shape[0], packed.G, packed.bits)


def _few_rows(layout: Layout, device: torch.device) -> int:
    """The most rows that a layout's kernel serves faster than dequantized weights are multiplied."""
    most: int = 0
    if layout == "planar":
        most = launch.fused_rows(device)
    elif layout in cpu.FEW_ROWS:
        most = launch.few_rows(layout, device)
    return most


def _sort_inputs(codes: UInt8[Tensor, "N K"], g_idx: Int[Tensor, "K"], G: int) -> tuple[UInt8[Tensor, "N K"], dict[str, Tensor]]:
    """Codes with their inputs sorted by group and the order that does it, or unchanged with g_idx where groups differ in size."""
    K = codes.shape[1]
    order = torch.argsort(g_idx, stable=True)
    if K % G or not torch.equal(g_idx[order].long(), torch.arange(K, device=order.device) // (K // G)):
        return codes, {"g_idx": g_idx}
    return codes[:, order], {"order": order.to(torch.int32)}


def _zeros(packed: Packed) -> UInt8[Tensor, "N G"]:
    N, zeros = packed.shape[0], packed.tensors.get("zeros")
    if zeros is not None:
        return zeros[: packed.G, :N].t().contiguous() if packed.layout == "planar" else zeros
    device = next(iter(packed.tensors.values())).device
    zero = 2 ** (packed.bits - 1) if packed.form == "int" else 0
    return torch.full((N, packed.G), zero, dtype=torch.uint8, device=device)
