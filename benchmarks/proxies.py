"""How well proxies rank mixed-precision configurations of models they were not evolved on, and what the plans they choose lose.

    python -m benchmarks.proxies bench                  one bench per model
    python -m benchmarks.proxies transfer --append      evolve with one model left out, and rank its configurations
    python -m benchmarks.proxies plans --append         what plans lose that methods choose at 3.0 and 3.5 bits
    python -m benchmarks.proxies draw                   scores against losses, and fitness by generation
    python -m benchmarks.proxies ship                   evolve on all benches: the proxy that comes along

Each takes --scratch, a folder to keep its work in. Nothing is chosen on the model that is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import record, train_gpt2
from benchmarks.record import Measurement
from benchmarks.search_subjects import LLAMA_SAMPLES, LLAMA_SEQ_LEN, Subject, open_subject, opened
from compress import models
from compress.calib import data
from compress.mixed.library import Library, key
from compress.mixed.limits import Budget
from compress.mixed.measure import Swaps
from compress.mixed.methods import Method, Predict
from compress.mixed.search import Request, search
from compress.progress import silent
from compress.proxies import bench, fitness, proxy
from compress.proxies.bench import Bench
from compress.proxies.evolution import Settings
from compress.proxies.formula import Formula
from compress.proxies.genome import drawn
from compress.proxies.handwritten import HANDWRITTEN
from compress.proxies.measuring import Wanted, measured
from compress.proxies.proxy import Proxy, predicted
from compress.proxies.ranking import RATIOS, Ranking, ranked
from compress.proxies.searching import searched
from compress.proxies.statistics import scores
from compress.spec import LayerSpec, Scheme

NAMES = ("Llama", "GPT-2", "MiniLM", "ResNet", "MobileNetV2")
OPTIONS = tuple(LayerSpec(Scheme(bits, 128)) for bits in (2, 3, 4, 8))
JUDGED = 32  # windows of the GPT-2's text
TOKENS = 2048  # that every configuration is judged on, or 64 images
BUDGETS = (3.0, 3.5)  # average bits, with scales
EVOLVED = "evolved on the other models"
BENCHMARK = "proxies"
FORMULAS = 400  # for the throughput

Scores = dict[tuple[str, str], list[Ranking]]  # by proxy and bench


def subject(name: str, scratch: Path) -> Subject:
    """A model of the search benchmark, or the GPT-2, which is trained where it is not there yet."""
    if name != "GPT-2":
        return open_subject(name, 0, scratch)
    folder = scratch / name
    if not (folder / "config.json").is_file():
        print(f"GPT-2: held-out loss {train_gpt2.train(folder):.3f}", flush=True)
    tokenizer = models.tokenizer(folder)
    drawn_text = data.text(None, tokenizer, samples=LLAMA_SAMPLES + JUDGED, seq_len=LLAMA_SEQ_LEN, seed=0).inputs
    held_out = data.held_out_text(None, tokenizer, seq_len=LLAMA_SEQ_LEN, samples=JUDGED).inputs
    return opened(name, folder, drawn_text, LLAMA_SAMPLES, held_out)


def make_benches(names: Sequence[str], scratch: Path) -> None:
    for name in names:
        one, start = subject(name, scratch), time.perf_counter()
        found = measured(
            one.source, one.settings, name, Wanted(OPTIONS, scratch / "library", tokens=TOKENS), _benches(scratch), silent
        )
        print(f"{name}: {len(found.losses)} configurations, {time.perf_counter() - start:.0f} s", flush=True)


def transfer(names: Sequence[str], scratch: Path, seeds: int, workers: int) -> list[Measurement]:
    """Every proxy's ranking of every bench: of the evolved ones, of the bench that was left out of their evolution."""
    benches = {name: bench.load(_benches(scratch) / f"{name}.parquet") for name in names}
    found: Scores = defaultdict(list)
    seconds, rates = [], []
    for name, one in benches.items():
        for written, table in HANDWRITTEN.items():
            found[written, name].append(_ranking(one.statistics.by_unit(table(one.statistics)), one))
        others = [other for other in benches.values() if other is not one]
        for seed in range(seeds):
            start = time.perf_counter()
            made = _evolved(others, name, scratch, seed, workers)
            seconds.append(time.perf_counter() - start)
            s = one.statistics
            found[EVOLVED, name].append(_ranking(s.by_unit(made.formula.table(s.tensors, s.weights, s.bits)), one))
            print(f"without {name}, seed {seed}: {made.formula}", flush=True)
        rates.append(_throughput(one))
    return [
        *_measurements(found, names),
        Measurement.of("search on four benches", f"{workers} processes", "time", "s", seconds),
        Measurement.of("one proxy on one bench", "one process", "throughput", "proxies/s", rates),
    ]


def plans(names: Sequence[str], scratch: Path, seeds: int) -> Iterator[Measurement]:
    """Held-out losses of the plans that methods choose; those of emq by proxies that were evolved on the other models."""
    for name in names:
        one = subject(name, scratch)
        solved = Library(scratch / "library" / key(one.source.target.stored, one.source.inputs, one.settings))
        held_out = Swaps(one.source.model, one.source.anatomy, one.held_out, solved, one.settings)
        evolved = [proxy.load(_file(scratch, name, seed)) for seed in range(seeds)]
        predictions: dict[Method, list[Predict | None]] = {"kl": [None], "interlayer": [None], "hawq-v2": [None]}
        predictions["emq"] = [partial(predicted, made) for made in evolved]
        for bits, method in itertools.product(BUDGETS, predictions):
            losses = []
            for predict in predictions[method]:
                request = Request(Budget(avg_bits=bits), OPTIONS, scratch / "library", scratch / "plan", method, predict)
                found = search(one.source, one.settings, request, silent)
                losses.append(held_out.loss(found.plan.layers))
            print(f"{name} at {bits} bits by {method}: {losses}", flush=True)
            yield Measurement.of(f"plan by {method}", f"{name}, {bits} bits", "held-out KL to dense", "nats", losses)


def ship(names: Sequence[str], scratch: Path, seed: int, workers: int) -> None:
    """Write the proxy that comes along."""
    benches = [bench.load(_benches(scratch) / f"{name}.parquet") for name in names]
    made = searched(benches, Settings(seed=seed), scratch / "emq.json", workers, silent)
    made.save(proxy.DEFAULT)
    print(f"{made.formula}: {made.search['fitness']}", flush=True)


def draw(names: Sequence[str], scratch: Path, seeds: int, picture: Path) -> None:
    """Scores against measured losses on benches that were left out, and fitness by generation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for at, name in zip(axes, names, strict=False):
        one, made = bench.load(_benches(scratch) / f"{name}.parquet"), proxy.load(_file(scratch, name, 0))
        ranks = np.argsort(np.argsort(_scores(made.formula, one)))
        marks = at.scatter(ranks, one.losses, c=one.average_bits, s=8)
        at.set(title=f"{name}, left out", xlabel="rank by the proxy", ylabel="measured loss", yscale="log")
        figure.colorbar(marks, ax=at, label="average bits")
    for name, seed in itertools.product(names, range(seeds)):
        search_record = proxy.load(_file(scratch, name, seed)).search
        axes[-1].plot(search_record["best"], label=f"without {name}" if seed == 0 else None, color=f"C{names.index(name)}")
        axes[-1].plot(search_record["median"], color=f"C{names.index(name)}", alpha=0.3)
    axes[-1].set(title="evolution: best, and median (pale)", xlabel="generation", ylabel="fitness less complexity", ylim=(0, 1))
    axes[-1].legend(fontsize=7)
    figure.savefig(picture, dpi=110)


def _evolved(others: Sequence[Bench], left_out: str, scratch: Path, seed: int, workers: int) -> Proxy:
    file = _file(scratch, left_out, seed)
    return searched(others, Settings(seed=seed), file, workers, silent)


def _file(scratch: Path, left_out: str, seed: int) -> Path:
    folder = scratch / "evolved"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"without {left_out}, {seed}.json"


def _benches(scratch: Path) -> Path:
    return scratch / "benches"


def _scores(formula: Formula, one: Bench) -> np.ndarray:
    found = fitness.scored(formula, one)
    assert found is not None
    return found


def _ranking(table: np.ndarray, one: Bench) -> Ranking:
    """A proxy that is not finite on a bench ranks nothing there."""
    found = scores(table, one.choices)
    return ranked(np.where(np.isfinite(found), found, 0.0), one.losses, one.bands)


def _throughput(one: Bench) -> float:
    """Formulas as they are drawn, but those that are screened out, per second of one core."""
    random, screen = np.random.default_rng(0), [fitness.reduced(one)]
    made = (drawn(random).formula() for _ in itertools.count())
    valid = list(itertools.islice((formula for formula in made if formula and fitness.promising(formula, screen)), FORMULAS))
    start = time.process_time()
    for formula in valid:
        fitness.fitness_of(formula, [one])
    return len(valid) / (time.process_time() - start)


def _metrics(made: Ranking) -> dict[str, float]:
    return {
        **{f"Spearman, first {ratio:.0%}": value for ratio, value in zip(RATIOS, made.spearman, strict=True)},
        **{f"Kendall, first {ratio:.0%}": value for ratio, value in zip(RATIOS, made.kendall, strict=True)},
        "Spearman within size bands": made.within,
        "Kendall within size bands": made.within_kendall,
    }


def _measurements(found: Scores, names: Sequence[str]) -> Iterator[Measurement]:
    """By proxy and bench, and the means over benches."""
    for written in dict.fromkeys(written for written, _ in found):
        for metric in _metrics(found[written, names[0]][0]):
            by_bench = {name: [_metrics(made)[metric] for made in found[written, name]] for name in names}
            for name, values in by_bench.items():
                yield Measurement.of(written, name, metric, "", values)
            yield Measurement.of(
                written, "mean", metric, "", [statistics.mean(one) for one in zip(*by_bench.values(), strict=True)]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bench", "transfer", "plans", "ship", "draw"])
    parser.add_argument("--scratch", type=Path, default=Path("proxies-benchmark"))
    parser.add_argument("--names", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    found: list[Measurement] = []
    if args.what == "bench":
        make_benches(args.names, args.scratch)
    elif args.what == "transfer":
        found = transfer(args.names, args.scratch, args.seeds, args.workers)
    elif args.what == "plans":
        found = list(plans(args.names, args.scratch, args.seeds))
    elif args.what == "ship":
        ship(args.names, args.scratch, 0, args.workers)
    else:
        draw(args.names, args.scratch, args.seeds, args.picture)
    for one in found:
        if "Spearman" in one.metric or not one.metric.startswith("Kendall"):
            print(f"{one.subject:30} {one.setting:24} {one.metric:28} {one.value:.3f} +- {one.spread / 2:.3f}")
    if args.append:
        record.append(BENCHMARK, found)


if __name__ == "__main__":
    main()
