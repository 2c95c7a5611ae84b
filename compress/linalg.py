"""Matrix products and factorisations shared by statistics and solvers; torch only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

FEW = 256  # columns: with more, the product pays for copying its factors
THIN, THIN_PANEL = 512, 128  # columns of x up to which x^T x reads x as it is, and those of it at a time
PANEL = 256  # rows of a triangular product or factor at a time: up to half of the multiplications fall away
PANEL_GPU = 1024  # of x^T x, an estimate: fewer leave most of an H200 without a tile of 128 x 128


def matmul_nt(a: Float[Tensor, "R K"], b: Float[Tensor, "C K"]) -> Float[Tensor, "R C"]:
    """a @ b^T in full float32.

    On a CPU through oneDNN: 210 GFLOP/s a core against torch.mm's 100 on an AMD EPYC of the Zen 5 generation, 108 against 99
    on an older one (torch 2.13, 2026-11), at the same accuracy. It needs contiguous inputs: strided ones take a slow path.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.contiguous(), None, "none", [], "")
        return out
    return a @ b.t()


def add_product_(C: Float[Tensor, "R C"], a: Float[Tensor, "R K"], b: Float[Tensor, "K C"]) -> None:
    """C += a @ b in place, in full float32.

    On a CPU from FEW columns of `a` on by `matmul_nt`; below, copying its inputs costs more than it saves: 0.59 against 0.37 ms
    for 64 x 64 x 4096 on an AMD EPYC where it multiplies no faster (torch 2.13, 2026-11).
    """
    if a.shape[1] > FEW and not a.is_cuda:
        C += matmul_nt(a, b.t())
    else:
        C.addmm_(a, b)


def add_gram_(H: Float[Tensor, "K K"], x: Float[Tensor, "M K"]) -> None:
    """H += x^T x in place, lower triangle only, in H's dtype.

    A GPU multiplies 16-bit activations as they are: their products are exact in float32, in which it adds them up. A CPU makes
    do without a transposed copy where x is thin, which costs less than it saves: 2.2 against 3.7 ms for 4096 x 256, 7.8 against
    10.2 for 4096 x 512 (2 cores of an AMD EPYC that multiplies no faster by `matmul_nt`, torch 2.13, 2026-11).
    """
    if x.shape[1] <= THIN and not x.is_cuda:
        x = x.to(H.dtype)
        for start in range(0, len(H), THIN_PANEL):
            stop = start + THIN_PANEL
            H[start:stop, :stop].addmm_(x[:, start:stop].t(), x[:, :stop])
        return
    halves = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and H.dtype == torch.float32
    xt = x.t() if halves else x.t().contiguous().to(H.dtype)  # transposed while it is narrow: 4 against 19 ms, 4096 x 1024
    panel = PANEL_GPU if x.is_cuda else PANEL
    for start in range(0, len(H), panel):
        stop = start + panel
        if halves:
            H[start:stop, :stop] += torch.mm(xt[start:stop], x[:, :stop], out_dtype=torch.float32)
        else:
            H[start:stop, :stop] += matmul_nt(xt[start:stop], xt[:stop])


def add_cross_(C: Float[Tensor, "N K"], a: Float[Tensor, "M N"], b: Float[Tensor, "M K"]) -> None:
    """C += a^T b in place; bfloat16 factors are multiplied as they are, and on a CPU their sum is rounded to it."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and C.dtype == torch.float32:
        C += torch.mm(a.t(), b, out_dtype=torch.float32)
    elif a.dtype == torch.bfloat16:
        C += torch.mm(a.t(), b)
    else:
        C += matmul_nt(a.t().to(C.dtype), b.t().to(C.dtype))


def narrowed(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A factor of which 0.2 % do not matter, in bfloat16 on a CPU with instructions for it.

    A product of two such takes half as long as in float32: 365 against 700 ms for 4096 x 2816 (AMD EPYC, torch 2.13, 2026-11).
    """
    return x.bfloat16() if x.dtype == torch.float32 and x.device.type == "cpu" and _multiplies_bfloat16() else x


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def permuted(H: Float[Tensor, "K K"], perm: Int64[Tensor, "K"]) -> Float[Tensor, "K K"]:
    """A copy of H with its rows and columns in the order `perm`; on a CPU faster than by brackets."""
    return H.index_select(0, perm).index_select(1, perm)


def mirror(lower: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """The symmetric matrix of a lower triangle."""
    return lower.tril() + lower.tril(-1).t()


def ldl_(H: Float[Tensor, "K K"], added: float = 0.0) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K"]] | None:
    """(Ut, D) with H + added I = Ut diag(D) Ut^T and Ut unit *upper* triangular; None where that is not positive definite.

    One Cholesky factorisation from the last row to the first. For a GPTQ order of the columns, `D_j = 1 / U_jj^2` of the
    inverse Cholesky factor that GPTQ (arXiv 2210.17323) computes with three factorisations. H is overwritten, and Ut a view
    of it. On a CPU panel by panel: 360 ms against 530 for LAPACK's and the copies around it, at K = 4096 on one core of an AMD
    EPYC (torch 2.13, 2026-11).
    """
    U = H  # becomes Ut^T; its lower triangle alone is read
    U.diagonal().add_(added)
    D = torch.empty_like(H[0])
    panel = PANEL if H.device.type == "cpu" else len(H)
    for stop in range(len(H), 0, -panel):
        start = max(0, stop - panel)
        reversed_factor, info = torch.linalg.cholesky_ex(U[start:stop, start:stop].flip(0, 1), upper=True)
        if info.item() != 0:
            return None
        R = reversed_factor.flip(0, 1)  # R^T R is the panel's square
        D[start:stop] = R.diagonal().square()
        if start:
            _eliminate(U, R, start, stop)
        U[start:stop, start:stop] = R / R.diagonal()[:, None]
    return (U.tril_().t(), D) if bool(torch.isfinite(D).all()) and bool((D > 0).all()) else None


def _eliminate(U: Float[Tensor, "K K"], R: Float[Tensor, "P P"], start: int, stop: int) -> None:
    """Replace the rows of a panel left of its square by those of the factor, and take their part from all rows above."""
    inverse = torch.linalg.solve_triangular(R.t(), torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    rows = inverse @ U[start:stop, :start]
    torch.div(rows, R.diagonal()[:, None], out=U[start:stop, :start])
    for top in range(0, start, PANEL):
        bottom = min(top + PANEL, start)
        U[top:bottom, :bottom].addmm_(rows[:, top:bottom].t(), rows[:, :bottom], alpha=-1)


def damped_inverse(H: Float[Tensor, "K K"], damping: float) -> tuple[Float[Tensor, "K K"], float]:
    """The inverse of H plus a fraction of its mean diagonal, and that fraction: `damping`, doubled until the inverse exists."""
    mean = H.diagonal().mean()
    while True:
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            return torch.cholesky_inverse(lower), damping
        damping *= 2
