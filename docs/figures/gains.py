"""The picture of soft knots: their gain over LoRA against tokens a trained parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from card import EDGE, WIDTH, Card
from evidence import BENCHMARKS, lines_of

from chainlora_lab.statistics.intervals import t_interval

BREAK_EVEN = 11  # tokens a trained parameter (benchmarks/lab)
PARAMETERS_A_RANK = 5780  # of the lab's model, all linear layers
SMOLLM2 = {  # folder of results: tokens a trained parameter (benchmarks/smollm2/README.md), rank
    "translations": (4.2, 1),
    "scripts": (32, 1),
    "long_rank4": (32, 4),
    "long": (127, 1),
}


@dataclass(frozen=True)
class Gain:
    """By how many nats the loss of soft knots of a rank is below that of a LoRA, seed by seed."""

    tokens: float  # a trained parameter
    rank: int
    series: str  # what a line joins
    gains: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.gains)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval; None of fewer than six seeds."""
        return t_interval(self.gains) if len(self.gains) >= 6 else None


def lab_gains(times: int) -> list[Gain]:
    """Return the gains of `knots: auto` in the lab over LoRA of `times` its rank, fresh seeds."""
    cells: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    settings = {}
    for cell in lines_of(BENCHMARKS / "lab/results/cells.jsonl"):
        if cell["config"]["held_out"] == "results" and cell["name"] in ("auto", "lora"):
            cells[cell["study"], cell["name"]][cell["config"]["seed"]] = cell["loss"]
            settings[cell["study"]] = cell["config"]
    found = []
    for study, config in settings.items():
        rank = config["arm"]["rank"]
        other = cells.get((study.replace(f"-r{rank}-", f"-r{times * rank}-"), "lora"), {})
        soft = cells[study, "auto"]
        seeds = sorted(soft.keys() & other.keys())
        tokens = config["steps"] * config["rows"] * config["length"] / (PARAMETERS_A_RANK * rank)
        if len(seeds) >= 6:
            plain = config["text"] == "gsm8k" and config["rows"] == 4
            series = f"r={rank}" if plain else "other"
            gains = tuple(other[seed] - soft[seed] for seed in seeds)
            found.append(Gain(tokens, rank, series, gains))
    return sorted(found, key=lambda gain: (gain.series, gain.tokens))


def smollm2_gains() -> list[Gain]:
    """Return the gains on SmolLM2-135M-Instruct over LoRA of equal rank, on test rows."""
    found = []
    for name, (tokens, rank) in SMOLLM2.items():
        losses: dict[str, dict[int, float]] = defaultdict(dict)
        for cell in lines_of(BENCHMARKS / "smollm2" / name / "results.jsonl"):
            if cell["kind"] == "cell" and cell["phase"] == "final":
                losses[cell["method"]][cell["seed"]] = cell["score"]
        gains = tuple(losses["lora"][seed] - losses["soft"][seed] for seed in losses["soft"])
        found.append(Gain(tokens, rank, name, gains))
    return found


def soft_knots() -> str:
    """Return the gain of soft knots over LoRA against tokens a trained parameter."""
    card = Card(706, "Soft knots against LoRA of the same and of twice the rank")
    card.text(EDGE, 28, "Soft knots against LoRA, same steps and rows", bold=True, size=16)
    text = "LoRA's loss less theirs, in nats: above 0, soft knots are ahead"
    card.text(EDGE, 50, text, kind="soft")
    plot = Plot(card)
    plot.axes()
    for gain in lab_gains(1):
        if gain.series == "other":
            plot.whisker(gain, "blue")
            card.dot(*plot.place(gain), "blue", hollow=True)
    plot.lines(lab_gains(1), "blue", card.dot)
    plot.lines(lab_gains(2), "vermilion", card.diamond)
    for gain in smollm2_gains():
        plot.whisker(gain, "green")
        card.square(*plot.place(gain), "green", hollow=gain.interval is None)
    x = plot.across(BREAK_EVEN) - 8
    for y, text in ((0.27, "break-even"), (0.256, f"{BREAK_EVEN} tokens")):
        card.text(x, plot.up(y) + 5, text, anchor="end")
    same, twice = ("of the", "same rank"), ("of twice", "the rank")
    for gain, kind, which in ((0.07, "blue", same), (-0.05, "vermilion", twice)):
        for place, text in enumerate(("against LoRA", *which)):
            y = plot.up(gain) + 18 * place
            card.text(plot.left + 6, y, text, kind=kind, bold=True)
    key = plot.bottom + 68
    card.dot(EDGE + 8, key - 5, "blue")
    card.text(EDGE + 24, key, "0.26M model on GSM8K, six seeds, 4 blocks a step")
    card.dot(EDGE + 8, key + 16, "blue", hollow=True)
    card.text(EDGE + 24, key + 21, "the same on Python text, or with 1 or 16 blocks")
    card.square(EDGE + 8, key + 37, "green")
    card.text(EDGE + 24, key + 42, "SmolLM2-135M-Instruct, rank 1, six seeds, earlier defaults")
    card.square(EDGE + 8, key + 58, "green", hollow=True)
    card.text(EDGE + 24, key + 63, "SmolLM2-135M-Instruct, one seed (left), two (rank 4)")
    text = "r: rank of the soft knots. Upright lines: 95 % t intervals."
    card.text(EDGE, key + 90, text, kind="soft")
    return card.svg()


class Plot:
    """Gains in nats, up, against tokens a trained parameter, in logarithms, to the right."""

    left, right, top, bottom = 52, WIDTH - 52, 72, 536
    least, most, low, high = 1.5, 800, -0.12, 0.28

    def __init__(self, card: Card):
        self.card = card

    def across(self, tokens: float) -> float:
        share = math.log(tokens / self.least) / math.log(self.most / self.least)
        return self.left + (self.right - self.left) * share

    def up(self, gain: float) -> float:
        share = (gain - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share

    def place(self, gain: Gain) -> tuple[float, float]:
        return self.across(gain.tokens), self.up(gain.mean)

    def axes(self) -> None:
        for value in (-0.1, 0.0, 0.1, 0.2):
            y, at_zero = self.up(value), value == 0
            kind, width = ("soft", 1.5) if at_zero else ("grid", 1)
            self.card.line(self.left, y, self.right, y, kind, width)
            text = "0" if at_zero else f"{value:+.1f}".replace("-", "−")
            self.card.text(self.left - 6, y + 5, text, anchor="end", kind="soft")
        for tokens in (3, 10, 30, 100, 300):
            x = self.across(tokens)
            self.card.line(x, self.bottom, x, self.bottom + 5, "soft")
            self.card.text(x, self.bottom + 21, str(tokens), anchor="middle", kind="soft")
        x = (self.left + self.right) / 2
        text = "training tokens per trained parameter"
        self.card.text(x, self.bottom + 41, text, anchor="middle", kind="soft")
        line = f"M{self.across(BREAK_EVEN):.5g} {self.top}V{self.bottom}"
        self.card.path(line, "ink", 1.5, ' stroke-dasharray="5 4"')

    def lines(self, gains: Sequence[Gain], kind: str, mark: Callable[..., None]) -> None:
        """Draw the points of each rank, joined, with the rank of the soft knots at the end."""
        for name in dict.fromkeys(gain.series for gain in gains if gain.series != "other"):
            mine = [gain for gain in gains if gain.series == name]
            points = [self.place(gain) for gain in mine]
            self.card.path("M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in points), kind, 1.5)
            x, y = points[-1]
            lower = 16 if (name, kind) == ("r=2", "blue") else 5  # beside it is SmolLM2's point
            self.card.text(x + 9, y + lower, name, kind=kind)
            for gain, point in zip(mine, points, strict=True):
                self.whisker(gain, kind)
                mark(*point, kind)

    def whisker(self, gain: Gain, kind: str) -> None:
        """Draw the interval, if there is one."""
        if gain.interval:
            x = self.across(gain.tokens)
            self.card.line(x, self.up(gain.interval[0]), x, self.up(gain.interval[1]), kind, 2)
