"""Lives of a command: each in a forked process, with a fault.

Everything is imported once; a life then costs no more than the command itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from chainlora.errors import ChainLoRAError
from faults.injection import Injection


@dataclass
class End:
    """How a life ended: its status (-9: killed; 0: done; 1: our error; 2: any other), and why.

    `operations` and `histories` are what its injection has counted.
    """

    status: int
    message: str = "no word"
    operations: list[str] = field(default_factory=list)
    histories: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_unexpected(self) -> bool:
        """Say whether it ended with something else than an error of ours."""
        return self.status == 2 or "unexpected" in self.message


def live(work: Callable[[], object], injection: Injection | None = None) -> End:
    """Do some work in a process of its own, with a fault, and say how it ended."""
    return wait(start(work, injection))


def start(work: Callable[[], object], injection: Injection | None = None) -> tuple[int, int]:
    """Start a life; `wait` ends it."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_born(work, injection, writer)
    os.close(writer)
    return child, reader


def wait(started: tuple[int, int]) -> End:
    """Wait for the end of a life."""
    child, reader = started
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return End(-os.WTERMSIG(status))
    return End(os.WEXITSTATUS(status), **json.loads(text or "{}"))


def _be_born(work: Callable[[], object], injection: Injection | None, writer: int) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background ignores it
    status, said = 0, {"message": ""}
    try:
        if injection is not None:
            injection.install()
        work()
    except ChainLoRAError as error:
        status, said = 1, {"message": str(error)}
    except KeyboardInterrupt:
        status, said = 1, {"message": "interrupted"}
    except BaseException:
        status, said = 2, {"message": traceback.format_exc()}
    if injection is not None:
        injection.kind = "count"  # what follows is not part of the life
        said |= {"operations": injection.operations, "histories": injection.histories}
    with os.fdopen(writer, "w") as pipe:
        json.dump(said, pipe)
    os._exit(status)


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
