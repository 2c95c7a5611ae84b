"""What formulas are made of: inputs, operations of one and of two tensors, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SIDE = 32  # rows and columns that are kept of every layer
TINY = 1e-30  # added before a logarithm that must not fail at zero

Tensors = Float[np.ndarray, "L ..."]  # layers, options or 1, rows or 1, columns or 1
LAYER = (-2, -1)  # the axes of one layer's entries


@dataclass(frozen=True)
class Input:
    """What a layer is known by; `nonnegative` are those that have no sign, `by_option` those that differ between options."""

    meaning: str
    nonnegative: bool = False
    by_option: bool = False


INPUTS = {
    "W": Input("weight"),
    "G": Input("gradient of the loss by the weight"),
    "V": Input("virtual gradient: of the sum of the model's outputs for an input of ones"),
    "H": Input("diagonal of the Hessian"),
    "A": Input("root of the mean square of the input feature", nonnegative=True),
    "D": Input("root of the mean square gradient of the loss by the output feature", nonnegative=True),
    "E": Input("error of the weight, quantized minus dense", by_option=True),
    "O": Input("root of the mean square error of the output feature", nonnegative=True, by_option=True),
}


@dataclass(frozen=True)
class Unary:
    """An operation of one tensor; `weight` is in proportion to how often it is drawn.

    `scalar` makes one number of a layer. `nonnegative` results have no sign.
    """

    apply: Callable[[Tensors], Tensors]
    weight: float = 1.0
    scalar: bool = False
    nonnegative: bool = False


@dataclass(frozen=True)
class Binary:
    """An operation of two tensors, written between them."""

    apply: Callable[[Tensors, Tensors], Tensors]
    weight: float


def _normalize(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O R C"]:
    found: Tensors = (x - x.mean(LAYER, keepdims=True)) / x.std(LAYER, keepdims=True)
    return found


def _minmax(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O R C"]:
    low, high = x.min(LAYER, keepdims=True), x.max(LAYER, keepdims=True)
    found: Tensors = (x - low) / (high - low)
    return found


def _softmax(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O R C"]:
    powers = np.exp(x - x.max(LAYER, keepdims=True))
    found: Tensors = powers / powers.sum(LAYER, keepdims=True)
    return found


def _logsoftmax(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O R C"]:
    x = x - x.max(LAYER, keepdims=True)
    found: Tensors = x - np.log(np.exp(x).sum(LAYER, keepdims=True))
    return found


def _sigmoid(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O R C"]:
    found: Tensors = 1 / (1 + np.exp(-x))
    return found


def _square_of(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O S S"]:
    """The whole matrix of inputs that are the same along its rows or columns."""
    return np.broadcast_to(x, (*x.shape[:2], SIDE, SIDE))


def _product(x: Float[np.ndarray, "L O R C"], y: Float[np.ndarray, "L P R2 C2"]) -> Float[np.ndarray, "L Q S S"]:
    """Rows times rows, over the columns."""
    found: Tensors = _square_of(x) @ _square_of(y).swapaxes(-2, -1) / np.float32(SIDE)
    return found


def _slogdet(x: Float[np.ndarray, "L O R C"]) -> Float[np.ndarray, "L O 1 1"]:
    found: Tensors = np.linalg.slogdet(_square_of(x))[1][..., None, None]
    return found


NO_OP = "no_op"
UNARY: dict[str, Unary] = {  # EMQ's, with doing nothing drawn twice as often as others and what is rarely valid less often
    NO_OP: Unary(lambda x: x, weight=4.0),
    "log": Unary(np.log, weight=1.0),
    "abslog": Unary(lambda x: np.log(np.abs(x) + np.float32(TINY)), weight=2.0),
    "abs": Unary(np.abs, weight=2.0, nonnegative=True),
    "square": Unary(np.square, weight=2.0, nonnegative=True),
    "sqrt": Unary(np.sqrt, weight=2.0, nonnegative=True),
    "exp": Unary(np.exp, weight=1.0, nonnegative=True),
    "relu": Unary(lambda x: np.maximum(x, np.float32(0)), weight=2.0, nonnegative=True),
    "sign": Unary(np.sign, weight=1.0),
    "invert": Unary(lambda x: 1 / x, weight=1.0),
    "sigmoid": Unary(_sigmoid, weight=2.0, nonnegative=True),
    "softmax": Unary(_softmax, weight=2.0, nonnegative=True),
    "logsoftmax": Unary(_logsoftmax, weight=2.0),
    "normalize": Unary(_normalize, weight=2.0),
    "minmax": Unary(_minmax, weight=2.0, nonnegative=True),
    "mean": Unary(lambda x: x.mean(LAYER, keepdims=True), weight=2.0, scalar=True),
    "std": Unary(lambda x: x.std(LAYER, keepdims=True), weight=2.0, scalar=True, nonnegative=True),
    "l1_norm": Unary(lambda x: np.abs(x).mean(LAYER, keepdims=True), weight=2.0, scalar=True, nonnegative=True),
    "frobenius_norm": Unary(
        lambda x: np.sqrt(np.square(x).mean(LAYER, keepdims=True)), weight=2.0, scalar=True, nonnegative=True
    ),
    "gram": Unary(lambda x: _product(x, x), weight=0.5),
    "slogdet": Unary(_slogdet, weight=0.5, scalar=True),
}
BINARY: dict[
    str, Binary
] = {  # EMQ draws + and - in 0.6 and 0.3 of cases; but an importance and an error make a loss as a product
    "+": Binary(np.add, 0.3),
    "-": Binary(np.subtract, 0.15),
    "*": Binary(np.multiply, 0.5),
    "@": Binary(_product, 0.05),
}
COMMUTATIVE = frozenset({"+", "*"})
IDEMPOTENT = frozenset({NO_OP, "abs", "relu", "sign", "normalize", "minmax"})

REDUCTIONS: dict[str, float] = {
    "mean": 0.5,
    "sum": 0.5,
}  # of a layer's entries, and how often; a sum is the mean times all weights
ALONE = ""
BITS: dict[str, float] = {  # what a layer's number is multiplied by, and how often: EMQ has the bits themselves
    ALONE: 0.4,
    "-b": 0.3,  # more bits, lower loss
    "4^-b": 0.3,  # the variance of rounding to b bits
}
