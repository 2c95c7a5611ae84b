"""Checkpoints of every kind, and one clean process in which stock readers load them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.formats.tiny import Checkpoint, cases

READER = Path(__file__).parent / "stock_reader.py"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return cases(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def stock(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor | str]]:
    """{case: {how it was loaded: its logits, or the error}} from one process that knows nothing of this package."""
    root = tmp_path_factory.mktemp("stock")
    todo = {name: str(checkpoint.folder) for name, checkpoint in checkpoints.items()}
    (root / "todo.json").write_text(json.dumps(todo))
    command = [sys.executable, "-I", str(READER), str(root / "todo.json"), str(root / "done.pt")]
    run = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(root / "done.pt", weights_only=True)
