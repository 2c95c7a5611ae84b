"""One load at a time: transformers replaces parts of itself while it loads a model, which goes wrong in two threads at once."""

from __future__ import annotations

import functools
import threading
from typing import Any

from transformers import PreTrainedModel

from compress.errors import CompressError

LOADING = threading.RLock()  # held while a model is loaded, or what transformers loads with is replaced


def check_unbroken() -> None:
    """Raise where loads that overlapped have left transformers unable to load: one puts back what another had replaced."""
    if PreTrainedModel.tie_weights.__qualname__ != f"{PreTrainedModel.__name__}.tie_weights":
        raise CompressError(
            "transformers cannot load models in this process any more, or another thread is loading one just now: loads with "
            "from_pretrained are not safe in threads, and two that overlap leave weights untied from then on. Start the process "
            "again, and load through compress.load, or after compress.enable_transformers(): these take turns."
        )


def in_turns(before: Any) -> Any:
    """A `from_pretrained` that waits until no other thread loads."""

    @functools.wraps(before.__func__)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        with LOADING:
            return before.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def set_from_pretrained(method: Any) -> None:
    PreTrainedModel.from_pretrained = method  # type: ignore[method-assign]
