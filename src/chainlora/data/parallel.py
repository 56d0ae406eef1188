"""Encode chunks of rows in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from chainlora.errors import DataError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# More would wait for the reading and writing process, which does 100,000 short rows a second.
_MOST_WORKERS = 16
_function: Callable[[Any], Any] | None = None  # of a worker, from its start


def map_in_processes(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Yield ``function(item)`` for each item, in order, computed by worker processes.

    Workers are forked, so they have `function` and all it holds without copying; a few items are
    taken ahead of the results. Without fork (Windows, macOS), or with one worker, everything is
    computed here.
    """
    if workers < 2 or not _can_fork():
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (function,))
    try:
        with _plain_fork():
            pool.submit(os.getpid).result()  # forks all of them
        yield from _in_order(pool, items, ahead=2 * workers)
    except BrokenProcessPool:
        raise DataError(
            "the processes that encode rows must live to the end (got one that was killed, as a "
            "machine short of memory does); free some memory and try again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def num_workers() -> int:
    """Return how many processes encode."""
    return min(_MOST_WORKERS, num_cores())


def num_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _can_fork() -> bool:
    """Say whether this process may fork: macOS has libraries that do not survive it."""
    is_daemon = multiprocessing.current_process().daemon  # which may have no children
    return sys.platform == "linux" and not is_daemon


def _in_order(pool: ProcessPoolExecutor, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_call, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _plain_fork() -> Iterator[None]:
    """Fork in peace: one thread a worker in the tokenizer, no Ctrl-C, and no warning about threads.

    The children tokenise and write arrays; they touch no lock that a thread of this process may
    hold. They are born with Ctrl-C blocked, as it may come before they can ignore it.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _begin_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
