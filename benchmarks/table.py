"""The tables of the two READMEs, made from the latest rows of results.csv: what is claimed, and beside this script the details.

python -m benchmarks.table            writes them between the READMEs' markers
python -m benchmarks.table --check    says whether they are there as they should be
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ALL, ROOT, Row, latest, read

README = ROOT / "README.md"
DETAILS = ROOT / "benchmarks" / "README.md"
SERVED = ("single-token decode", "decode speed / bfloat16's", "anonymous memory while serving / file size")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Table:
    """One benchmark: which field of its rows makes the lines, which one the columns; `says` is printed above.

    `metrics` and `subjects` are the ones to show, all where there are none; `units` says whether numbers carry theirs, and
    `average` what a number is of its runs. What is a `detail` stands with the benchmarks.
    """

    benchmark: str
    says: str
    lines: str = "metric"
    columns: str = "subject"
    metrics: tuple[str, ...] = ()
    units: bool = True
    average: str = "Median"
    subjects: tuple[str, ...] = ()
    detail: bool = False

    def shows(self, row: Row) -> bool:
        asked = (not self.metrics or row.metric in self.metrics) and (not self.subjects or row.subject in self.subjects)
        return row.benchmark == self.benchmark and asked


TABLES = (
    Table(
        "efforts",
        "**Quality.** By how much the loss on held-out text grows, in nats per token, when the linear layers of three small "
        "models are quantized: the Llama that comes along, and an OPT and a Qwen3 trained on the same text. Symmetric, a scale "
        "per 128 or 32 weights, calibrated on the same 128 x 256 tokens by all.",
        "setting",
        "subject",
        ("held-out loss increase",),
        units=False,
        average="Mean",
    ),
    Table(
        "efforts",
        "KL divergence of the same models' predictions from the dense model's, on the same text, in nats per token.",
        "setting",
        "subject",
        ("held-out KL to dense",),
        units=False,
        average="Mean",
        detail=True,
    ),
    Table(
        "efforts",
        "One increase in loss over another; the ranges are those of the draws' own ratios.",
        "setting",
        "subject",
        ("loss increase / another's",),
        average="Ratio of means",
        detail=True,
    ),
    Table(
        "efforts",
        "The same of the KL divergences, which are steadier.",
        "setting",
        "subject",
        ("KL / another's",),
        average="Ratio of means",
        detail=True,
    ),
    Table(
        "efforts",
        "Seconds from loading a model to its quantized copy on disk, imports not counted.",
        "setting",
        "subject",
        ("wall time",),
        units=False,
        average="Least",
    ),
    Table(
        "efforts",
        "The same seconds, one method's over another's.",
        "setting",
        "subject",
        ("time / another's",),
        average="Ratio of the least",
        detail=True,
    ),
    Table(
        "efforts",
        "Peak anonymous memory of such a process, which imports its libraries and quantizes the model three times, in MiB.",
        "setting",
        "subject",
        ("peak anonymous memory",),
        units=False,
        average="Mean",
    ),
    Table(
        "parts",
        "What every part of an effort is worth: KL divergence over the default's on training documents kept from calibration. "
        "*Residual stream not brought along* corrects layers for the drift of their inputs alone, *target not corrected* not "
        "at all. *Products in float32* are those of linear layers in the passes, by default in bfloat16.",
        "subject",
        "setting",
        ("KL / default's",),
        average="Ratio of means",
        detail=True,
    ),
    Table(
        "parts",
        "Processor time of the same, for solving at 4, 3 and 2 bits together.",
        "subject",
        "setting",
        ("processor time",),
        average="Mean",
        detail=True,
    ),
    Table(
        "parts",
        "And by how much the process grew meanwhile, with three solved copies of the model in it.",
        "subject",
        "setting",
        ("growth while solving",),
        average="Mean",
        detail=True,
    ),
    Table(
        "rotation",
        "What `--rotate` does at effort default to the Llama as it was trained, and with outliers planted in it: KL divergence "
        "from the dense model, in nats per token.",
        "subject",
        "setting",
        ("KL to dense",),
        units=False,
        detail=True,
    ),
    Table(
        "pruning",
        "**Pruning.** Perplexity on held-out text of the same Llama with half or more of its linear weights zero, one shot. "
        "Calibrated on 128 x 256 tokens of built-in text, the same for both sides. *compress default* is `compress prune` as it "
        "comes, ALPS that also makes up for what was pruned before a layer; the other rows are without that (`--effort fast`).",
        "subject",
        "setting",
        ("held-out perplexity",),
    ),
    Table(
        "pruning",
        "KL divergence of the pruned models' predictions from the dense model's, in nats per token.",
        "subject",
        "setting",
        ("held-out KL to dense",),
        units=False,
        detail=True,
    ),
    Table(
        "classifier",
        "**Pruning on the loss.** Accuracy on held-out text of a small BERT that tells packages of the standard library apart, "
        "after layer-wise pruning and after pruning on its loss, re-estimated in 1, 4 or 16 steps, all from the same samples.",
        "subject",
        "setting",
        ("held-out accuracy",),
    ),
    Table(
        "classifier",
        "KL divergence of the same classifiers' predictions from the dense one's, in nats per example.",
        "subject",
        "setting",
        ("held-out KL to dense",),
        units=False,
        detail=True,
    ),
    Table(
        "search",
        "**Choosing bits.** What plans lose on data that no search saw, as a part of what the best mix of two uniform plans of "
        "that size loses: 0.6 means that 40 % are recovered. To choose from are 2, 3, 4 and 8 bits with a scale per 128 weights, "
        "and where it says so also per 32. Four models: the Llama, two CNNs on handwritten digits, and MiniLM.",
        "setting",
        "subject",
        ("held-out loss / interpolated",),
        subjects=("kl", "interlayer", "output", "fisher", "hawq-v2", "hawq-v1"),
    ),
    Table(
        "search",
        "What plans at equal average bits lose on data that no search saw: KL divergence from the dense model "
        "in nats per token of the Llama and per image of the CNNs, on handwritten digits; of MiniLM the squared change "
        "of its hidden states relative to their square. To choose from are 2, 3, 4 and 8 bits with a scale per 128 weights, and "
        "where it says so also per 32. *uniform, interpolated* is the best mix of two uniform plans of that size, and *kl on the "
        "held-out data* the choice that would be best if losses add up: its data judges and chooses.",
        "setting",
        "subject",
        ("held-out loss",),
        units=False,
        detail=True,
    ),
    Table(
        "search",
        "The same losses as parts of what the interpolated uniform plans lose: 0.6 means that 40 % are recovered. *Real numbers "
        "of bits* is what the best choice would come to, were there all widths from 2 to 8 and losses to add up.",
        "setting",
        "subject",
        ("held-out loss / interpolated",),
        detail=True,
    ),
    Table(
        "search",
        "The part of a uniform plan's loss that would be left if every unit took the best real number of bits at that average, "
        "were losses to add up and to fall by one factor per bit: the geometric over the arithmetic mean of the units' measured "
        "losses per weight. Where that is near 1, units are about equally sensitive, and no choice of bits can gain much.",
        "subject",
        "setting",
        ("loss left by the best real numbers of bits",),
        detail=True,
    ),
    Table(
        "search compared",
        "Held-out loss over the best method's for the same model and budget, and interlayer's over hawq-v2's, over {setting}, "
        "one draw of calibration data each. hawq-v1, and hawq-v2 of MobileNetV2 and MiniLM, saw one sample in eight to keep "
        "their time in bounds; with all samples they may do better there.",
        "subject",
        "metric",
        detail=True,
    ),
    Table(
        "search",
        "Rank correlation of predicted with measured held-out loss over 200 random mixed plans of 2.25 to 5.25 average bits. *At "
        "equal size* is the mean over ten bands of size.",
        "setting",
        "subject",
        ("rank correlation",),
        detail=True,
    ),
    Table(
        "search",
        "Seconds that predictions took, on a machine that did other things too and beyond solving the layers, which all methods "
        "share. hawq-v1, and hawq-v2 of MobileNetV2 and MiniLM, saw one sample in eight here.",
        "setting",
        "subject",
        ("search time",),
        units=False,
        detail=True,
    ),
    Table(
        "search",
        "The same in forward passes over the 4,096 tokens or 256 images that options are measured on; backward passes are not "
        "counted.",
        "setting",
        "subject",
        ("forward passes",),
        detail=True,
    ),
    Table(
        "proxies",
        "**Predicting without measuring.** Spearman's correlation of proxies with the measured loss of 200 mixed plans of "
        "2, 3, 4 and 8 bits of each model. *Evolved* formulas never saw the model they are judged on: each is the result of a "
        "search on the other four, with three seeds. They rank better than what was written by hand, except HAWQ-v2, which they "
        "beat only on the benches they come from: four models do not settle a formula, and what it gains there is lost "
        "on a fifth that is unlike them, first of all on MobileNetV2.",
        "subject",
        "setting",
        ("Spearman, first 100%",),
    ),
    Table(
        "proxies",
        "The same within ten bands of 20 plans of one size, where size explains nothing: the mean over bands.",
        "subject",
        "setting",
        ("Spearman within size bands",),
        detail=True,
    ),
    Table(
        "proxies",
        "What plans lose on data that no search saw. Those of emq are chosen by formulas that were evolved on the other models.",
        "setting",
        "subject",
        ("held-out KL to dense",),
        units=False,
        detail=True,
    ),
    Table(
        "proxies",
        "Evolving on four benches in two processes, and evaluating one formula on one bench of 200 configurations on one core.",
        metrics=("time", "throughput"),
        detail=True,
    ),
    Table(
        "search files", "Files that `compress quantize` wrote for plans of the Llama, against the predicted size.", detail=True
    ),
    Table("search time", "**A whole search** beside a plain run: {setting}."),
    Table("pruning cost", "What pruning costs, as whole processes: {setting}.", "subject", "metric"),
    Table("end to end", "**A whole run**, from the command to the 4-bit checkpoint: {setting}."),
    Table("solver", "**The solver** on a CPU, one layer: {setting}."),
    Table("memory", "**Memory by depth.** Peak anonymous memory of a 4-bit run, by number of layers.", "subject", "setting"),
    Table("serving", "**Serving**: {setting}.", metrics=SERVED),
    Table("kernels", "**GPU kernels.** Speed over bfloat16's, by shape and rows.", "setting", metrics=("speed / bfloat16's",)),
)


def generate(rows: Sequence[Row], *, detail: bool = False) -> str:
    """The tables of one README as markdown; neighbours that are from one origin have it once, below the last of them."""
    newest = latest(rows)
    chosen = [(table, [row for row in newest if table.shows(row)]) for table in TABLES if table.detail == detail]
    made = [(_table(table, own), _origin(own, table.average)) for table, own in chosen if own]
    following = [*(origin for _, origin in made[1:]), ""]
    return "\n\n".join(
        text if origin == after else f"{text}\n\n{origin}" for (text, origin), after in zip(made, following, strict=False)
    )


def _table(table: Table, rows: Sequence[Row]) -> str:
    """Markdown; a row whose setting is `ALL` fills its line."""
    lines, columns = (_distinct(getattr(row, field) for row in rows) for field in (table.lines, table.columns))
    columns = [column for column in columns if column != ALL]
    cells = {(getattr(row, table.lines), getattr(row, table.columns)): _cell(row, table.units) for row in rows}
    text = [table.says.format(setting=rows[0].setting), "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for line in lines:
        values = (cells.get((line, column), cells.get((line, ALL), "")) for column in columns)
        text.append(f"| {line} | {' | '.join(values)} |")
    return "\n".join(text)


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _cell(row: Row, units: bool) -> str:
    unit = f" {row.unit}" if row.unit and units else ""
    half = float(row.spread) / 2
    digits = f"{half:,.0f}" if half >= 10 else f"{half:.2g}"
    spread = f" ± {digits}" if int(row.runs) > 1 else ""
    return f"{_short(float(row.value))}{spread}{unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _origin(rows: Sequence[Row], average: str) -> str:
    last = max(rows, key=lambda row: row.date)
    runs = _distinct(row.runs for row in rows if int(row.runs) > 1)
    spread = f"{average} of {' or '.join(runs)} runs ± half their range. " if runs else ""
    commits = _distinct(row.commit for row in rows)
    shown = f"commit{'s' if len(commits) > 1 else ''} {' and '.join(commits)}"
    return f"<sub>{spread}{last.date}, {shown}, {last.hardware}; {last.versions}.</sub>"


def insert(readme: str, tables: str) -> str:
    """A README with its tables replaced; raises ValueError where it has no markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The README lacks {BEGIN} or {END}")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}" if tables else f"{head}{BEGIN}\n{END}{tail}"


def updated() -> dict[Path, tuple[str, str]]:
    """Both READMEs as they are, and as they should be."""
    rows, found = read(), {}
    for path, detail in ((README, False), (DETAILS, True)):
        before = path.read_text(encoding="utf-8")
        found[path] = before, insert(before, generate(rows, detail=detail))
    return found


def write() -> None:
    for path, (_, after) in updated().items():
        path.write_text(after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write()
        return
    if stale := [path for path, (before, after) in updated().items() if before != after]:
        shown = " and ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{shown}: not the latest results. Run python -m benchmarks.table.")


if __name__ == "__main__":
    main()
