"""Where formulas come from: chains, trees and graphs of operations as tuples of genes, drawn, crossed and mutated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.proxies.formula import Apply, Expression, Formula, Join, Leaf, simplified
from compress.proxies.operations import BINARY, BITS, INPUTS, REDUCTIONS, UNARY

ABSENT = "absent"  # an edge that a graph does not have
ABSENT_CHANCE = 0.4
SOURCES, NODES = 3, 2  # of a graph: inputs, and nodes that add or multiply what reaches them

Chances = Mapping[str, float]


def _edges() -> dict[str, float]:
    rest = sum(one.weight for one in UNARY.values())
    return {ABSENT: ABSENT_CHANCE * rest / (1 - ABSENT_CHANCE)} | {name: one.weight for name, one in UNARY.items()}


INPUT: Chances = dict.fromkeys(INPUTS, 1.0)
ONE: Chances = {name: one.weight for name, one in UNARY.items()}
TWO: Chances = {name: one.weight for name, one in BINARY.items()}
EDGE: Chances = _edges()
NODE: Chances = {"+": 0.5, "*": 0.5}  # EMQ's nodes only add
TAIL: tuple[Chances, ...] = (REDUCTIONS, BITS)
STRUCTURES: dict[str, tuple[Chances, ...]] = {  # the genes of each, after EMQ (arXiv 2307.10554)
    "chain": (INPUT, ONE, ONE, ONE, ONE, *TAIL),
    "tree": (INPUT, ONE, ONE, INPUT, ONE, ONE, TWO, *TAIL),
    "graph": (*[INPUT] * SOURCES, *itertools.chain(*((*[EDGE] * (SOURCES + n), NODE) for n in range(NODES))), *TAIL),
}


@dataclass(frozen=True)
class Genome:
    """A structure by name, and one gene for each of its places."""

    structure: str
    genes: tuple[str, ...]

    def formula(self) -> Formula | None:
        """What it stands for, simplified; None for a graph without a way to its last node."""
        *body, reduction, bits = self.genes
        inside = _BUILT[self.structure](body)
        return None if inside is None else simplified(Formula(inside, reduction, bits))


def drawn(draw: np.random.Generator) -> Genome:
    """A genome of any structure, its genes by their chances."""
    structure = list(STRUCTURES)[int(draw.integers(len(STRUCTURES)))]
    return Genome(structure, tuple(_gene(chances, draw) for chances in STRUCTURES[structure]))


def crossed(one: Genome, other: Genome, draw: np.random.Generator) -> Genome:
    """Each gene of either parent; parents of different structures share only the last two, and the child is the first's else."""
    if one.structure == other.structure:
        return Genome(one.structure, _mixed(one.genes, other.genes, draw))
    own, tail = one.genes[: -len(TAIL)], _mixed(one.genes[-len(TAIL) :], other.genes[-len(TAIL) :], draw)
    return Genome(one.structure, own + tail)


def mutated(genome: Genome, rate: float, draw: np.random.Generator) -> Genome:
    """Each gene drawn anew with the chance `rate`."""
    places = zip(genome.genes, STRUCTURES[genome.structure], strict=True)
    return Genome(genome.structure, tuple(_gene(chances, draw) if draw.random() < rate else gene for gene, chances in places))


def _gene(chances: Chances, draw: np.random.Generator) -> str:
    weights = np.array(list(chances.values()))
    return list(chances)[int(draw.choice(len(weights), p=weights / weights.sum()))]


def _mixed(one: Sequence[str], other: Sequence[str], draw: np.random.Generator) -> tuple[str, ...]:
    return tuple(a if draw.random() < 0.5 else b for a, b in zip(one, other, strict=True))


def _applied(expression: Expression, operations: Sequence[str]) -> Expression:
    for operation in operations:
        expression = Apply(operation, expression)
    return expression


def _chain(genes: Sequence[str]) -> Expression:
    return _applied(Leaf(genes[0]), genes[1:])


def _tree(genes: Sequence[str]) -> Expression:
    *branches, joint = genes
    half = len(branches) // 2
    return Join(joint, _chain(branches[:half]), _chain(branches[half:]))


def _graph(genes: Sequence[str]) -> Expression | None:
    """Inputs, then nodes that each join an operation of everything before them; the last node is the result."""
    nodes: list[Expression | None] = [Leaf(name) for name in genes[:SOURCES]]
    at = SOURCES
    for _ in range(NODES):
        edges, joint = genes[at : at + len(nodes)], genes[at + len(nodes)]
        at += len(nodes) + 1
        reached = [Apply(edge, node) for node, edge in zip(nodes, edges, strict=True) if edge != ABSENT and node is not None]
        nodes.append(_joined(joint, reached))
    return nodes[-1]


def _joined(joint: str, expressions: Sequence[Expression]) -> Expression | None:
    total: Expression | None = None
    for one in expressions:
        total = one if total is None else Join(joint, total, one)
    return total


_BUILT = {"chain": _chain, "tree": _tree, "graph": _graph}
