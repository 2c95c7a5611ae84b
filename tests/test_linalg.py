from __future__ import annotations

import pytest
import torch

from compress.linalg import PANEL, THIN, add_cross_, add_gram_, add_product_, ldl_, matmul_nt, mirror


def positive_definite(K: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(3 * K, K, dtype=dtype, generator=torch.Generator().manual_seed(K))
    return x.t() @ x


def test_matmul_nt_is_full_float32_for_strided_inputs():
    a, b = torch.randn(37, 65).t(), torch.randn(37, 19).t()
    exact = a.double() @ b.double().t() if a.shape[1] == b.shape[1] else None
    assert exact is not None
    torch.testing.assert_close(matmul_nt(a, b).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [1, 40, 300])
def test_products_are_added_in_place_to_a_part(inner):
    C, a, b = torch.ones(60, 50), torch.randn(inner, 30).t(), torch.randn(50, inner).t()
    expected = C.double()
    expected[10:40] += a.double() @ b.double()
    add_product_(C[10:40], a, b)
    torch.testing.assert_close(C.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("halves", [False, True], ids=["in float32", "in bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cross_products_add_up(dtype, halves, monkeypatch):
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: halves)
    tolerance = 5e-3 if halves or dtype == torch.bfloat16 else 1e-6
    a, b = torch.randn(300, 40).to(dtype), torch.randn(300, 40).to(dtype)
    C = torch.ones(40, 40)
    add_cross_(C, a, b)
    exact = 1 + a.double().t() @ b.double()
    assert (C - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("columns", [7, 300, THIN, 1100])
def test_gram_over_several_panels_is_the_lower_triangle_of_xtx(columns):
    x = torch.randn(70, columns)
    H = torch.zeros(columns, columns)
    add_gram_(H, x)
    add_gram_(H, 2 * x)
    torch.testing.assert_close(mirror(H), 5 * x.t() @ x, rtol=1e-4, atol=1e-3)


def test_ldl_reproduces_the_matrix_with_a_unit_upper_factor():
    H = positive_definite(41)
    found = ldl_(H.clone())
    assert found is not None
    Ut, D = found
    torch.testing.assert_close(Ut @ torch.diag(D) @ Ut.t(), H)
    assert torch.equal(Ut.diagonal(), torch.ones(41, dtype=torch.float64))
    assert not Ut.tril(-1).any()


@pytest.mark.parametrize("K", [PANEL, 2 * PANEL + 1, 3 * PANEL + 77])
def test_ldl_over_several_panels_adds_to_the_diagonal(K):
    H = positive_definite(K)
    found = ldl_(H.clone(), 0.5)
    assert found is not None
    Ut, D = found
    torch.testing.assert_close(Ut @ torch.diag(D) @ Ut.t(), H + 0.5 * torch.eye(K), rtol=1e-10, atol=1e-8)
    assert not Ut.tril(-1).any()


def test_ldl_refuses_what_only_its_first_panel_shows_to_be_indefinite():
    H = positive_definite(2 * PANEL + 5)
    H[0, 0] = -1
    assert ldl_(H.clone()) is None


def test_ldl_diagonal_is_gptqs_inverse_cholesky_diagonal():
    H = positive_definite(30)
    found = ldl_(H.clone())
    assert found is not None
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    torch.testing.assert_close(found[1], U.diagonal() ** -2)


def test_ldl_refuses_an_indefinite_matrix():
    assert ldl_(torch.diag(torch.tensor([1.0, -1.0, 2.0]))) is None
    assert ldl_(torch.zeros(3, 3)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_adds_up_sixteen_bit_products_in_float32(dtype):
    x = (torch.randn(3000, 300) + 1).to(dtype)
    H = torch.zeros(300, 300, device="cuda")
    add_gram_(H, x.cuda())
    add_gram_(H, x.cuda())
    expected = 2 * (x.double().t() @ x.double())
    torch.testing.assert_close(mirror(H).cpu().double(), expected, rtol=1e-5, atol=1e-3)
