"""Fuzz the commands that change or copy a run: kills, flipped bits and full disks.

    python benchmarks/faults/fuzz.py --minutes 60     go on after the last case, and write fuzz.json
    python benchmarks/faults/fuzz.py --case 17        repeat one case, and keep its files

A case restores the files before a command of a walk (walks.py), does the command with a fault, then
without, and compares the files with those of the walk. README.md explains the outcomes. As root,
the files are on a small tmpfs, which can be really full; otherwise operations raise the error of a
full disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from walks import DISK, HERE, RUNS, WORK, Injection, Step, call, is_clear, look, make_world, own
from walks import walk as steps_of

import chainlora
from chainlora.cli.common import quiet
from chainlora.files import checksums
from chainlora.runs.costs import hardware, versions

CASES_PER_WALK = 24
TWICE = 0.25  # share of cases in which a kill comes before the fault
ROOM = 2**18  # bytes free on a full disk, at most: what commands write here
NOT_REPEATED = ("undo", "redo")  # again, they do something else
BAD = ("unclear", "lost", "wrong")


def case(seed: int) -> dict[str, Any]:
    """Do a command of a walk with a fault, at times after a kill; return what came of it."""
    draw = random.Random(f"case {seed}")
    steps, fault = steps_of(seed // CASES_PER_WALK), draw.choice([kill, flip, fill])
    name = draw.choice(sorted({step.name for step in steps}))
    step = draw.choice([step for step in steps if step.name == name])
    found = {"seed": seed, "command": name, "fault": fault.__name__, "words": step.words}
    step.restore()
    is_repeated = draw.random() < TWICE and name not in NOT_REPEATED
    if is_repeated:
        found["killed_before"] = draw.randrange(step.operations)
        call(step.words, Injection(HERE, "kill", found["killed_before"]))
    return found | fault(step, draw, is_repeated)


def kill(step: Step, draw: random.Random, _: bool) -> dict[str, Any]:
    """Kill the command at an operation: plainly, in half a write, or with a loss of power."""
    kind, place = draw.choice(["kill", "kill", "tear", "power"]), draw.randrange(step.operations)
    end = call(step.words, Injection(HERE, kind, place))
    if kind == "power" and end.status == -signal.SIGKILL:
        shutil.rmtree(HERE)
        HERE.with_name("here.durable").rename(HERE)
    found = {"how": f"{kind} at {place} of {step.operations}"}
    if end.status != -signal.SIGKILL and not is_clear(end):
        return found | {"outcome": "unclear", "said": end.message}
    return found | repair(step, "same")


def fill(step: Step, draw: random.Random, is_repeated: bool) -> dict[str, Any]:
    """Fill the disk: really, or for one operation, or for all from one on."""
    kind, place = draw.choice(["real", "once", "lasting"]), draw.randrange(step.operations)
    injection, found = None, {"how": f"{kind} at {place} of {step.operations}"}
    if kind == "real" and os.path.ismount(DISK):
        room = draw.randrange(ROOM)
        found = {"how": f"{room} bytes free"}
        disk = os.statvfs(DISK)
        resize((disk.f_blocks - disk.f_bfree) * disk.f_frsize + room)
    else:
        injection = Injection(HERE, "ENOSPC", place, lasting=kind != "once")
    end = call(step.words, injection)
    resize()
    # a command that had ended before it was killed may be refused for that reason
    is_other = end.status == 1 and "space" not in end.message and not is_repeated
    if is_other or not is_clear(end):
        return found | {"outcome": "unclear", "said": end.message}
    return found | repair(step, "refused" if end.status else "same")


def flip(step: Step, draw: random.Random, _: bool) -> dict[str, Any]:
    """Flip a bit of a run or the base: it must be refused, or have no effect."""
    path, place = damaged(step, draw)
    (_, first), original = look(), path.read_bytes()
    content = bytearray(original)
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    before = own(checksums(HERE))
    end = call(step.words)
    is_late = own(checksums(HERE)) != before
    shown, (reading, read) = call("log run"), look()
    if path.is_file() and path.read_bytes() == content:
        path.write_bytes(original)
    found = {"how": f"{path.relative_to(HERE)} byte {place}"}
    if not (is_clear(end) and is_clear(shown) and reading.status in (0, 1)):
        said = end.message + shown.message + reading.message
        return found | {"outcome": "unclear", "said": said}
    if end.status == 0 and (others := step.differences()):
        return found | {"outcome": "wrong", "said": f"{others} {end.message}"}
    if reading.status == 0 and not is_late | (end.status == 0) and read != first:
        return found | {"outcome": "wrong", "said": f"read {read}, not {first}"}
    if reading.status == end.status == 0 and read != step.read:
        return found | {"outcome": "wrong", "said": f"read {read}, not {step.read}"}
    how = "refused late" if is_late else "refused"
    return found | (repair(step, how) if end.status else {"outcome": "same"})


def damaged(step: Step, draw: random.Random) -> tuple[Path, int]:
    """Draw a byte of the base, of its rows in the cache, or of a run that the command names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(HERE.rglob("*")):
        parts = path.relative_to(HERE).parts
        is_of_run = parts[0] in RUNS and parts[0] in step.words.split()
        is_read = is_of_run or parts[0] == "base" or parts[:2] == ("cache", "general")
        if is_read and path.is_file() and path.stat().st_size:
            groups.setdefault("/".join(parts[: 1 + is_of_run]), []).append(path)
    path = draw.choice(groups[draw.choice([*groups])])
    size = path.stat().st_size
    return path, draw.randrange(draw.choice([size, min(size, 512)]))  # often in a header


def repair(step: Step, outcome: str) -> dict[str, Any]:
    """Repeat the command after the fault, or build what it declared; compare with the walk."""
    reading, read = look()
    if reading.status != 0:
        return {"outcome": "lost", "said": reading.message}
    for run, (history, *_) in read.items():
        if history not in step.histories[run]:
            said = f"{run} has a history that the command does not write: {json.dumps(history)}"
            return {"outcome": "lost", "said": said}
    said, by, others = "", "nothing", step.differences()
    is_done = step.name in NOT_REPEATED and read == step.read
    for words in (step.words, "train run"):
        if others and not is_done:
            end = call(words)
            said += f"{words}: {end.status} {end.message}"
            if not is_clear(end):
                return {"outcome": "unclear", "said": said}
            others, by = step.differences(), words
    if others:
        return {"outcome": "wrong", "said": f"{others} {said}"}
    return {"outcome": outcome, "by": by}


# --- all cases ---


def resize(size: int = 2**30) -> None:
    """Give the disk of the cases a size, if it is a tmpfs."""
    if os.path.ismount(DISK):
        subprocess.run(["mount", "-o", f"remount,size={size}", DISK], check=True)


def prepare() -> None:
    """Mount the disk of the cases, and import all that commands import."""
    DISK.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0 and not os.path.ismount(DISK):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", DISK], check=False)
    for module in walk_packages(chainlora.__path__, "chainlora."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    quiet()
    torch.set_num_threads(1)


def tried(seed: int) -> dict[str, Any]:
    """Return a case; if a command of its walk fails without a fault, that is the case."""
    start = time.monotonic()
    try:
        found = case(seed)
    except AssertionError as error:
        none = {"command": "any", "fault": "none", "outcome": "unclear"}
        found = {"seed": seed} | none | {"said": str(error)}
    if len(said := found.get("said", "")) > 2000:
        found["said"] = f"{said[:500]} ... {said[-1500:]}"
    return found | {"seconds": round(time.monotonic() - start, 2)}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts by command, fault and outcome, and all cases that ended badly."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for each in cases:
        of_command = counts.setdefault(each["command"], {})
        of_command.setdefault(each["fault"], Counter())[each["outcome"]] += 1
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "command": f"python benchmarks/faults/fuzz.py {' '.join(sys.argv[1:])}",
        "revision": subprocess.check_output([*describe, "--exclude=*"], text=True).strip(),
        "seeds": [0, len(cases) - 1],
        "seconds": round(sum(each["seconds"] for each in cases)),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")) | {"tmpfs": os.path.ismount(DISK)},
        "counts": counts,
        "bad": [each for each in cases if each["outcome"] in BAD],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--case", type=int, metavar="SEED")
    options = parser.parse_args()
    prepare()
    make_world()
    if options.case is not None:
        print(json.dumps(tried(options.case), indent=1), f"in {HERE}", sep="\n")
        return 0
    path = WORK / "cases.jsonl"
    cases = [json.loads(line) for line in path.open()] if path.is_file() else []
    while sum(each["seconds"] for each in cases) < 60 * options.minutes:
        cases.append(tried(len(cases)))
        with path.open("a") as file:
            file.write(json.dumps(cases[-1]) + "\n")
        shown = ("seed", "seconds", "outcome", "fault", "how", "words")
        print(*(cases[-1].get(key, "") for key in shown), flush=True)
    found = summary(cases)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    if os.path.ismount(DISK):
        subprocess.run(["umount", DISK], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
