from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from compress.kernels import routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(R, E):
    return torch.randint(0, E, (R,), generator=torch.Generator().manual_seed(R + E)).to(DEVICE)


@pytest.mark.parametrize("how", [routing.counted, routing.sorted_])
@pytest.mark.parametrize("R", [1, 7, 64])
def test_every_row_is_routed_once(how, R):
    for E, BM in ((1, 16), (5, 16), (40, 4)):
        experts = drawn(R, E)
        order, routes = how(experts, E, BM)
        seen = []
        for expert, first, last in routes.tolist():
            assert last - first <= BM
            assert all(int(experts[row]) == expert for row in order[first:last].tolist())
            seen += order[first:last].tolist()
        assert sorted(seen) == list(range(R))


@pytest.mark.parametrize(("R", "E", "BM"), [(1, 1, 16), (8, 128, 16), (48, 3, 8), (33, 60, 4)])
def test_counting_and_sorting_agree(R, E, BM):
    experts = drawn(R, E)
    (order, routes), (sorted_order, sorted_routes) = (how(experts, E, BM) for how in (routing.counted, routing.sorted_))
    assert torch.equal(order, sorted_order)
    assert routes.shape == sorted_routes.shape
    used = routes[:, 2] > routes[:, 1]
    assert torch.equal(used, sorted_routes[:, 2] > sorted_routes[:, 1])
    assert torch.equal(routes[used], sorted_routes[used])


def test_many_rows_are_sorted(monkeypatch):
    monkeypatch.setattr(routing, "counted", lambda *_: pytest.fail("counted"))
    order, _ = routing.route(drawn(routing.FEW + 1, 4), 4, 16)
    assert len(order) == routing.FEW + 1
