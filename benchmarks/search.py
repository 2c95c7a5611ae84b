"""What plans of every search method lose on data that no search saw, beside uniform plans of the same size.

    python -m benchmarks.search Llama ResNet MobileNetV2 MiniLM --work FOLDER [--append]
    python -m benchmarks.search --compare [--append]           # across models, from the rows of the above

Solved layers, tables and measurements of random plans are kept in FOLDER, where an interrupted run finds them again. The digits
need scikit-learn. All methods see the same samples; only the held-out loss is reported.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy import stats

from benchmarks import record
from benchmarks.record import Measurement, Row
from benchmarks.search_bounds import SMALLEST, interpolated, real_bits, water_filled
from benchmarks.search_subjects import LLAMA_SAMPLES, LLAMA_SEQ_LEN, Subject, open_subject
from compress import api
from compress.mixed import choose, library, methods
from compress.mixed.budget import Cost, costs
from compress.mixed.choose import Measured, Model
from compress.mixed.library import Library
from compress.mixed.limits import Budget
from compress.mixed.measure import Swaps
from compress.mixed.methods import METHODS, SWAPPED, Method
from compress.mixed.search import TABLE_TOKENS
from compress.mixed.units import space
from compress.progress import silent
from compress.spec import BITS, LayerSpec, Scheme

SUBJECTS = ("Llama", "ResNet", "MobileNetV2", "MiniLM")
BUDGETS = (2.5, 3.0, 3.5, 4.0)
GROUPS = (128, 32)
GENERATIONS = 10
REFINED = f"kl, {GENERATIONS} generations"
UNIFORM = "uniform, interpolated"
ORACLE = "kl on the held-out data"
REAL = "real numbers of bits, predicted"
OTHER = " or "  # in the settings of other options
LOSS, PART, SIZE, TIME, PASSES = "held-out loss", "held-out loss / interpolated", "weight files", "search time", "forward passes"
FEWER = 8  # of the samples --few see one in so many: a step of hawq-v1 is a backward pass for every layer
FEW = f"kl on one sample in {FEWER}"
SCALED = {f"output, scaled by {kl}": kl for kl in ("kl", FEW)}  # what a quicker kl would come to
BOUND = "loss left by the best real numbers of bits"
ALL_METHODS = (*METHODS, FEW, *SCALED)
BANDS, PER_BAND, LOWEST, HIGHEST = 10, 20, 2.25, 5.25  # random plans, by average bits
MEGABYTE = 1e6

Found = dict[tuple[str, str, str, str], list[float]]  # by subject, setting, metric and unit: one value per seed


def options(groups: Sequence[int]) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(Scheme(bits, group)) for bits, group in product(BITS, groups))


@dataclass(frozen=True)
class Predicted:
    """What a method makes of a model, and what that took: seconds, and passes of the samples it looks at."""

    model: Model
    seconds: float
    passes: float


class Bench:
    """A subject with its solved layers, which the search judges on `judged` and this benchmark on `held_out`."""

    def __init__(self, subject: Subject, groups: Sequence[int], args: argparse.Namespace, seed: int) -> None:
        self.subject, self.seed, self.few, source = subject, seed, args.few, subject.source
        self.space = space(source.anatomy, options(groups))
        name = library.key(source.target.stored, source.inputs, subject.settings)
        self.solved, self.notes = Library(args.work / "library" / name), args.work / "notes" / name
        self.notes.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        for _ in library.fill(self.solved, source.model, source.anatomy, source.inputs, self.space.wanted, subject.settings):
            pass
        print(f"{subject.name}: {len(self.space.units)} units, solved in {time.perf_counter() - start:.0f} s", flush=True)
        shared = source.model, source.anatomy
        self.judged = Swaps(*shared, source.judged, self.solved, subject.settings)
        self.held_out = Swaps(*shared, subject.held_out, self.solved, subject.settings)
        self.samples = max(1, TABLE_TOKENS // self.judged.tokens)
        self.share = max(1.0, sum(self.judged.samples) / self.samples)  # passes of the table's samples in one of all
        self.weights = [unit.weights for unit in self.space.units]
        self.size, self.average = self.currencies(BUDGETS[0])

    def currencies(self, bits: float) -> tuple[Cost, ...]:
        return costs(self.space, Budget(avg_bits=bits), self.subject.source.target, None)

    def lost(self, chosen: Sequence[int]) -> tuple[float, float]:
        """A plan's held-out loss, and its quality as its subject defines it; measured once and then read from the notes."""

        def look() -> list[float]:
            loss = self.held_out.loss(self.space.specs(chosen))
            return [loss, self.subject.quality[1](self.held_out.model) if self.subject.quality else 0.0]

        loss, quality = self.remembered(f"plan {''.join(map(str, chosen))}", look)
        return loss, quality

    def remembered(self, what: str, make: Callable[[], Any]) -> Any:
        """What was made before, from its file."""
        path = self.notes / f"{what}, {', '.join(map(str, self.space.options[0]))}.json"
        if not path.is_file():
            made = make()
            path.write_text(json.dumps(made), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def predicted(self, method: str) -> Predicted:
        """The method's table, made once and then read from the notes."""
        if method in SCALED:
            return self._scaled(SCALED[method])
        kept = self.remembered(method, lambda: self._table(method))
        if method != "interlayer":
            return Predicted(Model(kept["losses"]), kept["seconds"], kept["passes"])
        kl, pairs = self.predicted("kl"), {(i, j): beyond for i, j, beyond in kept["pairs"]}
        model = choose.interacting(kl.model.losses, pairs)
        return Predicted(model, kept["seconds"] + kl.seconds, kept["passes"] + kl.passes)

    def refined(self, chosen: Sequence[int], limit: Cost) -> dict[str, Any]:
        """A choice after an evolution on the measured loss, and what that took."""

        def evolve() -> dict[str, Any]:
            start, before = time.perf_counter(), self.judged.forwards
            measured = Measured(lambda: self.judged, self.space)
            better = choose.refined(chosen, [limit], measured, GENERATIONS, self.seed, silent)
            passes = (self.judged.forwards - before) * self.share
            return {"choice": better, "seconds": time.perf_counter() - start, "passes": passes}

        found: dict[str, Any] = self.remembered(f"refined {''.join(map(str, chosen))}", evolve)
        return found

    def _scaled(self, by: str) -> Predicted:
        """The table of output, every row scaled to what is measured of its worst option."""
        output, kl = self.predicted("output"), self.predicted(by)
        pairs = [(row, row.index(max(row)), true) for row, true in zip(output.model.losses, kl.model.losses, strict=True)]
        table = [[loss * true[worst] / max(row[worst], SMALLEST) for loss in row] for row, worst, true in pairs]
        part = len(BITS)  # of kl's measurements one in so many is needed
        return Predicted(Model(table), output.seconds + kl.seconds / part, output.passes + kl.passes / part)

    def _table(self, method: str) -> dict[str, Any]:
        every = min(self.samples, sum(self.judged.samples))
        taken = every // FEWER if method in (FEW, *self.few) else every
        if method in (*SWAPPED, FEW):
            before, start = self.judged.forwards, time.perf_counter()
            if method == "interlayer":
                table = [list(row) for row in self.predicted("kl").model.losses]
                before, start = self.judged.forwards, time.perf_counter()
                pairs = methods.interactions(self.judged, self.space, table, taken, silent)
                found: dict[str, Any] = {"pairs": [[i, j, beyond] for (i, j), beyond in pairs.items()]}
            else:
                found = {"losses": methods.swapped(self.judged, self.space, taken, silent)}
            passes = (self.judged.forwards - before) * self.share
            return found | {"seconds": time.perf_counter() - start, "passes": passes}
        source = self.subject.source
        few = {name: tensor[:taken] for name, tensor in source.judged.items()}
        counted = copy.deepcopy(source.model)
        run: list[int] = []
        counted.register_forward_pre_hook(
            lambda _module, args, kwargs: run.append(len([*args, *kwargs.values()][0])), with_kwargs=True
        )
        given = methods.Subject(counted, source.anatomy, self.space, self.solved, few, self.subject.settings, None, self.seed)
        start = time.perf_counter()
        table, _ = methods.derived(cast("Method", method), given)
        return {"losses": table, "seconds": time.perf_counter() - start, "passes": sum(run) / every}


def budgets(bench: Bench, names: Sequence[str], refine: Sequence[float], suffix: str, found: Found) -> None:
    """Held-out loss, file size and cost of every method's plan at every budget, and of uniform plans."""
    name = f"{bench.subject.name}{suffix}"
    hull = [_uniform(bench, index, found) for index in range(len(bench.space.options[0]))]
    measured = Measured(lambda: bench.judged, bench.space)
    for method in names:
        made = bench.predicted(method)
        found[method, name, TIME, "s"].append(made.seconds)
        found[method, name, PASSES, ""].append(made.passes)
        for bits in BUDGETS:
            currencies, setting = bench.currencies(bits), f"{name}, {bits} bits"
            chosen = choose.choose(made.model, currencies, Budget(avg_bits=bits), measured)
            note(bench, method, setting, chosen, hull, found)
            if method == "kl" and bits in refine:
                better = bench.refined(chosen, currencies[1])
                note(bench, REFINED, setting, better["choice"], hull, found)
                found[REFINED, name, TIME, "s"].append(made.seconds + better["seconds"])
                found[REFINED, name, PASSES, ""].append(made.passes + better["passes"])


def _uniform(bench: Bench, index: int, found: Found) -> tuple[float, float]:
    """Size and held-out loss of the plan that gives every unit the same option."""
    chosen = [index] * len(bench.space.units)
    size, (loss, quality) = bench.size.of(chosen) / MEGABYTE, bench.lost(chosen)
    subject = f"uniform {bench.space.options[0][index]}"
    found[subject, bench.subject.name, f"uniform plan's {LOSS}", ""].append(loss)
    found[subject, bench.subject.name, SIZE, "MB"].append(size)
    shown = _quality(bench, subject, bench.subject.name, quality, found)
    print(f"{bench.subject.name:28} {subject:24} {size:.4f} MB  loss {loss:.5f}{shown}", flush=True)
    return size, loss


def note(
    bench: Bench, subject: str, setting: str, chosen: Sequence[int], hull: Sequence[tuple[float, float]], found: Found
) -> None:
    """Size and held-out loss of a plan, beside a mix of uniform plans of that size."""
    size, (loss, quality) = bench.size.of(chosen) / MEGABYTE, bench.lost(chosen)
    between = interpolated(hull, size)
    if subject == "kl":
        found[UNIFORM, setting, LOSS, ""].append(between)
    found[subject, setting, LOSS, ""].append(loss)
    found[subject, setting, PART, ""].append(loss / between)
    found[subject, setting, SIZE, "MB"].append(size)
    shown = f"{setting:28} {subject:24} {size:.4f} MB  loss {loss:.5f} = {loss / between:.3f}"
    print(f"{shown}{_quality(bench, subject, setting, quality, found)}", flush=True)


def _quality(bench: Bench, subject: str, setting: str, value: float, found: Found) -> str:
    """Note what a user would look at."""
    if bench.subject.quality is None:
        return ""
    found[subject, setting, bench.subject.quality[0], ""].append(value)
    return f"  {bench.subject.quality[0]} {value:.4f}"


def ranks(bench: Bench, names: Sequence[str], found: Found) -> None:
    """Rank correlation of every method's predictions with the loss of random plans, over all and at about equal size."""
    plans = list(random_plans(bench))
    losses = np.array([bench.lost(chosen)[0] for chosen in plans])
    for method in names:
        model = bench.predicted(method).model
        predicted = np.array([model.predict(chosen) for chosen in plans])
        of_bands = [stats.spearmanr(*part).statistic for part in zip(_bands(predicted), _bands(losses), strict=True)]
        numbers = {
            "Spearman": stats.spearmanr(predicted, losses).statistic,
            "Kendall": stats.kendalltau(predicted, losses).statistic,
            "Spearman at equal size": float(np.mean(of_bands)),
        }
        print(f"{bench.subject.name} {method}: {numbers}", flush=True)
        for metric, value in numbers.items():
            found[method, f"{bench.subject.name}, {metric}", "rank correlation", ""].append(value)


def _bands(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, BANDS)


def random_plans(bench: Bench) -> Iterator[list[int]]:
    """As many plans in each band of average bits, band by band."""
    draw = np.random.default_rng(bench.seed)
    edges = np.linspace(LOWEST, HIGHEST, BANDS + 1)
    for low, high in pairwise(edges):
        count = 0
        while count < PER_BAND:
            chances = draw.dirichlet(np.ones(len(bench.space.options[0])))
            chosen = draw.choice(len(chances), size=len(bench.space.units), p=chances).tolist()
            if low <= bench.average.of(chosen) / sum(bench.weights) < high:
                count += 1
                yield chosen


def oracle(bench: Bench, found: Found) -> None:
    """The best choices where losses add up: by single units measured on the held-out data itself, which no search may see."""
    every = sum(bench.held_out.samples)
    table = bench.remembered("held out", lambda: methods.swapped(bench.held_out, bench.space, every, silent))
    hull = [_uniform(bench, index, found) for index in range(len(bench.space.options[0]))]
    for bits in BUDGETS:
        held_out = Measured(lambda: bench.held_out, bench.space)
        chosen = choose.choose(Model(table), bench.currencies(bits), Budget(avg_bits=bits), held_out)
        setting = f"{bench.subject.name}, {bits} bits"
        note(bench, ORACLE, setting, chosen, hull, found)
        scales = bench.average.of([0] * len(bench.weights)) / sum(bench.weights) - BITS[0]
        part = real_bits(table, bench.weights, bits - scales) / interpolated(hull, bench.size.of(chosen) / MEGABYTE)
        found[REAL, setting, PART, ""].append(part)
        print(f"{setting:28} {REAL:24} {part:.3f}", flush=True)


def measure(name: str, args: argparse.Namespace) -> Found:
    found: Found = defaultdict(list)
    for seed in range(args.seeds):
        bench = Bench(open_subject(name, seed, args.work), GROUPS[:1], args, seed)
        budgets(bench, args.methods, args.refine if seed == 0 else (), "", found)
        for index, option in enumerate(bench.space.options[0]):
            column = [row[index] for row in bench.predicted("kl").model.losses]
            found[name, str(option), BOUND, ""].append(water_filled(column, bench.weights))
        if args.oracle and seed == 0:
            oracle(bench, found)
        if args.ranks and seed == 0:
            ranks(bench, args.methods, found)
        if args.groups:
            budgets(
                Bench(bench.subject, GROUPS, args, seed),
                ["kl", "output"],
                (),
                f", {OTHER.join(f'g{group}' for group in GROUPS)}",
                found,
            )
    return found


def compare(rows: Sequence[Row]) -> list[Measurement]:
    """Every method beside the best that was measured for each model and budget, and interlayer beside hawq-v2."""
    newest = [row for row in record.latest(rows) if row.benchmark == "search" and row.metric == LOSS]
    losses = {(row.setting, row.subject): float(row.value) for row in newest if OTHER not in row.setting}
    settings = [setting for setting in dict.fromkeys(setting for setting, _ in losses) if (setting, "hawq-v2") in losses]
    best = {at: min(losses[at, method] for method in METHODS if (at, method) in losses) for at in settings}
    over = {method: [losses[at, method] / best[at] for at in settings if (at, method) in losses] for method in ALL_METHODS}
    over["interlayer / hawq-v2"] = ratios = [losses[at, "interlayer"] / losses[at, "hawq-v2"] for at in settings]
    everything = f"{len(settings)} pairs of model and budget"
    found = []
    for subject, values in over.items():
        if values:
            found.append(Measurement(subject, everything, "geometric mean", _geometric(values), ""))
            found.append(Measurement(subject, everything, "largest", max(values), ""))
            found.append(Measurement(subject, everything, "pairs", len(values), ""))
    lower, equal = sum(ratio < 1 for ratio in ratios), sum(ratio == 1 for ratio in ratios)
    found.append(Measurement("interlayer / hawq-v2", everything, "lower in", lower, ""))
    return [*found, Measurement("interlayer / hawq-v2", everything, "equal in", equal, "")]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def written(work: Path) -> list[Measurement]:
    """The size of the files that `compress quantize` writes for a plan, by what `compress search` said."""
    shared: dict[str, Any] = dict(samples=LLAMA_SAMPLES, seq_len=LLAMA_SEQ_LEN)
    off = []
    for bits in BUDGETS:
        plan = work / "plan.json"
        found = api.search(out=plan, avg_bits=bits, method="output", library=work / "library", **shared)
        api.quantize(plan=plan, out=work / "written", overwrite=True, **shared)
        size = sum(file.stat().st_size for file in (work / "written").glob("*.safetensors"))
        off.append(abs(size / found.point.size - 1))
        print(f"{bits} bits: {found.point.size} predicted, {size} bytes in files", flush=True)
    return [Measurement.of("Llama", "2.5 to 4 bits", "file size off by at most", "%", [100 * max(off)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SUBJECTS))
    parser.add_argument("--work", type=Path, default=Path("search-benchmark"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=ALL_METHODS, default=list(ALL_METHODS))
    parser.add_argument("--few", nargs="*", choices=METHODS, default=["hawq-v1"], help="these see a part of the samples")
    parser.add_argument("--refine", nargs="*", type=float, default=[], metavar="BITS", help="also refine plans of these budgets")
    parser.add_argument("--ranks", action="store_true", help="also random plans")
    parser.add_argument("--oracle", action="store_true", help="also choose by the held-out data")
    parser.add_argument("--groups", action="store_true", help="also with group sizes to choose from")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--written", action="store_true")
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        found = measure(name, args)
        if args.append:
            record.append("search", [Measurement.of(*key, values) for key, values in found.items()])
    for benchmark, measured in (
        ("search compared", compare(record.read()) if args.compare else []),
        ("search files", written(args.work) if args.written else []),
    ):
        for one in measured:
            print(one)
        if args.append:
            record.append(benchmark, measured)


if __name__ == "__main__":
    main()
