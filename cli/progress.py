"""What every command prints alike: tables on stdout, progress on stderr, bytes and times in words."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compress.cli.pace import Pace

T = TypeVar("T")

WIDTH_WITHOUT_TERMINAL = 160  # rich would fold tables to 80 columns in files and pipes


def console(*, stderr: bool = False) -> Console:
    """A console that is wide where the output is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table with its first column to the left and the others to the right."""
    made = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        made.add_column(column, justify="right" if at else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def facts(pairs: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    """A table of two columns without a heading."""
    made = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs:
        made.add_row(name, value)
    return made


class TimeLeft(ProgressColumn):
    """The time left as `Pace` estimates it: rich's own column forgets steps that took more than 30 s."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        minutes, seconds = divmod(round(left or 0), 60)
        shown = "-:--:--" if left is None else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        return Text(shown, style="progress.remaining")


class Bars:
    """Bars on stderr with estimates of the time left, one below the other for work within work.

    In files and pipes a line instead, after a step that ends 10 seconds or more after the last line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeft(),
        ]
        screen = console(stderr=True)
        self.progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)

    def track(self, steps: Iterable[T], total: int, description: str) -> Iterator[T]:
        """Pass `steps` through, with a bar."""
        with self.bar(total, description) as advance:
            for step in steps:
                yield step
                advance(description)

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[str], None]]:
        """A bar that advances when it is called, with what it then says."""
        pace = Pace(total, self.clock)
        task = self.progress.add_task(description, total=total, pace=pace)
        self.progress.start()

        def advance(says: str) -> None:
            pace.step()
            self.progress.update(task, advance=1, description=says)
            if self.progress.disable and pace.due():
                print(line(says, pace), file=self.progress.console.file, flush=True)

        try:
            yield advance
        finally:
            if len(self.progress.tasks) == 1:
                self.progress.stop()
            self.progress.remove_task(task)


def line(says: str, pace: Pace) -> str:
    """What stands for a bar in files and pipes: `solving blocks 3/30, 1 min 20 s left`."""
    left = f", {duration(pace.left)} left" if pace.left else ""
    return f"{says} {pace.done}/{pace.total}{left}"


def track(steps: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Pass `steps` through, with a bar of its own."""
    return Bars().track(steps, total, description)


def bar(total: int, description: str) -> AbstractContextManager[Callable[[str], None]]:
    """A bar of its own."""
    return Bars().bar(total, description)


def print_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinities are not JSON and raise ValueError."""
    print(json.dumps(document, indent=1, allow_nan=False))


def size(nbytes: int | float) -> str:
    """Bytes in decimal units: 1 MB is 10^6 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as `4.2 s`, `3 min 20 s` or `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def quiet_libraries() -> None:
    """Stop transformers' own bars and warnings: a command has one bar, and says in its own words what went wrong."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
