"""Commands without a fault, for fuzz.py: how they are run, and what they leave.

A walk is a sequence of commands that a seed draws. Each runs in a forked process, because imports
take longer than most commands. All cases use the same paths, because configs name them.
"""

# ruff: noqa: E402 (the faults at operations are those of tests/, which is no package)

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

WORK = Path(tempfile.gettempdir()) / "chainlora-fuzz"
DISK, NODES, SAID, STATUS = (WORK / name for name in ("disk", "nodes", "said", "status"))
HERE = DISK / "here"  # the files of the current case
os.environ |= {"CHAINLORA_CACHE": str(HERE / "cache"), "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from conftest import WORDS, make_tiny_folder, write_rows
from faults.commands import files_of, timeless
from faults.injection import Injection
from faults.lives import End, live

import chainlora
from chainlora.cli.main import run as command
from chainlora.runs.addresses import state_at
from chainlora.runs.entries import BASE
from chainlora.runs.history_file import read_history
from chainlora.runs.paths import is_run

TRIES = 12  # commands of a walk; those that are refused or change nothing are left out
RUNS = ("run", "copy", "sent", "other")
OUTPUTS = ("out", "copy")  # removed before the next command of a walk
NEXT = {"undo": "redo", "push": "pull"}  # often drawn after it
KEYS = "--data.validation 3 --chain.ranks [2] --chain.steps [3] --train.save_every 1"
COMMANDS = [
    *(f"train {name}.yaml" for name in ("one", "two")),
    f"train a.jsonl --model base --output run {KEYS}",
    *(f"extend run {words} {KEYS}" for words in ("b.jsonl", "c.jsonl")),
    *(f"extend run {words} {KEYS}" for words in ("d.jsonl --on-top", "e.jsonl")),
    "add run adapter --rows x.jsonl --data.validation 3",
    *(f"combine run {words}" for words in ("--rank 3", "a=2 b", "other", "other --output copy")),
    *(f"prune run {name} --yes" for name in ("a", "b", "c", "d", "e", "x", "after-b")),
    *("undo run", "undo run --to a", "redo run"),
    *("push run sent --rows", "push run sent"),
    *("pull sent run", "pull sent copy", "pull run copy"),
    *(f"export run --output out --to {to}" for to in ("adapter", "merged", "gguf")),
    "export run --output out --to adapter --each",
]
KINDS = {words.split()[0]: [w for w in COMMANDS if w.startswith(words[:4])] for words in COMMANDS}


# --- a command, and what it leaves ---


def call(words: str, injection: Injection | None = None) -> End:
    """Run a command in a process of its own; the message of its end is all that it printed."""

    def work() -> None:
        signal.alarm(120)  # ends a hang
        with SAID.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(HERE)
        status = command(words.split())
        sys.stdout.flush()
        STATUS.write_text(str(status))

    end = live(work, injection)
    end.message = SAID.read_text(errors="replace") + end.message * (end.status > 0)
    end.status = int(STATUS.read_text()) if end.status == 0 else end.status
    return end


def is_clear(end: End) -> bool:
    """Return whether a command succeeded, or failed with one sentence of chainlora."""
    errors = [line for line in end.message.splitlines() if line.startswith("chainlora: error: ")]
    is_odd = "Traceback" in end.message or "unexpected" in end.message
    return not is_odd and (end.status == 0 or (end.status == 1 and len(errors) == 1))


def look() -> tuple[End, dict[str, Any]]:
    """Read all runs, verify all files of their states, and load the current one.

    Returns how that ended, and the history, the states and a hash of logits of each run.
    """
    end = live(lambda: SAID.write_text(json.dumps(_read())))
    return end, json.loads(SAID.read_text()) if end.status == 0 else {}


def _read() -> dict[str, Any]:
    found = {}
    for run in filter(is_run, (HERE / name for name in RUNS)):
        history, logits = read_history(run), ""
        keys = [BASE, *(entry.key for entry in history.entries)]
        states = {key: state_at(run, history, key).verify().state.digest for key in keys}
        if run.name in ("run", "copy") and state_at(run, history).state.terms:
            values = chainlora.load_run(run)[0](torch.arange(16)[None]).logits.detach().numpy()
            logits = hashlib.sha256(values.tobytes()).hexdigest()
        found[run.name] = [timeless((run / "history.json").read_text()), states, logits]
    return found


def files_here() -> dict[str, Any]:
    """Return all files, without times."""
    try:
        return own(files_of(HERE))
    except ValueError as error:  # of JSON: a command has written to a damaged file
        return {"unreadable": str(error)}


def own(files: dict[str, Any]) -> dict[str, Any]:
    """Leave out the cache, empty locks, and pictures, which a kill at the end of a stage omits."""
    others = re.compile(r"cache/|.*/\.lock$|.*/training\.png")
    return {name: file for name, file in files.items() if not others.match(name)}


# --- walks ---


@dataclass
class Step:
    """A command of a walk: the files before it, and what it does to them."""

    words: str
    before: Path
    operations: int = 0
    files: dict[str, Any] = field(default_factory=dict)  # after it
    read: dict[str, Any] = field(default_factory=dict)  # after it
    histories: dict[str, list[Any]] = field(default_factory=dict)  # of each run, on the way

    @property
    def name(self) -> str:
        return self.words.split()[0]

    def restore(self) -> None:
        """Put the files before the command in place."""
        shutil.rmtree(HERE, ignore_errors=True)
        shutil.copytree(self.before, HERE)

    def differences(self) -> list[str]:
        """Return the files that are not as after the command.

        A matrix is a cache: its lines have no order, and missing ones are scored again.
        """
        now, found = files_here(), []
        for name in sorted(now.keys() | self.files.keys()):
            one, two = now.get(name), self.files.get(name)
            is_cached = name.endswith("/matrix.jsonl") and all(e in (two or ()) for e in one or ())
            found += [name] * (one != two and not is_cached)
        return found


def make_world() -> None:
    """Make a base, rows, configs, an adapter from elsewhere, and another run on the same base."""
    shutil.rmtree(HERE, ignore_errors=True)
    make_tiny_folder(HERE / "base", num_hidden_layers=1)
    draw = random.Random(0)
    for name in "abcdexo":
        texts = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 9))) for _ in range(16)]
        rows = [{"prompt": text, "completion": f" {draw.choice(WORDS)}"} for text in texts]
        write_rows(HERE / f"{name}.jsonl", rows)
    chain = {"ranks": [2, 2], "steps": [3, 2], "target_modules": ["q_proj", "down_proj"]}
    train = {"lr": 1e-2, "batch_size": 4, "save_every": 1, "eval_every": 1}
    tree = {"model": "base", "output": "run", "chain": chain, "train": train}
    for name, keys in (("one", "a"), ("two", "ab")):
        rows = [{"name": key, "data": {"train": f"{key}.jsonl", "validation": 3}} for key in keys]
        (HERE / f"{name}.yaml").write_text(json.dumps(tree | {"stages": rows}))
    for words in (
        f"train o.jsonl --model base --output other {KEYS}",
        f"train x.jsonl --model base --output elsewhere {KEYS} --train.seed 1",
        "export elsewhere --to adapter --output adapter",
    ):
        end = call(words)
        assert end.status == 0, end.message
    shutil.rmtree(HERE / "elsewhere")
    shutil.rmtree(NODES, ignore_errors=True)
    shutil.copytree(HERE, NODES / "world")


@lru_cache(1)
def walk(number: int) -> list[Step]:
    """Return the steps of a walk."""
    for old in NODES.glob("[0-9]*"):
        shutil.rmtree(old)
    Step("", NODES / "world").restore()
    (_, first), draw, steps = look(), random.Random(f"walk {number}"), list[Step]()
    for place in range(TRIES):
        last, first = (steps[-1].name, steps[-1].read) if steps else ("", first)
        kind = draw.choice([*KINDS, "extend"][1:]) if steps else "train"
        kind = draw.choice([kind, NEXT.get(last, kind)])
        step = do(draw.choice(KINDS[kind]), NODES / str(place), first)
        steps += [step] if step is not None else []
    return steps


def do(words: str, before: Path, first: dict[str, Any]) -> Step | None:
    """Do a command of a walk; return None, and undo it, if it is refused or changes nothing.

    `first` is what was read before it.
    """
    for name in OUTPUTS:
        shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(HERE, before)
    step, files = Step(words, before), files_here()
    end = call(words, Injection(HERE))
    assert is_clear(end), f"{words}: {end.message}"
    step.files, step.operations = files_here(), len(end.operations)
    if end.status != 0 or step.files == files:
        step.restore()
        return None
    reading, step.read = look()
    assert reading.status == 0, f"{words}: {reading.message}"
    seen = [(run, timeless(text)) for run, text in end.histories]
    seen += [(run, history) for read in (first, step.read) for run, (history, *_) in read.items()]
    for run, history in seen:
        step.histories.setdefault(run, []).append(history)
    return step
