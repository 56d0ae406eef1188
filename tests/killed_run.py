"""Train, be killed, resume: run by test_training.py in a process of its own.

Imports once, then forks a child a life, so that a life costs milliseconds. A child is killed with SIGKILL either by
itself at a given record (a step, an evaluation, a knot) or by the parent after a given time, wherever it then is.

usage: killed_run.py CONFIG OUTPUT RECORD|seconds:S [...]
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from chainlora.config import load_config
from chainlora.training import train


def live(config: str, output: str, death: str | None) -> int:
    """Run one life; return the signal that ended it, 0 if it finished."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        seen = 0

        def listener(record) -> None:
            nonlocal seen
            seen += 1
            if death is not None and not death.startswith("seconds:") and seen == int(death):
                os.kill(os.getpid(), signal.SIGKILL)

        settings = load_config(config, [("output", output)])
        try:
            train(settings, resume=os.path.exists(output), listener=listener)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if death is not None and death.startswith("seconds:"):
        time.sleep(float(death.removeprefix("seconds:")))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    config, output, *deaths = sys.argv[1:]
    print(*[live(config, output, death) for death in deaths], live(config, output, None))


if __name__ == "__main__":
    main()
