"""Numbers of few bits against torch's own, and against a search of the whole table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels import minifloat

NUMBERS = {  # the first of every form, from its definition
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e4m3": [0, 2**-9, 2**-8, 3 * 2**-9, 2**-7, 5 * 2**-9, 6 * 2**-9, 7 * 2**-9, 2**-6, 9 * 2**-9],
}
FORMS = sorted(minifloat.FORMS)


def table(form: str) -> Tensor:
    return minifloat.numbers(form)


def inputs(form: str, count: int = 20000) -> Tensor:
    """Of all sizes, with every number of the form and every middle of two among them."""
    g = torch.Generator().manual_seed(0)
    known = table(form)[~table(form).isnan()].sort().values
    middles = (known[1:] + known[:-1]) / 2
    largest = minifloat.FORMS[form].largest
    x = torch.randn(count, generator=g) * torch.logspace(-8, 1, count) * largest
    return torch.cat([x, known, middles, torch.nextafter(middles, x.new_tensor(torch.inf)), torch.tensor([0.0, 1e30, -1e30])])


@pytest.mark.parametrize("form", FORMS)
def test_the_smallest_numbers_are_those_of_the_definition(form):
    assert table(form)[: len(NUMBERS[form])].tolist() == NUMBERS[form]
    half = len(table(form)) // 2
    assert torch.equal(table(form)[half:].nan_to_num(), -table(form)[:half].nan_to_num())


def test_e4m3_is_that_of_torch():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(table("e4m3").nan_to_num(1e9), every.view(torch.float8_e4m3fn).float().nan_to_num(1e9))
    x = inputs("e4m3")
    assert torch.equal(minifloat.rounded(x, "e4m3"), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    theirs = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    ours = minifloat.codes_of(minifloat.rounded(x, "e4m3"), "e4m3")
    assert torch.equal(ours, torch.where(theirs == 128, 0, theirs))  # torch keeps the sign of zero


@pytest.mark.parametrize("form", FORMS)
def test_rounding_finds_the_nearest_number_of_all_and_ties_go_to_even_codes(form):
    x = inputs(form, 3000)
    code = minifloat.codes_of(minifloat.rounded(x, form), form)
    found = minifloat.values_of(code, form)
    off = (table(form).double() - x[:, None].double()).abs().nan_to_num(torch.inf)
    least = off.min(1).values
    assert torch.equal((found.double() - x.double()).abs(), least)
    tied = (off == least[:, None]) & (table(form) != 0)
    ties = tied.sum(1) > 1
    assert ties.sum() > 10
    assert (code[ties & (x.abs() < minifloat.FORMS[form].largest)] % 2 == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_inverse_to_values(form):
    kind = minifloat.FORMS[form]
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8)
    codes = codes[~table(form).isnan() & (codes != 1 << (kind.bits - 1))][None]
    values = minifloat.values_of(codes, form)
    assert values.shape == codes.shape
    assert torch.equal(minifloat.codes_of(values, form), codes)
    assert torch.equal(minifloat.rounded(values, form), values)
    assert values.abs().max() == kind.largest


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_not_changed(form):
    x = inputs(form)
    before = x.clone()
    minifloat.codes_of(minifloat.rounded(x, form), form)
    assert torch.equal(x, before)
