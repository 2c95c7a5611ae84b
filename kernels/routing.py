"""Which rows of a grouped product go to which expert, as tiles of rows that share one."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int32
from torch import Tensor

FEW = 512  # rows that one program sorts by counting, in one launch; more take the launches of a sort


def route(experts: Int[Tensor, "R"], E: int, BM: int) -> tuple[Int32[Tensor, "R"], Int32[Tensor, "tiles three"]]:
    """Rows sorted by expert, and for tiles of at most `BM` rows of one expert: which, and where its rows begin and end.

    There are as many tiles as any routing can need, the last ones empty, so that the host need not wait for a number.
    """
    return (counted if len(experts) <= FEW else sorted_)(experts, E, BM)


def sorted_(experts: Int[Tensor, "R"], E: int, BM: int) -> tuple[Int32[Tensor, "R"], Int32[Tensor, "tiles three"]]:
    """`route` by sorting, for any number of rows."""
    R, device = len(experts), experts.device
    order = torch.argsort(experts, stable=True).to(torch.int32)
    counts = torch.zeros(E, dtype=torch.long, device=device).scatter_add_(0, experts.long(), torch.ones_like(experts.long()))
    tiles, stops = (counts + BM - 1) // BM, counts.cumsum(0)
    ends = tiles.cumsum(0)
    tile = torch.arange(most_tiles(R, E, BM), device=device)
    found = torch.searchsorted(ends, tile, right=True)
    expert = found.clamp(max=E - 1)
    first = stops[expert] - counts[expert] + (tile - ends[expert] + tiles[expert]) * BM
    last = torch.minimum(first + BM, stops[expert])
    return order, torch.stack([expert, first, torch.where(found < E, last, first)], 1).to(torch.int32)


def counted(experts: Int[Tensor, "R"], E: int, BM: int) -> tuple[Int32[Tensor, "R"], Int32[Tensor, "tiles three"]]:
    """`route` by counting smaller ones, for few rows."""
    R, T = len(experts), most_tiles(len(experts), E, BM)
    order = torch.empty(R, dtype=torch.int32, device=experts.device)
    routes = torch.empty(T, 3, dtype=torch.int32, device=experts.device)
    sizes = {"ROWS": triton.next_power_of_2(R), "EXPERTS": triton.next_power_of_2(E), "TILES": triton.next_power_of_2(T)}
    _count[(1,)](experts, order, routes, R, E, T, BM=BM, **sizes)
    return order, routes


def most_tiles(R: int, E: int, BM: int) -> int:
    """Tiles of BM rows that R rows can need: all of a full one, and one more for every expert that has any."""
    return R // BM + min(E, R)


@triton.jit(do_not_specialize=["R", "T"])
@no_type_check
def _count(experts, order, routes, R, E, T, BM: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr):
    row, expert, tile = tl.arange(0, ROWS), tl.arange(0, EXPERTS), tl.arange(0, TILES)
    mine = tl.load(experts + row, mask=row < R, other=E).to(tl.int32)
    place, count = tl.zeros((ROWS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
    for other in range(R):
        its = tl.load(experts + other).to(tl.int32)
        place += ((its < mine) | ((its == mine) & (other < row))).to(tl.int32)
        count += (expert == its).to(tl.int32)
    tl.store(order + place, row, mask=row < R)
    stop = tl.cumsum(count, 0)
    tiles = (count + BM - 1) // BM
    end = tl.cumsum(tiles, 0)
    used = tl.sum(tiles, 0)
    empty = (tile >= used) & (tile < T)
    for field in tl.static_range(3):
        tl.store(routes + tile * 3 + field, tile * 0, mask=empty)
    for t in range((R + BM - 1) // BM):
        at, first = routes + (end - tiles + t) * 3, stop - count + t * BM
        tl.store(at, expert, mask=t < tiles)
        tl.store(at + 1, first, mask=t < tiles)
        tl.store(at + 2, tl.minimum(first + BM, stop), mask=t < tiles)
