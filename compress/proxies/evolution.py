"""The search for a proxy by evolution (EMQ, arXiv 2307.10554): yields its population, from which it can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from compress.proxies.fitness import Evaluate
from compress.proxies.formula import Formula
from compress.proxies.genome import Genome, crossed, drawn, mutated

TRIES = 200  # to draw one formula that passes the screening
SAME = 1e-9  # fitness of formulas that are one, written differently

Screen = Callable[[Formula], bool]


@dataclass(frozen=True)
class Settings:
    """The chances of crossover and mutation, and in a mutation of every gene, are EMQ's.

    `parsimony` is what an input or operation costs in fitness: of formulas that rank alike the shorter one wins.
    """

    generations: int = 100
    population: int = 100
    seed: int = 0
    crossover: float = 0.5
    mutation: float = 0.5
    gene: float = 0.5
    parsimony: float = 0.002


@dataclass(frozen=True)
class Member:
    """A formula with the genome it came from; `value` is its fitness less what its complexity costs."""

    genome: Genome
    formula: str
    fitness: float
    value: float


@dataclass(frozen=True)
class State:
    """The population, best first, after a generation; the values of the best and the median member after every one so far; and
    how many formulas were evaluated, and how many drawn for that.
    """

    members: tuple[Member, ...]
    generation: int = 0
    history: tuple[tuple[float, float], ...] = ()
    evaluated: int = 0
    drawn: int = 0

    @property
    def best(self) -> Member:
        return self.members[0]


@dataclass
class _Draw:
    """Draws formulas that pass the screening, and counts how many did not."""

    random: np.random.Generator
    screen: Screen
    count: int = 0

    def valid(self, propose: Callable[[np.random.Generator], Genome], taken: set[str]) -> tuple[Genome, Formula] | None:
        """What `propose` draws, drawn again until it passes and is new; None where that does not happen."""
        for _ in range(TRIES):
            self.count += 1
            genome = propose(self.random)
            formula = genome.formula()
            if formula is not None and str(formula) not in taken and self.screen(formula):
                return genome, formula
        return None


def evolve(screen: Screen, evaluate: Evaluate, settings: Settings, state: State | None = None) -> Iterator[State]:
    """Yield the first population and that after every generation, from `state` on where one is given.

    A generation makes half as many offspring as there are members, from parents of the better half of the population, and as
    many formulas from nothing. Of each such pair the better enters, and the worst leaves: the paper's diversity-prompting
    selection, whose released code evaluates the parent instead of the offspring. The paper replaces one member at a time; here
    a generation's offspring have the same parents, so that they can be evaluated side by side. Everything a generation draws
    depends on the seed and its number alone.
    """
    if state is None:
        state = _first(screen, evaluate, settings)
    yield state
    while state.generation < settings.generations:
        state = _next(state, screen, evaluate, settings)
        yield state


def _first(screen: Screen, evaluate: Evaluate, settings: Settings) -> State:
    draw = _Draw(np.random.default_rng([settings.seed, 0]), screen)
    members: list[Member] = []
    evaluated = 0
    while len(members) < settings.population:
        taken = {member.formula for member in members}
        made: list[tuple[Genome, Formula]] = []
        while len(members) + len(made) < settings.population:
            one = draw.valid(drawn, taken | {str(formula) for _, formula in made})
            if one is None:
                raise ValueError("no formula passes the screening")
            made.append(one)
        evaluated += len(made)
        for member in _judged(made, evaluate, settings):
            _enter_(members, member)
    return _state(members, 0, (), evaluated, draw.count)


def _next(state: State, screen: Screen, evaluate: Evaluate, settings: Settings) -> State:
    draw = _Draw(np.random.default_rng([settings.seed, state.generation + 1]), screen)
    parents = [member.genome for member in state.members[: max(2, len(state.members) // 2)]]
    taken = {member.formula for member in state.members}

    def offspring(random: np.random.Generator) -> Genome:
        one, other = (parents[int(i)] for i in random.choice(len(parents), 2, replace=False))
        child = crossed(one, other, random) if random.random() < settings.crossover else one
        return mutated(child, settings.gene, random) if random.random() < settings.mutation else child

    proposals = (offspring, drawn) * (settings.population // 2)
    made = [one for propose in proposals if (one := draw.valid(propose, taken)) is not None]
    members = list(state.members)
    judged = _judged(made, evaluate, settings)
    for pair in (judged[i : i + 2] for i in range(0, len(judged), 2)):
        _enter_(members, max(pair, key=_order))
        members.sort(key=_order, reverse=True)
        del members[settings.population :]
    return _state(members, state.generation + 1, state.history, state.evaluated + len(made), state.drawn + draw.count)


def _judged(made: Sequence[tuple[Genome, Formula]], evaluate: Evaluate, settings: Settings) -> list[Member]:
    """Members in the order of their formulas, those that are invalid on some bench with no fitness at all."""
    found = evaluate([formula for _, formula in made])
    return [
        Member(genome, str(formula), -1.0 if value is None else value, _value(value, formula, settings))
        for (genome, formula), value in zip(made, found, strict=True)
    ]


def _value(fitness: float | None, formula: Formula, settings: Settings) -> float:
    return float("-inf") if fitness is None else fitness - settings.parsimony * formula.complexity


def _enter_(members: list[Member], member: Member) -> None:
    """Add what is valid and not there already in another form."""
    if member.value > float("-inf") and not any(abs(member.fitness - other.fitness) < SAME for other in members):
        members.append(member)


def _order(member: Member) -> tuple[float, str]:
    return member.value, member.formula


def _state(members: list[Member], generation: int, history: tuple[tuple[float, float], ...], evaluated: int, count: int) -> State:
    ranked = tuple(sorted(members, key=_order, reverse=True))
    median = float(np.median([member.value for member in ranked]))
    return State(ranked, generation, (*history, (ranked[0].value, median)), evaluated, count)
