"""Tables and charts. matplotlib draws SVG for a page, or a file, without pyplot.

A chart for a page is 4 inches wide and its smallest text has 9 points, which is at least 10 pixels
on a phone. A colour of `_THEME` becomes a CSS variable, with one value for light pages and another
for dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chainlora.files import write_bytes

# Okabe–Ito: distinguishable with every kind of colour vision
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#777777"
ORANGE, INK = "#E69F00", "#222222"
TRAINING, VALIDATION = BLUE, VERMILION  # in every chart
_OF_STAGES = (GREEN, PURPLE, ORANGE, SKY)  # also of runs side by side
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, GREY)
SMALL = 9  # points; the smallest text of a page's chart
PAGE_SIZE = (4.0, 2.9)  # inches
MOST_LABELS = 12  # names or values that still fit
_MOST_NUMBERS = 7  # side by side
_LONGEST, _WIDEST = 18, 24  # characters: of a name, of names side by side
OWN = "own--"  # prefix of the ids of a picture; replaced when the picture is put on a page
STYLE: Any = {
    "text.parse_math": False,  # names of runs and methods are text: $ is a dollar
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "chainlora",  # the same figure, the same bytes
    "font.size": 10,
    "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "savefig.dpi": 150,
}
_FOR_PAGE: Any = {"figure.facecolor": "none", "axes.facecolor": "none"}
_THEME = {
    "#222222": "ink",
    "#000000": "ink",
    "#444444": "soft",
    "#57606a": "soft",
    "#777777": "grey",
    "#e6e6e6": "grid",
    "#b0b0b0": "grid",
    "#ffffff": "paper",
    "#0072b2": "blue",
    "#56b4e9": "sky",
    "#d55e00": "vermilion",
    "#cf222e": "vermilion",
    "#009e73": "green",
    "#1a7f37": "green",
    "#cc79a7": "purple",
    "#e69f00": "orange",
}
_ON_LIGHT, _ON_DARK = "#0A0A0A", "#F8F8F8"  # text in a cell, independent of the page's colours

Fill = Callable[[Any], object]  # draws into an empty figure
Draw = Callable[[Any], object]  # draws into axes


@dataclass(frozen=True)
class Table:
    """A table with a title. The first column is text, the others are numbers, all as strings."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown with its title as a heading."""
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        lines = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
            for cells in (self.heads, rule, *self.rows)
        ]
        note = ["", self.note] if self.note else []
        return "\n".join([f"### {self.title}", "", *lines, *note, ""])


def table_of(title: str, records: Sequence[Mapping[str, str]], note: str = "") -> Table:
    """Return a table of records that have the same keys, which become its heads."""
    heads = tuple(records[0]) if records else ()
    return Table(title, heads, tuple(tuple(record.values()) for record in records), note)


@dataclass(frozen=True)
class Picture:
    """A chart of a page, with a table of its numbers if no other table has them."""

    title: str
    note: str
    svg: str
    table: Table | None = None


def picture(
    title: str,
    note: str,
    draw: Draw,
    *,
    size: tuple[float, float] = PAGE_SIZE,
    table: Table | None = None,
) -> Picture:
    """Return a chart as a picture. `table` replaces the table of its lines' numbers."""
    style, unsaid = STYLE | _FOR_PAGE, ("Date", "Creator", "Format")
    figure, svg = _drawn(lambda figure: draw(figure.subplots()), size, style, "svg", unsaid)
    return Picture(title, note, _for_page(svg.decode()), table or numbers_of(title, figure))


def save(fill: Fill, size: tuple[float, float], path: str | Path) -> Path:
    """Draw into a PNG or SVG file. Without dates, so that the same chart gives the same bytes."""
    path = Path(path)
    unsaid = ["Date" if path.suffix == ".svg" else "Software"]
    _, content = _drawn(fill, size, STYLE, path.suffix[1:] or "png", unsaid)
    write_bytes(path, content)
    return path


def _drawn(
    fill: Fill, size: tuple[float, float], style: Any, kind: str, unsaid: Iterable[str]
) -> tuple[Any, bytes]:
    """Return a figure and its file, without the metadata `unsaid`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        figure.savefig(out, format=kind, metadata=dict.fromkeys(unsaid))
    return figure, out.getvalue()


def numbers_of(title: str, figure: Any) -> Table | None:
    """Return the numbers of a figure's named lines: a column per line, a row per x value."""
    columns: dict[str, dict[float, float]] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if not line.get_label().startswith("_"):
                points = zip(line.get_xdata(), line.get_ydata(), strict=True)
                columns.setdefault(line.get_label(), {}).update(points)
    if not columns:
        return None
    places = sorted({float(x) for points in columns.values() for x in points})
    rows = tuple(
        (short(x), *(short(points.get(x, math.nan)) for points in columns.values())) for x in places
    )
    return Table(title, (figure.axes[-1].get_xlabel(), *columns), rows)


def grid_table(
    title: str, rows: Sequence[str], columns: Sequence[str], grid: Any, corner: str
) -> Table:
    lines = zip(rows, grid, strict=True)
    body = tuple((name, *map(short, values)) for name, values in lines)
    return Table(title, (corner, *columns), body)


def short(value: float) -> str:
    """Format a number with four digits; NaN as a dash."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


# --- parts of charts ---


def whole_steps(axis: Any) -> None:
    """Put ticks only at whole numbers, as there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def line_style(place: int) -> dict[str, Any]:
    """Return the colour and dashes of a line, by its place among several."""
    dashes = ("-", "--", ":")[place // len(COLOURS) % 3]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes}


def stage_style(place: int) -> dict[str, Any]:
    """Return the colour and dashes of a stage, by its place in the run.

    They are the same in every chart, and differ from the colours of training and validation.
    """
    dashes = ("-", "--", ":")[place // len(_OF_STAGES) % 3]
    return {"color": _OF_STAGES[place % len(_OF_STAGES)], "linestyle": dashes}


def legend_above(axes: Any, **keys: Any) -> None:
    """Put the legend above the axes, so that it covers nothing."""
    where = {"loc": "outside upper left", "ncols": 2, "frameon": False, "handlelength": 1.4}
    axes.figure.legend(**where, **keys)


def heat_map(
    axes: Any,
    grid: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    least: float = 0.0,
    texts: Sequence[Sequence[str]] | None = None,
    turned: bool = False,
) -> None:
    """Draw a matrix of numbers, [rows, columns], as colours, with the first row at the top.

    NaN cells stay empty. Cells of small matrices have texts: their numbers, or `texts`, and then
    the scale has no numbers. The scale ends at the largest number, but not below `least`. With
    `turned`, for scores of which lower is better, the smallest number is the lightest.
    """
    top = max([least, *(value for line in grid for value in line if math.isfinite(value))]) or 1.0
    form = "{:.2f}" if top < 10 else "{:.3g}"
    edges = [[place - 0.5 for place in range(len(names) + 1)] for names in (columns, rows)]
    colours = "cividis_r" if turned else "cividis"
    image = axes.pcolormesh(
        *edges, grid, cmap=colours, vmin=0.0, vmax=top, edgecolors="face", linewidth=0.3
    )  # edges in the colour of the cells close the gaps between them
    axes.invert_yaxis()
    axes.grid(visible=False)
    name_places(axes.xaxis, columns)
    name_places(axes.yaxis, rows)
    if len(rows) <= MOST_LABELS and len(columns) <= _MOST_NUMBERS:
        _write_cells(
            axes, grid, texts or [[form.format(v) for v in line] for line in grid], turned, top
        )
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(label)
    if texts:
        bar.set_ticks([])
    bar.outline.set_visible(False)


def _write_cells(
    axes: Any,
    grid: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    turned: bool,
    top: float,
) -> None:
    """Write texts into the cells of a heat map, dark on light cells and light on dark cells."""
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if not math.isnan(value):
                is_light = value < 0.4 * top if turned else value > 0.6 * top
                ink = _ON_LIGHT if is_light else _ON_DARK
                style = {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink}
                axes.text(column, row, texts[row][column], **style)


def name_places(axis: Any, names: Sequence[str]) -> None:
    """Label the places 0, 1, … of an axis with at most `MOST_LABELS` names, rotated if wide."""
    every = -(-len(names) // MOST_LABELS)
    shown = [n if len(n) <= _LONGEST else f"{n[: _LONGEST - 1]}…" for n in names[::every]]
    is_wide = axis.axis_name == "x" and sum(map(len, shown)) > _WIDEST
    turned: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(range(0, len(names), every), shown, **(turned if is_wide else {}))


# --- SVG for a page ---


def _for_page(svg: str) -> str:
    """Adapt an SVG to a page: remove declarations, sizes and fonts; make colours variables.

    Unused ids are removed. The others get the prefix `OWN`, which each page replaces.
    """
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', head)[0]
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<!--.*?-->\s*", "", rest, flags=re.DOTALL)
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", rest)
    for color, name in _THEME.items():
        rest = re.sub(rf"(?<=: ){color}\b", f"var(--{name})", rest)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda m: f' id="{OWN}{m[1]}"' if m[1] in used else "", rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\1{OWN}", rest)
    rest = re.sub(r">\s+<", "><", rest)
    return f'<svg {box} aria-hidden="true" focusable="false">{rest}'


class Panel(NamedTuple):
    """A chart of a run: drawn alone for a page, and together with others into a file."""

    title: str
    note: str
    draw: Draw
    height: float = 1.0  # relative to the other panels of a file
    table: Table | None = None  # its numbers, if its lines do not give them
