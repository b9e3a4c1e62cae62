"""Ctrl-C: the first one asks training to stop after the present step, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


class Interrupt:
    """``requested`` becomes True at the first Ctrl-C."""

    def __init__(self, console: Console) -> None:
        self.console, self.requested = console, False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("Stopping after this step; Ctrl-C again to stop without saving.")


@contextmanager
def interruptible(console: Console) -> Iterator[Interrupt]:
    """Within it, Ctrl-C is an ``Interrupt``. Signals are left alone outside the main thread."""
    interrupt = Interrupt(console)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
