"""Shared by all tests: jaxtyping shapes are checked, no network, quiet threads, Triton interpreted where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: spinning threads starve each other on two cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core is there already
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COMPRESS_KERNEL_TABLES"] = "/nonexistent/kernels.json"  # nothing depends on what was tuned on this machine

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("compress", "beartype.beartype")  # every shape in a signature is checked while tests run

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Tests marked `gpu` need one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over tokens in float32, as on a processor without instructions for bfloat16."""
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: False)
