"""Post-training compression: quantize or prune a trained model, and load the result packed.

Importing this package does not import torch: the verbs are loaded on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.spec import LayerSpec, Plan, Scheme, Sparsity

if TYPE_CHECKING:
    from compress.api import quantize, search
    from compress.evaluate import perplexity
    from compress.evolving import evolve, make_bench
    from compress.hf import enable_transformers, load
    from compress.pruning import prune

__version__ = "0.1.0"

LAZY = {
    "evolve": "compress.evolving",
    "make_bench": "compress.evolving",
    "prune": "compress.pruning",
    "quantize": "compress.api",
    "search": "compress.api",
    "perplexity": "compress.evaluate",
    "load": "compress.hf",
    "enable_transformers": "compress.hf",
}

__all__ = [
    "CompressError",
    "LayerSpec",
    "Plan",
    "Scheme",
    "Sparsity",
    "enable_transformers",
    "evolve",
    "load",
    "make_bench",
    "perplexity",
    "prune",
    "quantize",
    "search",
]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *LAZY])
