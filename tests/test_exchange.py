"""A folder that is replaced is never lost: not when a rename fails, and not when the process dies between two of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress import exchange
from compress.checkpoint import Writer
from compress.errors import CompressError
from compress.resume import ResumableWriter
from tests.test_checkpoint import source, write  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[1]
OLD = {"config.json": "{}", "mark": "old"}


def made(folder: Path, files: dict[str, str] = OLD) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors" and path.is_file()}


@pytest.fixture(params=["at one stroke", "in two renames"])
def _way(request, monkeypatch):
    if request.param == "in two renames":
        monkeypatch.setattr(exchange, "exchange", lambda *_: False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
def test_two_folders_are_exchanged(tmp_path):
    one, other = made(tmp_path / "one", {"a": "1"}), made(tmp_path / "other")
    assert exchange.exchange(one, other)
    assert (read(one), read(other)) == (OLD, {"a": "1"})
    with pytest.raises(FileNotFoundError):
        exchange.exchange(one, tmp_path / "nowhere")
    assert read(one) == OLD


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("there", [True, False])
def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path, there):
    new, out = made(tmp_path / "new", {"a": "1"}), tmp_path / "out"
    if there:
        made(out)
    exchange.replace(new, out)
    assert read(out) == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("writer", [Writer, ResumableWriter])
def test_the_old_folder_is_back_when_the_second_rename_fails(source, tmp_path, monkeypatch, failing, writer):  # noqa: F811
    out, rename = made(tmp_path / "out"), Path.rename
    monkeypatch.setattr(exchange, "exchange", lambda *_: False)

    def fails(path, target):
        if path.name == "finished":
            raise failing
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    expected = CompressError if isinstance(failing, OSError) else KeyboardInterrupt
    with pytest.raises(expected), writer(source, out, overwrite=True) as open_writer:  # noqa: PT012
        open_writer.finish({}, {"model_type": "llama"}, {})
        open_writer.seal("{}")
    assert read(out) == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


KILLED = """
import os, signal, sys
from pathlib import Path
from compress import exchange
from compress.checkpoint import Writer
exchange.exchange = lambda *_: False
rename = Path.rename

def dies(path, target):
    if path.name == "finished":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

Path.rename = dies
with Writer(Path(sys.argv[1]), Path(sys.argv[2]), True) as writer:
    writer.finish({}, {"model_type": "llama"}, {})
    writer.seal("{}")
"""


def test_the_old_folder_is_back_after_a_kill_between_two_renames(source, tmp_path, caplog):  # noqa: F811
    out = made(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CompressError, match=r"exists and is not empty.*--overwrite"), Writer(source, out):
        pass
    assert "is back" in caplog.text
    assert read(out) == OLD
    write(source, out, overwrite=True)
    assert "mark" not in read(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_a_kill_after_both_renames_left_is_removed(tmp_path):
    out = made(tmp_path / "out", {"config.json": "{}", "mark": "new"})
    made(exchange.aside(out))
    assert not exchange.restored(out)
    assert [path.name for path in tmp_path.iterdir() if "replaced" in path.name] == []
    assert read(out)["mark"] == "new"


def test_a_link_stays_a_link(source, tmp_path):  # noqa: F811
    real, link = made(tmp_path / "real"), tmp_path / "link"
    link.symlink_to(real)
    with pytest.raises(CompressError, match="--overwrite"):
        Writer(source, link)
    write(source, link, overwrite=True)
    assert link.is_symlink()
    assert link.resolve() == real
    assert (real / "model.safetensors").is_file()
    missing = tmp_path / "to come"
    missing.symlink_to(tmp_path / "elsewhere")
    write(source, missing)
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
