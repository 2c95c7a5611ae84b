"""How far counted work has come, when it will be done, and when that is worth a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS_BETWEEN_LINES = 10


@dataclass
class Pace:
    """Steps done of `total` by a clock in seconds; all times are read from `clock`."""

    total: int
    clock: Callable[[], float]
    done: int = 0
    start: float = field(init=False)
    stepped: float = field(init=False)
    said: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.stepped = self.said = self.clock()

    def step(self) -> None:
        """Count a step that ends now."""
        self.done, self.stepped = self.done + 1, self.clock()

    @property
    def left(self) -> float | None:
        """Estimate the seconds until the last step ends, by the mean of all steps so far; None before the first has ended."""
        if not self.done:
            return None
        expected = (self.stepped - self.start) / self.done * (self.total - self.done)
        return max(0.0, expected - (self.clock() - self.stepped))

    def due(self) -> bool:
        """Tell whether the last line is long enough ago for another, and take it as said if so."""
        due = self.stepped - self.said >= SECONDS_BETWEEN_LINES
        self.said = self.stepped if due else self.said
        return due
