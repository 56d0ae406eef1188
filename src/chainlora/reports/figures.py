"""A matplotlib figure as a picture of a page: SVG, what a pointer finds, its numbers.

Points and table are read off the figure itself, so they hold what is drawn and nothing is said
twice. A colour of `_THEME` becomes a CSS variable, which has one value for light pages and another
for dark ones.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from chainlora.reports.tables import Table

OWN = "own--"  # before the ids of a picture; replaced where it is put on a page
_THEME = {
    "#222222": "ink",
    "#000000": "ink",
    "#444444": "soft",
    "#57606a": "soft",
    "#777777": "grey",
    "#bfc4ca": "grey",
    "#e6e6e6": "grid",
    "#b0b0b0": "grid",
    "#ffffff": "paper",
    "#0072b2": "blue",
    "#0969da": "blue",
    "#56b4e9": "sky",
    "#d55e00": "vermilion",
    "#cf222e": "vermilion",
    "#009e73": "green",
    "#1a7f37": "green",
    "#cc79a7": "purple",
    "#bf8700": "gold",
}
_STYLE: Any = {
    "text.parse_math": False,  # names of runs and methods are text: $ is a dollar
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "chainlora",  # the same figure, the same bytes
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.facecolor": "#FFFFFF",
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


@dataclass(frozen=True)
class Point:
    """A number of a figure: of which series, and at which place, in words and in shares of the
    figure's width and height from the top left. `bottom` is given where it is a whole line."""

    series: str
    at: str
    value: str
    text: str
    x: float
    y: float
    bottom: float | None = None
    order: float = 0.0  # of places along the axis


@dataclass(frozen=True)
class Picture:
    """A figure of a page. `wide` takes a row of its own."""

    title: str
    note: str
    svg: str
    points: list[list[Any]]  # x, y, text, and the lower end of a line
    table: Table
    wide: bool = False
    kind: str = "picture"


def draw(
    title: str,
    note: str,
    fill: Callable[[Any], Any],
    *,
    size: tuple[float, float] = (4.5, 3.1),
    style: dict[str, Any] | None = None,
    table: Table | None = None,
) -> Picture:
    """Return the picture that `fill` draws into an empty figure; it needs no display.

    `table` replaces the one that is read off the figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context((style or {}) | _STYLE):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
    return picture(title, note, figure, table=table)


def picture(
    title: str, note: str, figure: Any, *, table: Table | None = None, wide: bool = False
) -> Picture:
    """Return a figure as a picture."""
    from matplotlib import rc_context

    for axes in figure.axes:
        for place in ("left", "center"):  # the page has a title
            axes.set_title("", loc=place)
    out = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format")))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    found = [point for axes in panels for point in _points(axes)]
    return Picture(
        title=title,
        note=note,
        svg=_for_page(out.getvalue()),
        points=[[p.x, p.y, p.text, *([] if p.bottom is None else [p.bottom])] for p in found],
        table=table or _table(title, figure, found),
        wide=wide,
    )


def page_style() -> Any:
    """Return a context in which pyplot draws for a page."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


# --- SVG ---


def _for_page(svg: str) -> str:
    """Return the SVG without what a page does not want: declarations, sizes, colours, fonts."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', head)[0]
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<!--.*?-->\s*", "", rest, flags=re.DOTALL)
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", rest)
    rest = re.sub(r"#[0-9a-f]{6}\b", _variable, rest)
    return f'<svg {box} aria-hidden="true" focusable="false">{_own_ids(rest)}'


def _variable(found: re.Match[str]) -> str:
    name = _THEME.get(found[0])
    return f"var(--{name})" if name else found[0]


def _own_ids(svg: str) -> str:
    """Drop ids that nothing refers to, and mark the others, which each page makes its own."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{OWN}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{OWN}", svg)
    return re.sub(r">\s+<", "><", svg)


# --- what a pointer finds ---


def _points(axes: Any) -> Iterator[Point]:
    place = _Place(axes)
    for line in axes.get_lines():
        yield from _line_points(axes, line, place)
    for bars in axes.containers:
        for bar in getattr(bars, "patches", ()):
            x, y = bar.get_x() + bar.get_width() / 2, bar.get_height()
            if math.isfinite(y):
                name = bars.get_label()
                yield place.point(_series(axes, name), x, y)
    for mesh in axes.collections:
        if hasattr(mesh, "get_coordinates"):
            yield from _cell_points(axes, mesh, place)


def _line_points(axes: Any, line: Any, place: _Place) -> Iterator[Point]:
    name = line.get_gid() or line.get_label()
    xs, ys = line.get_xdata(orig=False), line.get_ydata(orig=False)
    if line.get_transform() != axes.transData:  # a line from end to end, such as a knot
        if not name.startswith("_"):
            is_level = line.get_transform() is axes.get_yaxis_transform()
            yield place.level(name, float(ys[0])) if is_level else place.rule(name, float(xs[0]))
        return
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            yield place.point(_series(axes, name), float(x), float(y))


def _cell_points(axes: Any, mesh: Any, place: _Place) -> Iterator[Point]:
    corners, values = mesh.get_coordinates(), mesh.get_array()
    if getattr(values, "ndim", 1) != 2:
        return
    middles = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    for row, line in zip(middles, values.filled(math.nan), strict=True):
        for (x, y), value in zip(row, line, strict=True):
            if math.isfinite(value):
                series = f"{_plain(axes.get_ylabel())} {_named(axes.yaxis, y)}"
                yield place.point(series, float(x), float(y), value=float(value))


def _series(axes: Any, name: str) -> str:
    return _plain(axes.get_ylabel()) if name.startswith("_") else name


def _plain(text: str) -> str:
    return " ".join(text.split())


def _named(axis: Any, value: float) -> str:
    """Return a place on an axis: the label of its tick where ticks have names, else the number."""
    from matplotlib.ticker import FuncFormatter

    formatter = axis.get_major_formatter()  # a FuncFormatter where `set_ticks` was given labels
    name = formatter(value) if isinstance(formatter, FuncFormatter) else ""
    return name or _number(value)


def _number(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e9
    return f"{value:.0f}" if whole else f"{value:.4g}"


class _Place:
    """Where numbers of some axes lie in their figure, and what they are called."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.to_figure = axes.transData + axes.get_figure().transFigure.inverted()

    def point(self, series: str, x: float, y: float, *, value: float | None = None) -> Point:
        """Return a number at a place; `value` where it is not the height."""
        right, up = self.to_figure.transform((x, y))
        at = _named(self.axes.xaxis, x)
        shown = _named(self.axes.yaxis, y) if value is None else _number(value)
        text = f"{series}: {shown}, {_plain(self.axes.get_xlabel())} {at}"
        where = round(float(right), 4), round(1 - float(up), 4)
        return Point(series, at, shown, text, *where, order=x)

    def rule(self, name: str, x: float) -> Point:
        """Return a line from the top of the axes to the bottom."""
        box = self.axes.get_position()
        right = self.to_figure.transform((x, self.axes.get_ylim()[0]))[0]
        at = _named(self.axes.xaxis, x)
        text = f"{name}, {_plain(self.axes.get_xlabel())} {at}"
        ends = round(1 - float(box.y1), 4), round(1 - float(box.y0), 4)
        return Point(name, at, "", text, round(float(right), 4), *ends)

    def level(self, name: str, y: float) -> Point:
        """Return a line from the left of the axes to the right: a number at every place."""
        up = self.to_figure.transform((self.axes.get_xlim()[0], y))[1]
        right = float(self.axes.get_position().x1)
        value = _named(self.axes.yaxis, y)
        return Point(name, "", value, f"{name}: {value}", round(right, 4), round(1 - float(up), 4))


# --- the table ---


def _table(title: str, figure: Any, points: list[Point]) -> Table:
    """Return a column a series and a row a place, or the other way round where that is longer."""
    numbers = [point for point in points if point.bottom is None]
    series = list(dict.fromkeys(point.series for point in numbers))
    places = list(dict.fromkeys(p.at for p in sorted(numbers, key=lambda p: p.order)))
    found: dict[tuple[str, str], dict[str, None]] = {}
    for point in numbers:
        found.setdefault((point.at, point.series), {})[point.value] = None

    def cell(at: str, name: str) -> str:
        return ", ".join(found.get((at, name), {}) or found.get(("", name), {})) or "–"

    rows = tuple((at, *(cell(at, name) for name in series)) for at in places if at)
    head = _plain(figure.axes[0].get_xlabel()) if figure.axes else ""
    return Table(title, (head, *series), rows)
