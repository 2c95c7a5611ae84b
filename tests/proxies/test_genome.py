from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from compress.proxies.genome import ABSENT, STRUCTURES, Genome, crossed, drawn, mutated
from compress.proxies.operations import NO_OP

TREE = Genome("tree", ("O", "square", NO_OP, "D", "square", NO_OP, "*", "sum", ""))
CHAIN = Genome("chain", ("W", "abs", NO_OP, NO_OP, "square", "mean", "-b"))


def test_structures_are_written_out():
    assert str(CHAIN.formula()) == "mean(square(W)) * -b"
    assert str(TREE.formula()) == "sum(square(D) * square(O))"


def test_a_graph_joins_what_reaches_a_node():
    edges = {"first": ("abslog", ABSENT, "abs"), "last": (ABSENT, ABSENT, "relu", "exp")}
    graph = Genome("graph", ("W", "G", "V", *edges["first"], "+", *edges["last"], "+", "mean", ""))
    assert str(graph.formula()) == "mean(exp(abs(V) + abslog(W)) + relu(V))"
    product = Genome("graph", ("W", "G", "V", *edges["first"], "*", *edges["last"], "*", "mean", ""))
    assert str(product.formula()) == "mean(exp(abs(V) * abslog(W)) * relu(V))"
    cut = Genome("graph", ("W", "G", "V", *[ABSENT] * 3, "+", ABSENT, ABSENT, ABSENT, "exp", "+", "mean", ""))
    assert cut.formula() is None


def test_draws_follow_the_chances():
    draw = np.random.default_rng(0)
    found = [drawn(draw) for _ in range(3000)]
    for one in found:
        assert all(gene in chances for gene, chances in zip(one.genes, STRUCTURES[one.structure], strict=True))
    structures = Counter(one.structure for one in found)
    assert all(count == pytest.approx(1000, rel=0.15) for count in structures.values())
    joints = Counter(one.genes[6] for one in found if one.structure == "tree")
    assert joints["+"] / joints.total() == pytest.approx(0.3, abs=0.05)
    assert joints["@"] / joints.total() == pytest.approx(0.05, abs=0.03)
    operations = Counter(one.genes[1] for one in found if one.structure == "chain")
    assert operations[NO_OP] > 1.5 * operations["abs"] > 1.5 * operations["slogdet"]


def test_crossing_takes_each_gene_of_either_parent():
    other, draw = Genome("tree", ("W", "abs", "exp", "G", "log", "sign", "+", "mean", "-b")), np.random.default_rng(0)
    children = [crossed(TREE, other, draw) for _ in range(50)]
    for child in children:
        assert all(gene in both for gene, *both in zip(child.genes, TREE.genes, other.genes, strict=True))
    for place in range(9):
        assert {child.genes[place] for child in children} == {TREE.genes[place], other.genes[place]}


def test_different_structures_share_their_ends():
    draw = np.random.default_rng(0)
    children = [crossed(TREE, CHAIN, draw) for _ in range(30)]
    assert all(child.structure == "tree" and child.genes[:-2] == TREE.genes[:-2] for child in children)
    assert {child.genes[-2:] for child in children} == {("sum", ""), ("sum", "-b"), ("mean", ""), ("mean", "-b")}


def test_mutation_draws_genes_anew():
    draw = np.random.default_rng(0)
    assert mutated(TREE, 0.0, draw) == TREE
    changed = [sum(a != b for a, b in zip(mutated(TREE, 0.5, draw).genes, TREE.genes, strict=True)) for _ in range(200)]
    assert 2 < np.mean(changed) < 5
    assert mutated(TREE, 1.0, np.random.default_rng(1)) == mutated(TREE, 1.0, np.random.default_rng(1))
