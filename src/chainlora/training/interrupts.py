"""Stop a run by SIGINT (Ctrl-C) or SIGTERM.

The first signal stops it after the current step, with its state saved; a second one stops it at
once. Before training, when there is nothing to save, the first signal also stops it at once. The
loop calls `stop_requested` between steps, and between the batches of an evaluation. Signals are
handled only inside `interruptible`, and only in the main thread, because Python delivers them
there; elsewhere `stop_requested` returns None.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The signals received; `notify` is called with the number of the first deferred one."""

    def __init__(self, notify: Callable[[int], object]) -> None:
        self.requested: int | None = None  # the signal that asked to stop
        self.last: int | None = None
        self._notify = notify
        self._is_deferring = False

    def defer(self) -> None:
        """Let the first signal wait until the loop calls `stop_requested`, from now on."""
        self._is_deferring = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; raise KeyboardInterrupt at the second, or before `defer`."""
        self.last = number
        if self.requested is not None or not self._is_deferring:
            raise KeyboardInterrupt
        self.requested = number
        self._notify(number)


_open: Interrupts | None = None


def stop_requested() -> int | None:
    """Return the number of the signal that asked the run to stop, None if none did."""
    return None if _open is None else _open.requested


@contextmanager
def interruptible(notify: Callable[[int], object] = lambda number: None) -> Iterator[Interrupts]:
    """Handle signals as the module docstring says; `notify` runs inside the signal handler."""
    global _open
    interrupts = Interrupts(notify)
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
