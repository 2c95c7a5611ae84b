"""From a model to its bench: options solved, configurations drawn and measured one by one, statistics gathered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.mixed import library
from compress.mixed.library import Library
from compress.mixed.measure import Swaps
from compress.mixed.methods import Subject
from compress.mixed.search import TABLE_TOKENS, Source
from compress.mixed.units import Space, space
from compress.progress import Track
from compress.proxies import bench
from compress.proxies.bench import SUFFIX, Bench
from compress.proxies.gathering import bits_of, gather
from compress.proxies.passes import taken
from compress.proxies.sampling import stratified
from compress.sequential import Settings
from compress.spec import LayerSpec


@dataclass(frozen=True)
class Wanted:
    """How many configurations of which options, in how many bands of size, judged on how many tokens; where solved layers are
    kept, and the seed.
    """

    options: tuple[LayerSpec, ...]
    library: Path
    configurations: int = 200
    bands: int = 10
    tokens: int = TABLE_TOKENS
    seed: int = 0


def measured(source: Source, settings: Settings, name: str, wanted: Wanted, folder: Path, track: Track) -> Bench:
    """The bench of a model in `folder`: read where it is there, else measured and written.

    Every configuration is judged by the KL of its predictions to the dense model's (`Swaps.loss`) on samples that no layer was
    solved with. Losses are noted one by one in a journal beside the bench, from which a run that was
    interrupted goes on. Raises where the folder has the bench of another model, other options or another version.
    """
    key = library.key(source.target.stored, source.inputs, settings)
    path = folder / f"{name}{SUFFIX}"
    if path.is_file():
        return _known(path, key, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    choices = space(source.anatomy, wanted.options)
    solved = Library(wanted.library / key)
    steps = library.fill(solved, source.model, source.anatomy, source.inputs, choices.wanted, settings)
    for _ in track(steps, len(source.anatomy.blocks), "solving options"):
        pass
    costs, weights = _bits(choices)
    drawn, bands = stratified(costs, wanted.bands, wanted.configurations // wanted.bands, np.random.default_rng(wanted.seed))
    judged = taken(source.judged, wanted.tokens)
    swaps = Swaps(source.model, source.anatomy, judged, solved, settings)
    losses = _losses(swaps, choices, drawn, folder / f".{name}.journal", key, track)
    few = {label: tensor[: len(next(iter(judged.values())))] for label, tensor in source.inputs.items()}
    subject = Subject(source.model, source.anatomy, choices, solved, few, settings, source.mask_token, wanted.seed)
    found = Bench(
        name=name,
        key=key,
        units=tuple(unit.name for unit in choices.units),
        options=tuple(str(option) for option in wanted.options),
        choices=drawn,
        bands=bands,
        average_bits=costs[np.arange(len(costs)), drawn].sum(1) / weights,
        losses=np.array(losses),
        statistics=gather(subject, totals=True, track=track),
        about={"seed": wanted.seed, "judged": len(next(iter(judged.values()))), "loss": "KL to the dense model, nats"},
    )
    found.check()
    bench.save(found, path)
    (folder / f".{name}.journal").unlink(missing_ok=True)
    return found


def _known(path: Path, key: str, wanted: Wanted) -> Bench:
    found = bench.load(path)
    options = tuple(str(option) for option in wanted.options)
    if found.key != key:
        raise CompressError(
            f"{path} is the bench of another model, or of other calibration data or settings: its hash is {found.key}, and not "
            f"{key}. Choose another -o."
        )
    if (found.options, len(found.losses), found.about["seed"]) != (options, wanted.configurations, wanted.seed):
        raise CompressError(
            f"{path} has {len(found.losses)} configurations of {', '.join(found.options)} by seed {found.about['seed']}; "
            f"wanted are {wanted.configurations} of {', '.join(options)} by seed {wanted.seed}. Choose another -o."
        )
    return found


def _bits(choices: Space) -> tuple[np.ndarray, int]:
    """Bits of every unit's options without scales, and the number of all weights."""
    bits = np.array([[bits_of(option) for option in options] for options in choices.options])
    weights = np.array([unit.weights for unit in choices.units])
    return bits * weights[:, None], int(weights.sum())


def _losses(swaps: Swaps, choices: Space, drawn: np.ndarray, journal: Path, key: str, track: Track) -> list[float]:
    """Every configuration's loss, from the journal as far as that goes."""
    title = hashlib.sha256(f"{key} {drawn.tolist()} {swaps.samples}".encode()).hexdigest()[:24]
    known = _read(journal, title)
    with journal.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in (title, *known))
        for number, choice in enumerate(track(drawn.tolist(), len(drawn), "measuring configurations")):
            if number >= len(known):
                known.append(swaps.loss(choices.specs(choice)))
                stream.write(json.dumps(known[-1]) + "\n")
                stream.flush()
    return known


def _read(journal: Path, title: str) -> list[float]:
    """The losses that a run with the same title noted; a line that was cut off does not count."""
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1]
    return [float(json.loads(line)) for line in lines[1:]] if lines and json.loads(lines[0]) == title else []
