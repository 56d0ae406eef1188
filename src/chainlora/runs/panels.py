"""The panels of a run's pictures: how training went, and what each link became.

Colours are of the Okabe–Ito palette and cividis, which readers with any kind of colour vision can
tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]

BLUE, VERMILION, GREEN, SKY, PURPLE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#777777",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, GREY)
_ON_LIGHT, _ON_DARK = "#0A0A0A", "#F8F8F8"  # text in a cell, whatever the page's colours
STYLE: Any = {
    "text.parse_math": False,  # names are text: $ is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.labelcolor": "#222222",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "savefig.dpi": 150,
}
_NOT_SCORES = {
    "event",
    "step",
    "link",
    "where",
    "split",
    "loss",
    "perplexity",
    "seconds",
    "tokens",
    "rows",
    "majority",
    "candidate_loss",
}
_MOST_SCORES = 3  # curves in the score panel; more cannot be told apart
_MOST_LABELS = 12  # links whose names or values still fit


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` steps, unbiased at its start."""
    decay = 1 - 2 / (max(span, 1) + 1)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


# Training


def score_names(evals: Sequence[Record]) -> list[str]:
    """Return the metrics that are worth a curve, the one that a task is judged by first."""
    names = {
        name: None
        for r in evals
        for name, value in r.items()
        if name not in _NOT_SCORES and isinstance(value, (int, float))
    }
    return list(names)[:_MOST_SCORES]


def draw_loss(
    axes: Any, steps: Sequence[Record], evals: Sequence[Record], *, each: str = "each step"
) -> None:
    """Draw the training loss, smoothed too, and the validation loss."""
    finite = [r for r in steps if math.isfinite(r["loss"])]
    at, losses = [r["step"] for r in finite], [r["loss"] for r in finite]
    if losses:
        smoothed = smooth(losses, span=max(9, len(losses) / 12))
        axes.plot(at, losses, color=SKY, alpha=0.5, linewidth=0.8, label=each)
        axes.plot(at, smoothed, color=BLUE, linewidth=1.8, label="smoothed")
    held_out = [r for r in evals if math.isfinite(r.get("loss", math.nan))]
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["loss"] for r in held_out],
            color=VERMILION,
            linewidth=1.2,
            marker="o",
            markersize=5,
            label="validation",
        )
    axes.set_ylabel("loss")
    narrow = {"fontsize": 9, "handlelength": 1.4, "columnspacing": 1.0, "handletextpad": 0.5}
    for handle in axes.legend(loc="upper right", ncols=3, **narrow).get_lines():
        handle.set(alpha=1, linewidth=1.8)
    _keep_room(axes, losses[len(losses) // 50 :] + [r["loss"] for r in held_out])


def _keep_room(axes: Any, values: Sequence[float]) -> None:
    """Cut single spikes off the top (the highest half per cent), and leave room for the legend."""
    if not values:
        return
    ordered = sorted(values)
    top, low = ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))], ordered[0]
    room = (top - low) or abs(top) or 1.0
    axes.set_ylim(low - 0.06 * room, top + 0.22 * room)


def draw_scores(axes: Any, evals: Sequence[Record], names: Sequence[str]) -> None:
    """Draw the validation scores that have these names."""
    from matplotlib.ticker import PercentFormatter

    everything = []
    for name, color, marker in zip(names, (GREEN, VERMILION, PURPLE), "osD", strict=False):
        points = [(r["step"], r[name]) for r in evals if math.isfinite(r.get(name, math.nan))]
        everything += [value for _, value in points]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.5,
            label=name,
        )
    fractions = all(0 <= value <= 1 for value in everything)
    if fractions:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(names) == 1:
        _label_points(axes, evals, names[0], "{:.1%}" if fractions else "{:.3g}")
        axes.set_ylabel(f"validation\n{names[0]}")
    else:
        axes.set_ylabel("validation")
        axes.legend(loc="best")
    axes.margins(y=0.25)
    if fractions:  # room for the labels, but no tick beyond all of them
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.09), min(high, 1.09))


def _label_points(axes: Any, evals: Sequence[Record], name: str, form: str) -> None:
    marked = [r for r in evals if name in r and r.get("where") in ("start", "knot", "end")]
    for r in {r["step"]: r for r in marked[-_MOST_LABELS:]}.values():
        axes.annotate(
            form.format(r[name]),
            (r["step"], r[name]),
            (0, 8),
            textcoords="offset points",
            ha="center" if r["step"] else "left",  # not over the axis
            fontsize=8.5,
            color="#222222",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )


def draw_rate(axes: Any, steps: Sequence[Record]) -> None:
    """Draw the learning rate."""
    for link in dict.fromkeys(r["link"] for r in steps):  # a line each, so that a restart is a gap
        points = [(r["step"], r.get("learning_rate", math.nan)) for r in steps if r["link"] == link]
        axes.plot(*zip(*points, strict=True), color=PURPLE, linewidth=1.5)
    axes.set_ylabel("learning\nrate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_ylim(bottom=0)


def mark_knots(panels: Sequence[Any], records: Sequence[Record]) -> None:
    """Draw a dashed line at each knot, and name each link above its part of the run."""
    from matplotlib.ticker import MaxNLocator

    knots = [r["step"] for r in records if r["event"] == "knot"]
    last = max(r["step"] for r in records if "step" in r)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for link, step in enumerate(knots):
            name = f"link {link} tied"
            axes.axvline(step, color=GREY, linestyle=(0, (4, 3)), linewidth=1, gid=name)
        axes.set_xlim(-0.04 * max(last, 1), 1.04 * max(last, 1))
    edges = [0, *knots, *([last] if not knots or last > knots[-1] else [])]
    if len(edges) - 1 > _MOST_LABELS:
        return
    for link, (start, end) in enumerate(pairwise(edges)):
        panels[0].annotate(
            f"link {link}",
            ((start + end) / 2, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color="#444444",
        )


# The chain


def draw_norms(axes: Any, links: Sequence[Record]) -> None:
    """Draw the size of each link."""
    norms = [link.get("delta_norm", math.nan) for link in links]
    _bars(axes, norms, BLUE)
    axes.set_title("size of each link", loc="left")
    axes.set_ylabel("‖ΔW‖ (Frobenius)")


def draw_ranks(axes: Any, links: Sequence[Record]) -> None:
    """Draw rank and effective rank of each link."""
    places = range(len(links))
    axes.bar(
        places,
        [link["rank"] for link in links],
        width=0.7,
        facecolor="none",
        edgecolor=GREY,
        linestyle="--",
        label="rank",
    )
    _bars(
        axes,
        [link.get("effective_rank", math.nan) for link in links],
        GREEN,
        label="effective rank",
        inside=True,
    )
    axes.set_ylim(top=1.25 * max(link["rank"] for link in links))
    axes.set_title("directions it uses", loc="left")
    axes.set_ylabel("rank, mean over modules")
    axes.legend(loc="upper right", ncols=2, fontsize=9)


def _bars(
    axes: Any,
    values: Sequence[float],
    color: str,
    label: str | None = None,
    *,
    inside: bool = False,
) -> None:
    bars = axes.bar(range(len(values)), values, width=0.7, color=color, label=label)
    if len(values) <= _MOST_LABELS:
        shown = ["" if math.isnan(value) else f"{value:.3g}" for value in values]
        where, ink = ("center", "#FFFFFF") if inside else ("edge", "#222222")
        axes.bar_label(bars, shown, label_type=where, padding=2, fontsize=8, color=ink)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    _tick_links(axes.xaxis, 0, len(values))
    side = 0.6 if len(values) > 1 else 1.2
    axes.set_xlim(-side, len(values) - 1 + side)
    axes.set_xlabel("link")


def draw_overlap(figure: Any, axes: Any, links: Sequence[Record]) -> None:
    """Draw the overlap of each link with each earlier one: the lower triangle of a matrix."""
    count = len(links)
    grid = [[math.nan] * (count - 1) for _ in range(count - 1)]
    for row, link in enumerate(links[1:]):
        for column, value in enumerate(link.get("overlap", ())):
            grid[row][column] = value
    known = [value for row in grid for value in row if not math.isnan(value)]
    top = max(0.1, *known)  # random subspaces overlap by rank / width, a few per cent
    draw_matrix(figure, axes, grid, top=top, first_row=1, label="mean squared cosine")
    axes.set_aspect("equal")
    axes.set_title("overlap of input subspaces", loc="left")
    axes.set_xlabel("earlier link")
    axes.set_ylabel("link")
    _tick_links(axes.xaxis, 0, count - 1)
    _tick_links(axes.yaxis, 1, count)


def draw_spectra(axes: Any, links: Sequence[Record]) -> None:
    """Draw the singular values of each link's update, their mean over the modules."""
    for place, link in enumerate(links):
        values = link.get("spectrum", ())
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS[place % len(COLOURS)],
            linestyle=("-", "--", ":")[place // len(COLOURS) % 3],
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=f"link {link['link']}",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value, mean over modules")
    _tick_links(
        axes.xaxis, 1, 1 + max((len(link.get("spectrum", ())) for link in links), default=0)
    )
    if len(links) <= _MOST_LABELS:
        axes.legend(loc="upper right", fontsize=9)


def draw_received(
    figure: Any, axes: Any, links: Sequence[Record], parts: Mapping[str, Sequence[str]]
) -> None:
    """Draw ‖ΔW‖ that each part of the model received from each link.

    `parts` are names of modules by the name of their part, such as a layer.
    """
    grid = [
        [
            math.sqrt(sum(link["modules"].get(name, 0.0) ** 2 for name in names))
            for names in parts.values()
        ]
        for link in links
    ]
    draw_matrix(figure, axes, grid, top=max(map(max, grid)) or 1.0, label="‖ΔW‖ (Frobenius)")
    axes.set_ylabel("link")
    _tick_links(axes.yaxis, 0, len(links))
    every = -(-len(parts) // _MOST_LABELS)
    axes.set_xticks(range(len(parts)), list(parts))  # all of them are named, some are shown
    for place, label in enumerate(axes.get_xticklabels()):
        label.set_visible(place % every == 0)


def draw_matrix(
    figure: Any,
    axes: Any,
    grid: Sequence[Sequence[float]],
    *,
    top: float,
    label: str,
    first_row: int = 0,
) -> None:
    """Draw numbers from 0 to `top` as colours, the first row above, and as text if it fits."""
    columns = [column - 0.5 for column in range(len(grid[0]) + 1)]
    rows = [row - 0.5 for row in range(first_row, first_row + len(grid) + 1)]
    image = axes.pcolormesh(
        columns, rows, grid, cmap="cividis", vmin=0, vmax=top, edgecolors="face", linewidth=0.3
    )  # edges of the cells' own colour: without them the page shines through in between
    axes.invert_yaxis()
    axes.grid(visible=False)
    if len(grid) <= _MOST_LABELS and len(grid[0]) <= _MOST_LABELS:
        for row, line in enumerate(grid, first_row):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    dark = value > 0.6 * top
                    text = f"{value:.2f}" if top < 10 else f"{value:.3g}"
                    axes.text(
                        column,
                        row,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=_ON_LIGHT if dark else _ON_DARK,
                    )
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _tick_links(axis: Any, start: int, end: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if end - start <= _MOST_LABELS:
        axis.set_ticks(range(start, end))
    else:
        axis.set_major_locator(MaxNLocator(integer=True))
