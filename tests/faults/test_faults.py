"""Faults of every class: a sample, or with ``CHAINLORA_FULL=1`` every file operation and many bits.

The whole takes about 36 minutes: ``CHAINLORA_FULL=1 python -m pytest tests/faults -n 4``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from changes import MORE
from classes import KILLS, make_world
from conftest import make_sentiment, make_tiny_folder
from damage import base_flips, flips, whole_files
from injection import Injection
from lives import fresh, live, run

FULL = bool(os.environ.get("CHAINLORA_FULL"))
# Cases of each class; a life takes about a second, a damaged file a hundredth.
SAMPLES = {
    "SIGKILL before every file operation": 5,
    "Ctrl-C or SIGTERM at every file operation": 3,
    "power lost before every file operation": 3,
    "disk full from every file operation on": 2,
    "export killed or disk full at every file operation": 4,
    "weights, losses, gradients not finite": 2,
    "one flipped bit in a file of a finished run": 60,
    "file of a finished run cut, missing, swapped or extra": 60,
}
SLOW = {
    "SIGKILL in every write": 3,
    "SIGKILL twice": 2,
    "Ctrl-C or SIGTERM at any moment": 3,
    "read-only from every file operation on": 2,
    "EIO at every file operation": 2,
    "two and three processes on one output": 2,
    "experiment killed, torn or disk full at every file operation": 3,
    "one flipped bit in a file of an unfinished run": 60,
    "file of an unfinished run cut, missing, swapped or extra": 60,
    "one flipped bit in the base": 60,
}


Cases = Iterable[tuple[str, Callable[[], str]]]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Iterable[dict[str, Cases]]:
    """Every class of faults with its cases, on one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield made(tmp_path_factory.mktemp("faults"))


def made(folder: Path) -> dict[str, Cases]:
    base, data = folder / "base", fresh(folder / "data")
    make_tiny_folder(base, num_hidden_layers=1)  # half the time of a life
    make_sentiment(data)
    world = make_world(base, data, folder)
    finished, stopped = fresh(folder / "finished") / "run", fresh(folder / "stopped") / "run"
    live(partial(run, world.config(finished.parent)))
    saving = [i for i, name in enumerate(world.operations) if "checkpoints/00000003" in name]
    live(partial(run, world.config(stopped.parent)), Injection(stopped.parent, "kill", saving[-1]))
    bits = 400 if FULL else 5
    found: dict[str, Cases] = {name: cases(world) for name, cases in (KILLS | MORE).items()}
    for kind, path in (("a finished", finished), ("an unfinished", stopped)):
        bit, scratch = f"one flipped bit in a file of {kind} run", fresh(folder / kind)
        found[bit] = flips(path, bits)
        found[f"file of {kind} run cut, missing, swapped or extra"] = whole_files(path, scratch)
    found["one flipped bit in the base"] = base_flips(base, bits)
    return found


def sampled(cases: Cases, sample: int) -> Cases:
    """Return `sample` of the cases, spread by chance but always the same, or all."""
    found = list(cases)
    if FULL or len(found) <= sample:
        return found
    return [found[place] for place in sorted(random.Random(0).sample(range(len(found)), sample))]


def test_every_class_is_here(faults):
    assert set(faults) == {*SAMPLES, *SLOW}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize(
    ("name", "sample"),
    [
        *SAMPLES.items(),
        *(pytest.param(name, sample, marks=pytest.mark.slow) for name, sample in SLOW.items()),
    ],
)
def test_whatever_happens_the_result_is_right_or_the_fault_is_said(faults, name, sample):
    cases = sampled(faults[name], sample)
    assert cases
    for case, happen in cases:
        end = happen()
        assert not end.startswith("wrong"), f"{case}: {end}"
