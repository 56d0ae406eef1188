"""Stop a run by SIGINT (Ctrl-C) or SIGTERM: once, after the step, saved; twice, at once.

The loop asks `stop_requested` between steps, and between the batches of an evaluation. While there
is nothing to save yet, the first signal stops at once too. Signals are handled only while
`interruptible` is open, and only in the main thread, the one that Python delivers them to; without
it `stop_requested` returns None.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What signals have asked for; `tell` is called with the number of the first one deferred."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        self.requested: int | None = None  # the signal that asked to stop
        self.last: int | None = None
        self._tell = tell
        self._is_deferring = False

    def defer(self) -> None:
        """From now on, let the first signal wait until the loop asks."""
        self._is_deferring = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; raise KeyboardInterrupt at the second, or if none is deferred."""
        self.last = number
        if self.requested is not None or not self._is_deferring:
            raise KeyboardInterrupt
        self.requested = number
        self._tell(number)


_open: Interrupts | None = None


def stop_requested() -> int | None:
    """Return the number of the signal that asked the run to stop, None if none did."""
    return None if _open is None else _open.requested


@contextmanager
def interruptible(tell: Callable[[int], object] = lambda number: None) -> Iterator[Interrupts]:
    """Handle signals as this module says; `tell` must do no more than a signal handler may."""
    global _open
    interrupts = Interrupts(tell)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    _open = interrupts
    before = {number: signal.signal(number, interrupts.handle) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _open = None
