"""The proxies that were written by hand, each as a table of what every option of every layer adds to a score; lower is better.

Those that know no quantization error multiply a layer's importance by its bits: the more bits where it counts the better. Here
the product is negative, as a lower score stands for a lower loss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from compress.proxies.statistics import Statistics

Table = Float[np.ndarray, "L O"]
BETA = 1.0  # of OMPQ's importance


def snip(statistics: Statistics) -> Table:
    """Sum of |w dL/dw|, times bits (SNIP, arXiv 1810.02340, as EMQ compares it)."""
    return _times_bits(statistics, statistics.totals["snip"])


def synflow(statistics: Statistics) -> Table:
    """Sum of |w dR/dw| for R the sum of outputs of the net with positive weights for an input of ones, times bits (Synflow,
    arXiv 2006.05467). Of the trained weights: EMQ's code draws new ones.
    """
    return _times_bits(statistics, statistics.totals["synflow"])


def bparams(statistics: Statistics) -> Table:
    """The bytes of the weights, n b / 8: size alone."""
    return _times_bits(statistics, statistics.weights / 8)


def hawq(statistics: Statistics) -> Table:
    """lambda / n ||Q - W||^2 / 2 with the top eigenvalue of the Hessian (HAWQ, arXiv 1905.03696).

    The paper orders layers by lambda / n and leaves their bits to the user; the error at the option's bits is what its
    successor multiplies with. The sign of an eigenvalue does not count.
    """
    return _spread(statistics, statistics.totals["eigenvalue"])


def hawq_v2(statistics: Statistics) -> Table:
    """Tr(H) / n ||Q - W||^2 / 2 (HAWQ-v2, arXiv 1911.03852)."""
    return _spread(statistics, statistics.totals["trace"])


def qe_score(statistics: Statistics) -> Table:
    """Log of the output's standard deviation plus log of its channels, times bits: an entropy (QE-Score, NeurIPS 2022,
    Entropy-Driven Mixed-Precision Quantization). All layers weigh the same, where the authors weigh a CNN's stages 0, 0, 1, 1, 6.
    """
    spread = np.maximum(statistics.totals["spread"], np.finfo(np.float32).tiny)
    return _times_bits(statistics, np.log(spread) + np.log(statistics.totals["channels"]))


def ompq(statistics: Statistics) -> Table:
    """exp(-beta gamma) times bits, with gamma the similarity of a layer's outputs to those of others (OMPQ, arXiv 2109.07865).

    The mean over other layers, where the paper has the sum, so that beta = 1 fits models of any depth.
    """
    return _times_bits(statistics, np.exp(-BETA * statistics.totals["overlap"]))


def gptq_error(statistics: Statistics) -> Table:
    """The squared error of the layer's output that GPTQ leaves, relative to the output."""
    return statistics.totals["output_error"]


HANDWRITTEN: dict[str, Callable[[Statistics], Table]] = {
    "SNIP": snip,
    "Synflow": synflow,
    "BParams": bparams,
    "HAWQ": hawq,
    "HAWQ-v2": hawq_v2,
    "QE score": qe_score,
    "OMPQ": ompq,
    "GPTQ error": gptq_error,
}


def _times_bits(statistics: Statistics, importance: Float[np.ndarray, "L"]) -> Table:
    table: Table = -importance[:, None] * statistics.bits
    return table


def _spread(statistics: Statistics, curvature: Float[np.ndarray, "L"]) -> Table:
    table: Table = (np.abs(curvature) / statistics.weights)[:, None] * statistics.totals["weight_error"] / 2
    return table
