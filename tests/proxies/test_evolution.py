"""The search for formulas, on benches whose losses follow from one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from compress.errors import CompressError
from compress.progress import silent
from compress.proxies import fitness, proxy, searching
from compress.proxies.evolution import Settings, evolve
from compress.proxies.formula import parse
from compress.proxies.genome import STRUCTURES, Genome
from compress.proxies.searching import searched
from tests.proxies.made import bench

BENCHES = [bench(0), bench(1)]
SMALL = Settings(generations=6, population=12)


def screen(formula):
    return fitness.promising(formula, [fitness.reduced(one) for one in BENCHES])


def judged(formulas):
    return [fitness.fitness_of(formula, BENCHES) for formula in formulas]


def test_the_formula_of_the_losses_is_fittest():
    truth = fitness.fitness_of(parse("sum(square(D) * square(O))"), BENCHES)
    assert truth > 0.97
    for other in ("mean(W) * -b", "sum(square(W)) * -b", "sum(square(E))", "sum(D) * -b"):
        assert fitness.fitness_of(parse(other), BENCHES) < truth - 0.03
    assert fitness.fitness_of(parse("sum(square(D) * square(O))"), BENCHES[:1]) > 0.97


def test_what_ranks_nothing_has_no_fitness():
    assert fitness.fitness_of(parse("mean(log(W)) * -b"), BENCHES) is None
    assert fitness.fitness_of(parse("mean(W - W) * -b"), BENCHES) is None
    assert not screen(parse("mean(W)")), "the same for all options"
    assert not screen(parse("mean(log(W)) * -b")), "not finite"
    assert not screen(parse("mean(sign(square(E)))")), "constant"
    assert screen(parse("mean(abs(E))"))


@pytest.mark.parametrize("seed", [0, 1])
def test_it_gets_better_and_finds_a_good_formula(seed):
    settings = Settings(generations=15, population=24, seed=seed)
    states = list(evolve(screen, judged, settings))
    assert [state.generation for state in states] == list(range(16))
    for before, after in itertools.pairwise(states):
        assert after.best.value >= before.best.value
        assert after.history[:-1] == before.history
    last = states[-1]
    assert len(last.members) == 24
    assert [member.value for member in last.members] == sorted((member.value for member in last.members), reverse=True)
    assert len({member.formula for member in last.members}) == 24
    for member in last.members:
        assert member.fitness == pytest.approx(fitness.fitness_of(parse(member.formula), BENCHES))
        assert member.value == pytest.approx(member.fitness - 0.002 * parse(member.formula).complexity)
        assert str(member.genome.formula()) == member.formula
    assert last.best.fitness > 0.8
    assert last.drawn > last.evaluated > 24


def test_a_seed_is_a_search():
    one, again = (list(evolve(screen, judged, SMALL)) for _ in range(2))
    assert one == again
    assert list(evolve(screen, judged, replace(SMALL, seed=1)))[-1].members != one[-1].members


def test_it_goes_on_from_any_state_as_if_it_had_not_stopped():
    whole = list(evolve(screen, judged, SMALL))
    assert list(evolve(screen, judged, SMALL, whole[2])) == whole[2:]


def test_the_better_of_offspring_and_newcomer_enters():
    """With offspring that are never better nothing but newcomers enter, and the other way round."""
    asked = []

    def only(place):
        def evaluate(formulas):
            values = judged(formulas)
            asked.append(len(formulas))
            return [3 + 0.001 * i if i % 2 == place else value for i, value in enumerate(values)]

        return evaluate

    settings = Settings(generations=1, population=8, parsimony=0.0)
    for place in (0, 1):
        asked.clear()
        start = next(evolve(screen, judged, settings))
        last = list(evolve(screen, only(place), settings, start))[-1]
        assert asked == [8], "four offspring, four newcomers"
        assert sum(member.fitness > 2 for member in last.members) == 4


def test_parsimony_prefers_the_shorter():
    long, short = (list(evolve(screen, judged, replace(SMALL, parsimony=cost)))[-1] for cost in (0.0, 0.05))
    assert np.mean([parse(m.formula).complexity for m in short.members]) < np.mean(
        [parse(m.formula).complexity for m in long.members]
    )


def test_a_file_is_read_as_it_was_written(tmp_path):
    out = tmp_path / "proxy.json"
    made = searched(BENCHES, SMALL, out, 1, silent)
    again = proxy.load(out)
    assert again.formula == made.formula
    document = json.loads(out.read_text())
    assert document["complexity"] == made.formula.complexity
    assert [one["key"] for one in document["search"]["benches"]] == [one.key for one in BENCHES]
    assert len(document["search"]["best"]) == 7
    assert document["search"]["seed"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["proxy.json"], "no state is left"


def test_processes_change_nothing(tmp_path):
    settings = replace(SMALL, generations=2)
    one, two = (searched(BENCHES, settings, tmp_path / f"{workers}.json", workers, silent) for workers in (1, 2))
    assert one == two


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_search_ends_with_the_same_file(tmp_path, monkeypatch, stop):
    whole, out = tmp_path / "whole.json", tmp_path / "proxy.json"
    searched(BENCHES, SMALL, whole, 1, silent)

    def stopping(states, _total, _name):
        for number, state in enumerate(states):
            if number == stop:
                raise KeyboardInterrupt
            yield state

    with pytest.raises(KeyboardInterrupt):
        searched(BENCHES, SMALL, out, 1, stopping)
    assert not out.exists()
    asked = []
    first = fitness.fitness_of
    monkeypatch.setattr(fitness, "fitness_of", lambda *given: asked.append(1) or first(*given))
    searched(BENCHES, SMALL, out, 1, silent)
    assert out.read_bytes() == whole.read_bytes()
    assert len(asked) == (6 - stop) * 12


def test_the_state_of_another_search_does_not_count(tmp_path):
    out = tmp_path / "proxy.json"

    def stopping(states, _total, _name):
        yield next(iter(states))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(BENCHES, replace(SMALL, seed=5), out, 1, stopping)
    assert searched(BENCHES, SMALL, out, 1, silent) == searched(BENCHES, SMALL, tmp_path / "other.json", 1, silent)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    out = tmp_path / "proxy.json"
    with pytest.raises(CompressError, match="bench 0 is given twice"):
        searched([BENCHES[0], BENCHES[1], BENCHES[0]], SMALL, out, 1, silent)
    with pytest.raises(CompressError, match="--population 2"):
        searched(BENCHES, replace(SMALL, population=2), out, 1, silent)
    with pytest.raises(CompressError, match="--generations is 0"):
        searched(BENCHES, replace(SMALL, generations=0), out, 1, silent)
    with pytest.raises(CompressError, match="--workers is 0"):
        searched(BENCHES, SMALL, out, 0, silent)
    with pytest.raises(CompressError, match="its folder does not exist"):
        searched(BENCHES, SMALL, tmp_path / "absent" / "x.json", 1, silent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"formula": "mean(cube(W)) * -b"}', "cube is unknown"),
        ('{"formula": "__import__(1)"}', "no formula"),
        ('{"rule": 1}', "is no proxy"),
        ("[1]", "is no proxy"),
        ("not json", "is no proxy"),
    ],
)
def test_bad_proxy_files_are_refused(tmp_path, text, message):
    path = tmp_path / "proxy.json"
    path.write_text(text)
    with pytest.raises(CompressError, match=message):
        proxy.load(path)
    with pytest.raises(CompressError, match="is no proxy"):
        proxy.load(tmp_path / "absent.json")


def test_the_record_names_what_was_found():
    state = next(evolve(screen, judged, SMALL))
    found = searching.found(state, BENCHES, SMALL)
    assert str(found.formula) == state.best.formula
    assert found.search["benches"][1]["name"] == "bench 1"
    assert Genome("chain", state.best.genome.genes).structure in STRUCTURES
