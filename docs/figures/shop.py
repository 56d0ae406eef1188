"""The picture of the demo: what three models answer to a shop's questions, and to ordinary ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from importlib.resources import files
from typing import Any

from card import EDGE, WIDTH, Card

HEADS = ("trained on top", "extend", "february pruned")
ASKED = ("Where is your shop?", "How do I reset the Luma lamp?", "Do you sell gift cards?")
KINDS = {"✓": "green", "✗": "vermilion", "–": "soft"}  # –: taken out
LETTERS = 19  # of a line of an answer, in a third of the card
LINE = 19


def answers() -> dict[str, Any]:
    """Run the demo, some minutes; return what its `--json` gives."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "chainlora", "demo", "--output", f"{folder}/run", "--json"]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def demo(found: dict[str, Any] | None = None) -> str:
    """Return the picture as an SVG."""
    found = found or answers()
    shop = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))
    learned: dict[str, str] = {}
    for month in shop["months"].values():
        learned |= month
    card = Card(0, "What a model answers after three months of a shop's FAQ, learned in three ways")
    y = _heads(card)
    months = found["right"]
    for place in range(len(HEADS)):
        for line, (month, right) in enumerate(months.items()):
            count = [*right.values()][place]
            card.text(_x(place), y + 39 + LINE * line, f"{month.capitalize()}: {count}")
    card.text(EDGE, y + 20, "Right answers, of eight a month", kind="soft")
    y += 30 + LINE * len(months)
    for question in ASKED:
        told = [*found["answers"][question].values()]
        marks = ["✓" if text == learned[question] else "✗" for text in told]
        if question in shop["months"]["february"]:
            marks[-1] = "–"
        (month,) = (name for name, faq in shop["months"].items() if question in faq)
        cells = [f"{mark} {text}" for mark, text in zip(marks, told, strict=True)]
        kinds = [KINDS[mark] for mark in marks]
        y = _row(card, y, f"{month.capitalize()}: {question}", cells, kinds)
    for question in shop["ordinary"][1:]:
        cells = list(found["answers"][question].values())
        y = _row(card, y, question, cells, ["ink"] * 3)
    card.height = y + 6
    return card.svg()


def _heads(card: Card) -> float:
    card.text(EDGE, 28, "A shop's FAQ, a month at a time", bold=True, size=16)
    card.text(EDGE, 49, "SmolLM2-135M-Instruct, asked what it was trained on", kind="soft")
    for place, head in enumerate(HEADS):
        card.text(_x(place), 78, head, bold=True)
    return 88


def _row(card: Card, y: float, head: str, cells: list[str], kinds: list[str]) -> float:
    """Draw a question and the answers below it; return where they end."""
    card.line(EDGE, y, WIDTH - EDGE, y, "grid")
    card.text(EDGE, y + 20, head, kind="soft")
    lines = [textwrap.wrap(cell, LETTERS, max_lines=3, placeholder=" …") for cell in cells]
    for place, (own, kind) in enumerate(zip(lines, kinds, strict=True)):
        for number, text in enumerate(own):
            card.text(_x(place), y + 20 + LINE * (number + 1), text, kind=kind)
    return y + 30 + LINE * max(map(len, lines))


def _x(place: int) -> float:
    return EDGE + place * (WIDTH - 2 * EDGE) / len(HEADS)
