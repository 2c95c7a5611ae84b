"""Bars on a terminal, one at a time and one within another."""

from __future__ import annotations

import io
import sys

import pytest

from compress.cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def test_work_within_work_has_a_bar_of_its_own_below(monkeypatch):
    terminal = terminal_of(monkeypatch)
    bars, seen = progress.Bars(), []
    for _ in bars.track(range(2), 2, "outer"):
        for _ in bars.track(range(3), 3, "inner"):
            bars.progress.refresh()
            seen.append([task.description for task in bars.progress.tasks])
        assert [(task.description, task.completed) for task in bars.progress.tasks][:1] == [("outer", len(seen) // 3 - 1)]
    assert seen == 6 * [["outer", "inner"]]
    assert bars.progress.tasks == []
    assert not bars.progress.live.is_started
    screen = terminal.getvalue()
    assert "outer" in screen.split("inner")[0]
    assert "\x1b[?25h" in screen.split("inner")[-1]  # the cursor is back


def test_an_error_in_the_inner_work_ends_both_bars(monkeypatch):
    terminal = terminal_of(monkeypatch)
    bars = progress.Bars()

    def steps():
        yield 1
        yield from bars.track(iter([1 / 0 for _ in range(1)]), 1, "inner")

    with pytest.raises(ZeroDivisionError):
        list(bars.track(steps(), 2, "outer"))
    assert bars.progress.tasks == []
    assert "\x1b[?25h" in terminal.getvalue()


def test_a_bar_can_follow_another(monkeypatch):
    terminal = terminal_of(monkeypatch)
    bars = progress.Bars()
    assert [list(bars.track("ab", 2, name)) for name in ("first", "second")] == [["a", "b"]] * 2
    assert "first" in terminal.getvalue()
    assert "second" in terminal.getvalue()


class Clock:
    """A time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_known_when_steps_take_minutes(monkeypatch):
    terminal = terminal_of(monkeypatch)
    clock = Clock()
    bars = progress.Bars(clock)
    shown = []
    for _ in bars.track(range(4), 4, "work"):
        task = bars.progress.tasks[0]
        shown.append([progress.TimeLeft().render(task).plain])
        clock.now += 60
        shown[-1] += [progress.TimeLeft().render(task).plain]
        clock.now += 60
    assert shown == [["-:--:--", "-:--:--"], ["0:06:00", "0:05:00"], ["0:04:00", "0:03:00"], ["0:02:00", "0:01:00"]]
    assert "work" in terminal.getvalue()


def test_files_and_pipes_get_a_line_at_most_every_ten_seconds(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress.Bars(clock).track(range(8), 8, "solving blocks"):
        clock.now += 4
    assert stream.getvalue().splitlines() == ["solving blocks 3/8, 20.0 s left", "solving blocks 6/8, 8.0 s left"]
    stream.truncate(0)
    stream.seek(0)
    for _ in progress.Bars(clock).track(range(2), 2, "long blocks"):
        clock.now += 80
    assert stream.getvalue().splitlines() == ["long blocks 1/2, 1 min 20 s left", "long blocks 2/2"]


def test_files_and_pipes_get_no_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress.track([1, 2], 2, "work")) == [1, 2]
    assert stream.getvalue().strip() == ""
