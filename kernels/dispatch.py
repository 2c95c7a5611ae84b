"""One entry for every packed layer: which layout a device wants, the way there and back without loss, and the product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from compress.kernels import cpu, reference
from compress.kernels.packing import pack, unpack

Layout = Literal["words", "nibbles", "bytes"]


@dataclass(frozen=True)
class Packed:
    """A quantized weight [N, K] as one layout's tensors; nothing else holds its codes.

    "words" is the bit stream of `packing` with "scales" [N, G], "zeros" [N, G] unless symmetric, and "g_idx" [K] for groups of
    unequal size; `cpu` describes "nibbles" and "bytes". "order" [K], in any layout, sorts the inputs by group.
    """

    layout: Layout
    bits: int
    shape: tuple[int, int]
    G: int
    tensors: Mapping[str, Tensor]


def prepare(
    codes: UInt8[Tensor, "N K"],
    scales: Float[Tensor, "N G"],
    zeros: UInt8[Tensor, "N G"] | None,
    *,
    bits: int,
    g_idx: Int[Tensor, "K"] | None = None,
    device: torch.device | None = None,
) -> Packed:
    """Lay a weight out for `device`; `zeros` is None for the symmetric grid's 2^(bits-1). Inverse of `restore`."""
    (N, K), G = codes.shape, scales.shape[1]
    device = device or codes.device
    index: dict[str, Tensor] = {}
    if g_idx is not None:
        codes, index = _sort_inputs(codes, g_idx, G)
    elif K % G:
        raise ValueError(f"{G} groups do not divide {K} inputs; give g_idx")
    layout: Layout = "words"
    if device.type == "cpu" and "g_idx" not in index:
        if bits == 8 and zeros is None and cpu.bytes_fit(N, K, G):
            layout = "bytes"
        elif cpu.nibbles_fit(K // G):
            layout = "nibbles"

    if layout == "words":
        tensors = {"words": pack(codes, bits), "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    elif layout == "bytes":
        tensors = cpu.to_bytes(codes.cpu(), scales.cpu())
    else:
        tensors = cpu.to_nibbles(codes.cpu(), scales.cpu(), None if zeros is None else zeros.cpu(), bits)
    return Packed(layout, bits, (N, K), G, {name: tensor.to(device) for name, tensor in (tensors | index).items()})


def restore(
    packed: Packed,
) -> tuple[UInt8[Tensor, "N K"], Float[Tensor, "N G"], UInt8[Tensor, "N G"], Int[Tensor, "K"] | None]:
    """Codes, scales, zeros and g_idx, exactly as given to `prepare`; a symmetric grid's zeros are filled in."""
    (N, K), bits, tensors = packed.shape, packed.bits, packed.tensors
    if packed.layout == "words":
        codes, scales = unpack(tensors["words"], bits, K), tensors["scales"]
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
        tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
        return Packed(packed.layout, packed.bits, packed.shape, packed.G, tensors)
    codes, scales, zeros, g_idx = restore(packed)
    return prepare(codes, scales, zeros if "zeros" in packed.tensors else None, bits=packed.bits, g_idx=g_idx, device=device)


def dequantize(packed: Packed) -> Float[Tensor, "N K"]:
    """Q in float32, whole."""
    return reference.dequantize(*restore(packed))


def linear(x: Float[Tensor, "*M K"], packed: Packed, bias: Float[Tensor, "N"] | None = None) -> Float[Tensor, "*M N"]:
    """`x Q^T + bias`.

    On a CPU the kernels, which compute in bfloat16, take few rows of 16-bit activations. Everything else is multiplied by
    dequantized tiles, in float32 unless the activations are bfloat16: who keeps a model in float32 on a CPU wants its accuracy.
    """
    N, K = packed.shape
    tensors, bits = packed.tensors, packed.bits
    rows = x.reshape(-1, K)
    if "order" in tensors:
        rows = rows[:, tensors["order"]]
    few = x.dtype in (torch.bfloat16, torch.float16) and len(rows) <= cpu.FEW_ROWS.get(packed.layout, 0)

    if packed.layout == "words":
        out = reference.linear_words(rows, tensors["words"], tensors["scales"], _zeros(packed), bits, tensors.get("g_idx"))
    elif packed.layout == "nibbles" and few:
        out = cpu.linear_nibbles(rows, tensors, N)
    elif packed.layout == "nibbles":
        out = cpu.tiled_nibbles(rows, tensors, N, packed.G, bits)
    elif few:
        out = cpu.linear_bytes(rows, tensors)
    else:
        out = cpu.tiled_bytes(rows, tensors)
    out = out.view(*x.shape[:-1], N)
    return out if bias is None else out + bias.to(out.dtype)


def _sort_inputs(codes: UInt8[Tensor, "N K"], g_idx: Int[Tensor, "K"], G: int) -> tuple[UInt8[Tensor, "N K"], dict[str, Tensor]]:
    """Codes with their inputs sorted by group and the order that does it, or unchanged with g_idx where groups differ in size."""
    K = codes.shape[1]
    order = torch.argsort(g_idx, stable=True)
    if K % G or not torch.equal(g_idx[order].long(), torch.arange(K, device=order.device) // (K // G)):
        return codes, {"g_idx": g_idx}
    return codes[:, order], {"order": order.to(torch.int32)}


def _zeros(packed: Packed) -> UInt8[Tensor, "N G"]:
    zeros = packed.tensors.get("zeros")
    if zeros is not None:
        return zeros
    device = packed.tensors["words"].device if packed.layout == "words" else None
    return torch.full((packed.shape[0], packed.G), 2 ** (packed.bits - 1), dtype=torch.uint8, device=device)
