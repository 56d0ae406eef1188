"""The picture of the demo: what three models answer to a shop's questions, and an update."""

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

from chainlora.cli.demo import newest_answers

HEADS = ("trained on top", "extend", "february pruned")
UPDATED = {  # questions, and what the update did to their rows
    "Is there a newsletter?": "corrected",
    "Which lamp did Mia Holm order?": "erased; verify finds no such row",
}
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
    learned = newest_answers(shop)
    card = Card(0, "What a model answers after three months of a shop's FAQ, learned in three ways")
    y = _counts(card, found, _heads(card, HEADS, 78))
    for question in ASKED:
        told = [*found["answers"][question].values()]
        marks = ["✓" if text == learned[question] else "✗" for text in told]
        if question in shop["months"]["february"]:
            marks[-1] = "–"
        (month,) = (name for name, faq in shop["months"].items() if question in faq)
        cells = [f"{mark} {text}" for mark, text in zip(marks, told, strict=True)]
        kinds = [KINDS[mark] for mark in marks]
        y = _row(card, y, f"{month.capitalize()}: {question}", cells, kinds)
    question = shop["ordinary"][-1]
    y = _row(card, y, question, [*found["answers"][question].values()], ["ink"] * 3)
    card.height = _updated(card, found, y) + 6
    return card.svg()


def _updated(card: Card, found: dict[str, Any], y: float) -> float:
    """Draw the answers before and after the update; return where they end."""
    assert found["differences"] == []  # the picture says that `verify` finds none
    card.line(EDGE, y, WIDTH - EDGE, y, "grid")
    y = _heads(card, ("before update", "after update", "row of March"), y + 22)
    for question, done in UPDATED.items():
        cells = [*found["updated"][question].values(), done]
        y = _row(card, y, question, cells, ["ink", "ink", "green"])
    return y


def _heads(card: Card, heads: tuple[str, ...], y: float) -> float:
    for place, head in enumerate(heads):
        card.text(_x(place), y, head, bold=True)
    return y + 10


def _counts(card: Card, found: dict[str, Any], y: float) -> float:
    """Draw the title and how many answers are right; return where they end."""
    card.text(EDGE, 28, "A shop's FAQ, a month at a time", bold=True, size=16)
    card.text(EDGE, 49, "Answers of SmolLM2-135M-Instruct, after March", kind="soft")
    about = "Right, of eight trained questions + of eight other phrasings"
    card.text(EDGE, y + 20, about, kind="soft")
    for line, (month, right) in enumerate(found["right"].items()):
        for place, way in enumerate(right):
            count = f"{month.capitalize()}: {right[way]} + {found['unseen'][month][way]}"
            card.text(_x(place), y + 39 + LINE * line, count)
    return y + 30 + LINE * len(found["right"])


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
