"""The whole search for a proxy on one page: benches in, a proxy file out, with a state beside it to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.progress import Track
from compress.proxies import fitness
from compress.proxies.bench import Bench
from compress.proxies.evolution import Member, Settings, State, evolve
from compress.proxies.formula import Formula, parse
from compress.proxies.genome import Genome
from compress.proxies.proxy import DIGITS, Proxy
from compress.proxies.ranking import RATIOS, ranked

LEAST_POPULATION = 4


def searched(benches: Sequence[Bench], settings: Settings, out: Path, workers: int, track: Track) -> Proxy:
    """Evolve a proxy on benches and write it to `out`.

    After every generation the population is kept beside it, from which a search of the same benches and settings goes on, to
    the same result. Raises for settings that make no sense, and for a bench that is given twice.
    """
    _check(benches, settings, out, workers)
    kept = out.with_name(f".{out.name}.state")
    title = _title(benches, settings)
    screen = partial(fitness.promising, screen=[fitness.reduced(bench) for bench in benches])
    with fitness.evaluator(benches, workers) as evaluate:
        states = evolve(screen, evaluate, settings, _read(kept, title))
        last: State | None = None
        for state in track(_kept(states, kept, title), settings.generations + 1, "evolving"):
            last = state
    assert last is not None
    proxy = found(last, benches, settings)
    proxy.save(out)
    kept.unlink(missing_ok=True)
    return proxy


def found(state: State, benches: Sequence[Bench], settings: Settings) -> Proxy:
    """The best formula of a population, with the record of its search."""
    formula = parse(state.best.formula)
    return Proxy(
        formula,
        {
            **asdict(settings),
            "fitness": _short(state.best.fitness),
            "benches": [correlations(formula, bench) for bench in benches],
            "evaluated": state.evaluated,
            "drawn": state.drawn,
            "best": [_short(best) for best, _ in state.history],
            "median": [_short(median) for _, median in state.history],
            "others": [{"formula": one.formula, "fitness": _short(one.fitness)} for one in state.members[1:6]],
        },
    )


def correlations(formula: Formula, bench: Bench) -> dict[str, Any]:
    """How well a formula ranks a bench, which is named by its key."""
    scores = fitness.scored(formula, bench)
    assert scores is not None
    made = ranked(scores, bench.losses, bench.bands)
    at = {f"spearman at {ratio:.0%}": _short(value) for ratio, value in zip(RATIOS, made.spearman, strict=True)}
    return {"name": bench.name, "key": bench.key, **at, "within bands": _short(made.within)}


def _check(benches: Sequence[Bench], settings: Settings, out: Path, workers: int) -> None:
    keys = [bench.key for bench in benches]
    for bench in benches:
        if keys.count(bench.key) > 1:
            raise CompressError(f"The bench of {bench.name} is given twice; give every model once.")
    if settings.generations < 1 or settings.population < LEAST_POPULATION:
        raise CompressError(
            f"--generations is {settings.generations} and --population {settings.population}; at least 1 and {LEAST_POPULATION}."
        )
    if workers < 1:
        raise CompressError(f"--workers is {workers}; use 1 or more.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise CompressError(f"-o {out} cannot be written: {'it is a folder' if out.is_dir() else 'its folder does not exist'}.")


def _title(benches: Sequence[Bench], settings: Settings) -> str:
    """Of everything a search depends on."""
    parts = [[bench.key, bench.choices.tolist(), bench.losses.tolist()] for bench in benches]
    return hashlib.sha256(json.dumps([parts, asdict(settings)]).encode()).hexdigest()[:24]


def _kept(states: Iterator[State], path: Path, title: str) -> Iterator[State]:
    for state in states:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps({"title": title, "state": asdict(state)}), encoding="utf-8")
        temporary.rename(path)
        yield state


def _read(path: Path, title: str) -> State | None:
    """The state of the same search, where one was interrupted."""
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    return _state(document["state"]) if document["title"] == title else None


def _state(plain: dict[str, Any]) -> State:
    members = tuple(
        Member(Genome(one["genome"]["structure"], tuple(one["genome"]["genes"])), one["formula"], one["fitness"], one["value"])
        for one in plain["members"]
    )
    history = tuple((best, median) for best, median in plain["history"])
    return State(members, plain["generation"], history, plain["evaluated"], plain["drawn"])


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
