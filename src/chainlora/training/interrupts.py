"""Stop a run by SIGINT (Ctrl-C) or SIGTERM: once, after the step, saved; twice, at once.

A loop asks `stop_requested` between steps. Handlers are set while `interruptible` is open, and only
in the main thread, the one that Python delivers signals to.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_requested: int | None = None  # the signal that asked


def stop_requested() -> int | None:
    """Return the number of the signal that asked the run to stop, None if none did."""
    return _requested


@contextmanager
def interruptible(tell: Callable[[int], object] = lambda number: None) -> Iterator[None]:
    """Let the first signal ask the run to stop, and a second one raise KeyboardInterrupt.

    `tell` is called with the signal's number at the first.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        global _requested
        if _requested is not None:
            raise KeyboardInterrupt
        _requested = number
        tell(number)

    _requested = None
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = None
