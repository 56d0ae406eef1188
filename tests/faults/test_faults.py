"""Faults of every class: a sample here, each file operation with ``CHAINLORA_FULL=1``.

`soak.py` runs the same by itself, and prints a table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak import classes, sampled

FULL = bool(os.environ.get("CHAINLORA_FULL"))
SAMPLES = {  # cases a class; a life takes about a second, a damaged file a hundredth
    "SIGKILL before": 5,
    "SIGKILL in": 3,
    "SIGKILL twice": 2,
    "Ctrl-C": 3,
    "power": 4,
    "disk full": 2,
    "read-only": 2,
    "EIO": 2,
    "export": 4,
    "two and three": 2,
    "one flipped bit": 60,
    "file of": 60,
    "base, rows": 2,
    "weights": 2,
}
BY_VERB = 8
NAMES = [
    "SIGKILL before every file operation",
    "SIGKILL in every write",
    "SIGKILL twice",
    "Ctrl-C or SIGTERM at every file operation",
    "power lost before every file operation",
    "disk full from every file operation on",
    "read-only from every file operation on",
    "EIO at every file operation",
    "export killed or disk full at every file operation",
    "two and three processes on one output",
    "Ctrl-C or SIGTERM at any moment",
    "base, rows, tokenizer or task changed before a resume",
    "weights, losses, gradients not finite",
    "one flipped bit in a file of a finished run",
    "one flipped bit in a file of an unfinished run",
    "one flipped bit in a file of a finished run, by verb",
    "one flipped bit in a file of an unfinished run, by verb",
    "file of a finished run cut, missing, swapped or extra",
    "file of an unfinished run cut, missing, swapped or extra",
    "one flipped bit in the base",
]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Iterator[dict]:
    """Every class of faults, on one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield classes(Path(tmp_path_factory.mktemp("faults")), None if FULL else 40)


def test_every_class_is_here(faults):
    assert set(faults) == set(NAMES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("name", NAMES)
def test_whatever_happens_the_result_is_right_or_the_fault_is_said(faults, name):
    sample = next(count for start, count in SAMPLES.items() if name.startswith(start))
    sample = BY_VERB if name.endswith("by verb") else sample
    ends: Counter[str] = Counter()
    for case, run in sampled(faults[name], None if FULL else sample):
        end = run()
        assert not end.startswith("wrong"), f"{case}: {end}"
        ends[end] += 1
    assert ends.total() > 0
