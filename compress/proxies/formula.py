"""A proxy as a formula: read, written, simplified, and evaluated for all layers and options at once.

`sum(square(O) * square(D))` is a number for every layer and option; a unit's is the sum of its layers', a configuration's the sum
of its units', and lower stands for a lower loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Union

import numpy as np
from jaxtyping import Float

from compress.errors import CompressError
from compress.proxies.operations import (
    ALONE,
    BINARY,
    COMMUTATIVE,
    IDEMPOTENT,
    INPUTS,
    LAYER,
    NO_OP,
    REDUCTIONS,
    UNARY,
    Tensors,
)


@dataclass(frozen=True)
class Leaf:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply:
    operation: str
    inside: Expression

    def __str__(self) -> str:
        return f"{self.operation}({self.inside})"


@dataclass(frozen=True)
class Join:
    operation: str
    left: Expression
    right: Expression

    def __str__(self) -> str:
        return " ".join(
            (_bracketed(self.left, self.operation), self.operation, _bracketed(self.right, self.operation, last=True))
        )


Expression = Union[Leaf, Apply, Join]  # noqa: UP007 - evaluated, and the classes above are not defined yet where it is read
LOOSE = ("+", "-")  # bind less than * and @


@dataclass(frozen=True)
class Formula:
    """A `reduction` of what is `inside` over a layer's entries, times a function of the layer's bits."""

    inside: Expression
    reduction: str = "mean"
    bits: str = ALONE

    def __str__(self) -> str:
        return f"{self.reduction}({self.inside})" + (f" * {self.bits}" if self.bits else "")

    @property
    def complexity(self) -> int:
        """Inputs and operations, each time they are written, and one for the bits."""
        return sum(1 for _ in parts(self.inside)) + bool(self.bits)

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset(one.name for one in parts(self.inside) if isinstance(one, Leaf))

    def table(
        self, tensors: Mapping[str, Tensors], weights: Float[np.ndarray, "L"], bits: Float[np.ndarray, "L O"]
    ) -> Float[np.ndarray, "L O"]:
        """A number for every layer and option, which may be NaN or infinite; `weights` are the layers' numbers of weights."""
        with np.errstate(all="ignore"):
            found = _evaluated(self.inside, tensors, {}).mean(LAYER, dtype=np.float64)
            if self.reduction == "sum":
                found = found * weights[:, None]
            if self.bits == "-b":
                found = found * -bits
            elif self.bits == "4^-b":
                found = found * 4.0**-bits
        return np.broadcast_to(found, bits.shape)


def parts(expression: Expression) -> Iterator[Expression]:
    """An expression and all within it."""
    yield expression
    if isinstance(expression, Apply):
        yield from parts(expression.inside)
    elif isinstance(expression, Join):
        yield from parts(expression.left)
        yield from parts(expression.right)


def _evaluated(expression: Expression, tensors: Mapping[str, Tensors], known: dict[Expression, Tensors]) -> Tensors:
    """What is written twice is computed once."""
    if isinstance(expression, Leaf):
        return tensors[expression.name]
    if expression not in known:
        if isinstance(expression, Apply):
            known[expression] = UNARY[expression.operation].apply(_evaluated(expression.inside, tensors, known))
        else:
            left, right = (_evaluated(side, tensors, known) for side in (expression.left, expression.right))
            known[expression] = BINARY[expression.operation].apply(left, right)
    return known[expression]


def simplified(formula: Formula) -> Formula:
    """A formula of the same values, written shorter where that can be: equal ones often get one text."""
    inside = _simplified(formula.inside)
    while isinstance(inside, Apply) and inside.operation == "mean":  # the reduction is one
        inside = inside.inside
    return Formula(inside, formula.reduction, formula.bits)


def _simplified(expression: Expression) -> Expression:
    if isinstance(expression, Apply):
        return _without(expression.operation, _simplified(expression.inside))
    if isinstance(expression, Join):
        left, right = _simplified(expression.left), _simplified(expression.right)
        if expression.operation in COMMUTATIVE and str(right) < str(left):
            left, right = right, left
        return (
            _without("square", left) if expression.operation == "*" and left == right else Join(expression.operation, left, right)
        )
    return expression


def _without(operation: str, inside: Expression) -> Expression:
    """An operation of a simple expression, left out or joined with what it follows where the values stay the same."""
    before = inside.operation if isinstance(inside, Apply) else None
    if operation == NO_OP or (operation == before and operation in IDEMPOTENT):
        return inside
    if operation in ("abs", "relu") and _nonnegative(inside):
        return inside
    if operation in ("mean", "l1_norm", "frobenius_norm") and _scalar(inside):
        return inside if operation == "mean" else _without("abs", inside)
    if operation == "log" and _nonnegative(inside) and isinstance(inside, Apply) and before == "exp":
        return inside.inside
    if isinstance(inside, Apply) and before == "abs" and operation in ("square", "abslog", "l1_norm", "frobenius_norm"):
        return _without(operation, inside.inside)
    if isinstance(inside, Apply) and before == "square" and operation == "sqrt":
        return _without("abs", inside.inside)
    return Apply(operation, inside)


def _nonnegative(expression: Expression) -> bool:
    if isinstance(expression, Leaf):
        return INPUTS[expression.name].nonnegative
    if isinstance(expression, Apply):
        if expression.operation in ("mean", "invert"):
            return _nonnegative(expression.inside)
        return UNARY[expression.operation].nonnegative
    return expression.operation in COMMUTATIVE and _nonnegative(expression.left) and _nonnegative(expression.right)


def _scalar(expression: Expression) -> bool:
    if isinstance(expression, Apply):
        return UNARY[expression.operation].scalar or (
            expression.operation in ("abs", "abslog", "square", "sqrt", "exp", "log", "relu", "sign", "invert", "sigmoid")
            and _scalar(expression.inside)
        )
    return isinstance(expression, Join) and expression.operation != "@" and _scalar(expression.left) and _scalar(expression.right)


def _bracketed(expression: Expression, around: str, last: bool = False) -> str:
    """In brackets where the text would else be read in another order."""
    needs = isinstance(expression, Join) and (
        (expression.operation in LOOSE) > (around in LOOSE) or (last and _same(expression, around))
    )
    return f"({expression})" if needs else str(expression)


def _same(expression: Join, around: str) -> bool:
    return (expression.operation in LOOSE) == (around in LOOSE)


WHOLE = re.compile(r"\s*(?P<reduction>\w+)\s*\((?P<inside>.*)\)\s*(?:\*\s*(?P<bits>-b|4\^-b)\s*)?")
TOKEN = re.compile(r"\s*([A-Za-z_]\w*|[-+*@()])")


def parse(text: str) -> Formula:
    """The formula that `str` wrote as `text`; raises CompressError for anything else. Nothing is executed."""
    found = WHOLE.fullmatch(text)
    if found is None or found["reduction"] not in REDUCTIONS:
        raise CompressError(f"The proxy {text!r} is no formula such as sum(square(O) * square(D)); it begins with mean or sum.")
    return Formula(_Reader(found["inside"]).whole(), found["reduction"], found["bits"] or ALONE)


class _Reader:
    """Descends through a text of names, brackets and signs."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.tokens: list[str] = []
        rest = text.rstrip()
        while self.at < len(rest):
            token = TOKEN.match(rest, self.at)
            if token is None:
                raise self._wrong(f"{rest[self.at :].strip()[:1]!r} means nothing in it")
            self.tokens.append(token[1])
            self.at = token.end()
        self.tokens.reverse()

    def whole(self) -> Expression:
        found = self._sum()
        if self.tokens:
            raise self._wrong(f"nothing may follow before {self.tokens[-1]!r}")
        return found

    def _sum(self) -> Expression:
        found = self._term()
        while self.tokens and self.tokens[-1] in LOOSE:
            found = Join(self.tokens.pop(), found, self._term())
        return found

    def _term(self) -> Expression:
        found = self._factor()
        while self.tokens and self.tokens[-1] in BINARY and self.tokens[-1] not in LOOSE:
            found = Join(self.tokens.pop(), found, self._factor())
        return found

    def _factor(self) -> Expression:
        token = self.tokens.pop() if self.tokens else ""
        if token == "(":
            return self._closed()
        if token in INPUTS:
            return Leaf(token)
        if token in UNARY and self.tokens and self.tokens[-1] == "(":
            self.tokens.pop()
            return Apply(token, self._closed())
        if token and token not in "+-*@)":
            known = f"inputs are {', '.join(INPUTS)}, operations {', '.join(UNARY)}"
            raise self._wrong(f"{token} is {'an operation that needs (...)' if token in UNARY else f'unknown: {known}'}")
        raise self._wrong(f"{f'{token!r} stands' if token else 'the text ends'} where an input or an operation is expected")

    def _closed(self) -> Expression:
        found = self._sum()
        if not self.tokens or self.tokens.pop() != ")":
            raise self._wrong("a bracket is not closed")
        return found

    def _wrong(self, why: str) -> CompressError:
        return CompressError(f"The proxy's formula {self.text!r} cannot be read: {why}.")
