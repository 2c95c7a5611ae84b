"""Solved layers of other code are not taken for those of this code."""

from __future__ import annotations

import torch

from compress import checkpoint, fingerprint
from compress.mixed import library
from compress.sequential import Settings
from compress.solvers.options import Options
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float16)


def test_every_file_and_text_counts(tmp_path):
    folder, file = tmp_path / "solvers", tmp_path / "loop.py"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    file.write_text("y = 1\n")
    seen = {fingerprint.digest([folder, file], "1.0")}
    (folder / "a.py").write_text("x = 2\n")
    seen.add(fingerprint.digest([folder, file], "1.0"))
    file.write_text("y = 2\n")
    seen.add(fingerprint.digest([folder, file], "1.0"))
    (folder / "b.py").write_text("")
    seen.add(fingerprint.digest([folder, file], "1.0"))
    seen.add(fingerprint.digest([folder, file], "1.1"))
    assert len(seen) == 5
    (folder / "notes.txt").write_text("not code")
    assert fingerprint.digest([folder, file], "1.1") in seen


def test_the_parts_that_solve_are_there():
    assert all((fingerprint.PACKAGE / part).exists() for part in fingerprint.SOLVING)


def test_a_changed_solver_has_another_library(tmp_path, monkeypatch):
    stored = checkpoint.index(tiny.save("llama", tmp_path / "source"))
    before = library.key(stored, None, SETTINGS)
    assert library.key(stored, None, SETTINGS) == before
    monkeypatch.setattr(fingerprint, "solving", lambda: "other code")
    assert library.key(stored, None, SETTINGS) != before
