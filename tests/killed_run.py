"""Train, be killed, resume: run by test_training_resume.py in a process of its own.

Imports once, then forks a child a life, so that a life costs milliseconds. A child kills itself
with SIGKILL so many seconds after its n-th record (a step, an evaluation, a knot), wherever it then
is: in a step, in a checkpoint's files.

usage: killed_run.py CONFIG OUTPUT RECORD+SECONDS [...]
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch

from chainlora.config.loading import load_config
from chainlora.training.loop import train


def live(config: str, output: str, death: str | None) -> int:
    """Run one life; return the signal that ended it, 0 if it finished."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        last, _, delay = (death or "0+0").partition("+")
        seen = 0

        def listener(record) -> None:
            nonlocal seen
            seen += 1
            if death is not None and seen == int(last):
                threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()

        settings = load_config(config, [("output", output)])
        try:
            train(settings, resume=os.path.exists(output), listener=listener)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    config, output, *deaths = sys.argv[1:]
    print(*[live(config, output, death) for death in deaths], live(config, output, None))


if __name__ == "__main__":
    main()
