from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.errors import CompressError
from compress.proxies import operations
from compress.proxies.formula import Apply, Formula, Join, Leaf, parse, parts, simplified
from compress.proxies.genome import STRUCTURES, drawn
from compress.proxies.operations import BINARY, INPUTS, UNARY
from tests.proxies.made import BITS, WEIGHTS, L, O, tensors

TENSORS = tensors()


def value(text: str) -> np.ndarray:
    return parse(text).table(TENSORS, WEIGHTS, BITS)


def test_a_formula_is_what_it_says():
    O2, D2 = np.square(TENSORS["O"].astype(np.float64)), np.square(TENSORS["D"].astype(np.float64))
    np.testing.assert_allclose(value("mean(square(O) * square(D))"), (O2 * D2).mean((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(value("sum(square(O) * square(D))"), (O2 * D2).mean((2, 3)) * WEIGHTS[:, None], rtol=1e-5)
    assert value("mean(abs(W))").shape == (L, O)
    np.testing.assert_allclose(value("mean(abs(W)) * -b"), -value("mean(abs(W))") * BITS)
    np.testing.assert_allclose(value("mean(abs(W)) * 4^-b"), value("mean(abs(W))") / 4**BITS)


def test_inputs_that_are_the_same_along_an_axis_count_for_all_of_it():
    whole = TENSORS | {name: np.broadcast_to(TENSORS[name], (*TENSORS[name].shape[:2], 32, 32)) for name in "ADO"}
    for text in ("mean(W * A)", "mean(D * A @ W)", "mean(gram(O))", "mean(std(A))", "mean(frobenius_norm(D) + O)"):
        np.testing.assert_allclose(parse(text).table(whole, WEIGHTS, BITS), value(text), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(BINARY, BINARY)))
def test_brackets_are_written_where_they_are_needed(first, second):
    W, G, V = Leaf("W"), Leaf("G"), Leaf("V")
    for inside in (Join(first, Join(second, W, G), V), Join(first, W, Join(second, G, V))):
        assert parse(str(Formula(inside))) == Formula(inside)


def test_products_bind_more_than_sums():
    assert parse("mean(W + G * V)").inside == Join("+", Leaf("W"), Join("*", Leaf("G"), Leaf("V")))
    assert str(parse("mean((W - (G - V)) * abs( A ))")) == "mean((W - (G - V)) * abs(A))"


def test_random_formulas_are_read_as_they_are_written():
    draw = np.random.default_rng(0)
    for _ in range(300):
        formula = drawn(draw).formula()
        if formula is not None:
            assert parse(str(formula)) == formula


def test_simplified_formulas_have_the_same_values():
    draw, shorter = np.random.default_rng(1), 0
    for _ in range(400):
        genome = drawn(draw)
        inside = STRUCTURES[genome.structure]
        assert len(genome.genes) == len(inside)
        formula = _unsimplified(genome, draw)
        short = simplified(formula)
        assert short.complexity <= formula.complexity
        assert simplified(short) == short
        shorter += short.complexity < formula.complexity
        before, after = formula.table(TENSORS, WEIGHTS, BITS), short.table(TENSORS, WEIGHTS, BITS)
        if np.isfinite(before).all():
            np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-5 * np.abs(before).max())
    assert shorter > 50


def _unsimplified(genome, draw) -> Formula:
    """A chain of operations, or two joined: whatever comes."""
    sides = [Leaf(str(draw.choice(list(INPUTS)))) for _ in range(2)]
    for _ in range(3):
        sides = [Apply(str(draw.choice([*UNARY])), side) for side in sides]
    inside = Join(str(draw.choice([*BINARY])), sides[0], sides[int(draw.integers(2))])
    return Formula(inside, genome.genes[-2], genome.genes[-1])


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("mean(no_op(W))", "mean(W)"),
        ("sum(mean(square(W)))", "sum(square(W))"),
        ("mean(abs(square(W)))", "mean(square(W))"),
        ("mean(sqrt(square(W)))", "mean(abs(W))"),
        ("mean(sqrt(square(A)))", "mean(A)"),
        ("mean(relu(relu(W)))", "mean(relu(W))"),
        ("mean(W * W)", "mean(square(W))"),
        ("mean(W * G)", "mean(G * W)"),
        ("mean(log(exp(W)))", "mean(W)"),
        ("mean(W - G)", "mean(W - G)"),
        ("mean(relu(W))", "mean(relu(W))"),
        ("mean(square(abs(abs(W)))) * -b", "mean(square(W)) * -b"),
    ],
)
def test_what_is_left_out(text, short):
    assert str(simplified(parse(text))) == short


def test_complexity_counts_inputs_operations_and_bits():
    assert parse("mean(W)").complexity == 1
    assert parse("mean(abs(W) * G) * -b").complexity == 5
    assert parse("sum(abs(W) * G)").inputs == {"W", "G"}
    assert len(list(parts(parse("mean(W + W)").inside))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('ls')", "no formula"),
        ("mean(__import__(W))", "__import__ is unknown: inputs are W"),
        ("mean(cube(W))", "cube is unknown: .* operations no_op"),
        ("mean(W) * 2^-b", "no formula"),
        ("median(W)", "begins with mean or sum"),
        ("mean(X)", "X is unknown"),
        ("mean(abs)", r"abs is an operation that needs \(...\)"),
        ("mean(W +)", "ends where"),
        ("mean()", "ends where"),
        ("mean((W)", "not closed"),
        ("mean(W G)", "nothing may follow before 'G'"),
        ("mean(W / G)", "'/' means nothing"),
        ("mean(W * * G)", r"'\*' stands where"),
        ("", "no formula"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(CompressError, match=message):
        parse(text)


@pytest.mark.parametrize("name", UNARY)
def test_what_is_said_of_an_operation_holds(name):
    one = UNARY[name]
    with np.errstate(all="ignore"):
        for given in TENSORS.values():
            found = one.apply(given)
            assert found.dtype == np.float32, "twice as fast as float64"
            assert found.shape[:2] == given.shape[:2]
            assert not one.scalar or found.shape[2:] == (1, 1)
            assert not one.nonnegative or not (found < 0).any()
            if name in operations.IDEMPOTENT and np.isfinite(found).all():
                np.testing.assert_allclose(one.apply(found), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BINARY)
def test_joints_take_any_two_inputs(name):
    for a, b in itertools.product(TENSORS.values(), repeat=2):
        found = BINARY[name].apply(a, b)
        assert found.dtype == np.float32
        assert found.shape[0] == L
        if name in operations.COMMUTATIVE:
            np.testing.assert_array_equal(found, BINARY[name].apply(b, a))
