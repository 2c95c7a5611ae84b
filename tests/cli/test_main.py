from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from compress import __version__
from compress.cli import main
from compress.errors import CompressError

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    return main.run()


@pytest.fixture(name="planted")
def _planted(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command `boom` that raises what the list holds."""
    errors: list[BaseException] = []

    @click.command()
    def boom() -> None:
        raise errors[0]

    commands = {**main.COMMANDS, "boom": ("compress.cli.main:boom", "Raise.")}
    monkeypatch.setattr(main, "COMMANDS", commands)
    monkeypatch.setattr(main, "boom", boom, raising=False)
    return errors


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert run(monkeypatch, flag) == 0
    printed = capsys.readouterr().out
    for name, (_, line) in main.COMMANDS.items():
        assert f"  {name}" in printed
        assert line in printed


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert f"Usage: compress {name}" in capsys.readouterr().out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"compress, version {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("quantise", "Did you mean quantize?"),
        ("evl", "Did you mean eval?"),
        ("zzz", "The commands are quantize, search, prune, evolve, eval, check, inspect, bench."),
    ],
)
def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, remedy: str) -> None:
    assert run(monkeypatch, typed) == 2
    assert f"Error: There is no command {typed}. {remedy}" in capsys.readouterr().err


def test_an_unknown_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--bits") == 2
    assert "--bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (CompressError("bits is 5; choose 4."), 2, "Error: bits is 5; choose 4.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (click.UsageError("no"), 2, "Error: no\n"),
    ],
)
def test_how_errors_end_a_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    planted: list[BaseException],
    error: BaseException,
    code: int,
    printed: str,
) -> None:
    planted.append(error)
    assert run(monkeypatch, "boom") == code
    captured = capsys.readouterr()
    assert captured.err.lstrip("\n").endswith(printed)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, planted: list[BaseException]) -> None:
    planted.append(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "boom")


def test_a_command_can_choose_its_exit_code(monkeypatch: pytest.MonkeyPatch, planted: list[BaseException]) -> None:
    planted.append(click.exceptions.Exit(1))
    assert run(monkeypatch, "boom") == 1


@pytest.mark.parametrize("lines", [1, 99999])  # fits into the buffer, and does not
def test_a_reader_that_stops_early_gets_no_complaint(lines: int) -> None:
    program = (
        "import click, sys, compress.cli.main as main\n"
        f"main.flood = click.command()(lambda: (sys.stdin.read(), print('x\\n' * {lines})) and None)\n"
        "main.COMMANDS['flood'] = ('compress.cli.main:flood', '')\n"
        "sys.argv = ['compress', 'flood']; main.main()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(("verb", "spins"), [("quantize", "2000 1"), ("bench", "None None")])
def test_threads_are_told_to_spin_but_briefly_before_torch_is_there(verb: str, spins: str) -> None:
    program = (
        "import os, sys, compress.cli.main as main\n"
        "main.run = lambda: print(*(os.environ.get(name) for name in main.WAITING), 'torch' in sys.modules) or 0\n"
        f"sys.argv = ['compress', '{verb}']; main.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in main.WAITING}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout == f"{spins} False\n"


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "compress", "nope"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "There is no command nope" in done.stderr
