"""Forward passes that pause at chosen modules and go on later: true-sequential solving at the price of one pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Cancelled(BaseException):
    """Unwinds a pass that will not be finished; not an Exception, so that no model code catches it."""


class Stepwise(threading.Thread):
    """One forward pass in a thread of its own. Exactly one thread runs at a time: `advance` waits for its pause or end."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        super().__init__(daemon=True)
        self._forward = forward
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.at: nn.Module | None = None  # where it waits, and with what input
        self.seen: Any = None
        self.inputs: dict[nn.Module, Tensor] = {}  # of modules that it passed, where a hook keeps them
        self.outputs: dict[nn.Module, Tensor] = {}
        self._error: BaseException | None = None
        self._cancelled = False
        self.output: Tensor | None = None
        self.start()

    def run(self) -> None:
        """The thread's work; called by `threading`, not by users."""
        self._go.acquire()
        try:
            if not self._cancelled:
                with torch.no_grad():
                    self.output = self._forward()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._back.release()

    def advance(self) -> Any:
        """Run on to the next pause and return the paused module's input; None when the pass has ended, with `output` set."""
        self.at = self.seen = None  # once the pass ends, nothing holds its activations
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.seen

    def reach(self, module: nn.Module) -> Any:
        """The input of `module` if the pass waits there; else run on to the next pause."""
        return self.seen if self.at is module else self.advance()

    def cancel(self) -> None:
        """End a paused pass where it stands, and let go of what it holds."""
        if self.is_alive():
            self._cancelled = True
            self._go.release()
            self.join()
        self.at = self.seen = None
        self.inputs.clear()
        self.outputs.clear()

    def pause(self, module: nn.Module, x: Any) -> None:
        """Called within the pass: hand `x`, the input of `module`, to `advance` and wait for the next one."""
        self.at, self.seen = module, x
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled


def pause_at(module: nn.Module) -> Any:
    """A hook that pauses whichever Stepwise pass is about to call `module`; its handle."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(thread := threading.current_thread(), Stepwise):
            thread.pause(module, args[0])

    return module.register_forward_pre_hook(hook)


def keep_input(module: nn.Module) -> Any:
    """A hook that leaves the input of `module` with whichever Stepwise pass calls it; its handle."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(thread := threading.current_thread(), Stepwise):
            thread.inputs[module] = args[0]

    return module.register_forward_pre_hook(hook)


def keep_output(module: nn.Module) -> Any:
    """A hook that leaves the output of `module` with whichever Stepwise pass calls it; its handle."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(thread := threading.current_thread(), Stepwise):
            thread.outputs[module] = output

    return module.register_forward_hook(hook)
