"""An SVG card: text and shapes by hand, in the colours of the reader's scheme.

The card has a background of its own, so it is legible where the scheme of the page is not that of
the browser. Text stays text in a generic font, 14 units high or more: of a card 480 wide that is
10 pixels on a phone. Colours have a contrast of 4.5 as text and of 3 as shapes.
"""

from __future__ import annotations

from html import escape

# name: light, dark
COLOURS = {
    "paper": ("#ffffff", "#0d1117"),
    "edge": ("#d0d7de", "#3d444d"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "grid": ("#d8dee4", "#30363d"),
    "blue": ("#0072b2", "#58a6e8"),
    "vermilion": ("#c24e00", "#f0883e"),
    "green": ("#00795a", "#3fb98a"),
}
WIDTH, EDGE = 480, 16  # of each card; its margin
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"


class Card:
    """Shapes and text, `WIDTH` wide and `height` high; `title` is for screen readers."""

    def __init__(self, height: float, title: str):
        self.height, self.title = height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        kind: str = "ink",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        weight = ' font-weight="600"' if bold else ""
        big = "" if size == 14 else f' font-size="{size}"'
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}"{where}{weight}{big}>{escape(text)}</text>'
        )

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        size = f'width="{width:.5g}" height="{height:g}"'
        self.parts.append(f'<rect x="{x:.5g}" y="{y:g}" {size} class="{kind}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draw a state of a run: `box`, `now` for the current one, `gone` for an undone one."""
        size = f'width="{width:g}" height="{height:g}" rx="8"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"/>')

    def line(
        self, x: float, y: float, to_x: float, to_y: float, kind: str, width: float = 1
    ) -> None:
        self.path(f"M{x:.5g} {y:.5g}L{to_x:.5g} {to_y:.5g}", kind, width)

    def interval(self, low: float, high: float, y: float, kind: str, rise: int) -> None:
        """Draw a line between two ends, each marked by an upright line of twice this rise."""
        self.line(low, y, high, y, kind, 3)
        for end in (low, high):
            self.line(end, y - rise, end, y + rise, kind, 2)

    def path(self, path: str, kind: str, width: float = 1, extra: str = "") -> None:
        self.parts.append(f'<path d="{path}" class="{kind}-line" stroke-width="{width:g}"{extra}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, *, dashed: bool) -> None:
        """Draw an arrow down; it leaves and arrives upright."""
        middle = (y + to_y) / 2
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        curve = f"M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y - 3:g}"
        self.path(curve, "soft", 1.5, f'{dashes} marker-end="url(#soft)"')

    def bow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Draw an arrow up; it leaves sideways and arrives upright."""
        curve = f"M{x:g} {y:g}C{to_x:g} {y:g} {to_x:g} {y:g} {to_x:g} {to_y + 4:g}"
        self.path(curve, "blue", 2, ' marker-end="url(#blue)"')

    def dot(
        self, x: float, y: float, kind: str, *, radius: float = 5, hollow: bool = False
    ) -> None:
        name = f"{kind}-line hollow" if hollow else kind
        self.parts.append(f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{radius:g}" class="{name}"/>')

    def diamond(self, x: float, y: float, kind: str, *, hollow: bool = False) -> None:
        name = f"{kind}-line hollow" if hollow else kind
        ends = f"M{x - 7:.5g} {y:.5g}l7 -7l7 7l-7 7z"
        self.parts.append(f'<path d="{ends}" class="{name}"/>')

    def square(self, x: float, y: float, kind: str, *, hollow: bool = False) -> None:
        name = f"{kind}-line hollow" if hollow else kind
        place = f'x="{x - 5:.5g}" y="{y - 5:.5g}"'
        self.parts.append(f'<rect {place} width="10" height="10" class="{name}"/>')

    def svg(self) -> str:
        light, dark = (_style(place) for place in (0, 1))
        marker = 'viewBox="0 0 8 8" refX="6" refY="4" markerUnits="userSpaceOnUse"'
        heads = "".join(
            f'<marker id="{name}" {marker} markerWidth="10" markerHeight="10" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" class="{name}"/></marker>'
            for name in ("soft", "blue")
            if any(f"url(#{name})" in part for part in self.parts)
        )
        size = f'width="{WIDTH:g}" height="{self.height:g}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {WIDTH:g} {self.height:g}" role="img" '
            f'font-family="{escape(FONT)}" font-size="14">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{light}.hollow{{stroke-width:2}}.gone{{stroke-dasharray:5 4}}",
            f"@media (prefers-color-scheme: dark){{{dark}}}</style>",
            f"<defs>{heads}</defs>" if heads else "",
            f'<rect x=".5" y=".5" width="{WIDTH - 1:g}" height="{self.height - 1:g}" '
            'rx="8" class="card"/>',
            *self.parts,
            "</svg>\n",
        ]
        return "\n".join(filter(None, lines))


def _style(place: int) -> str:
    """Return the rules of the light scheme (0) or the dark one (1)."""
    colour = {name: pair[place] for name, pair in COLOURS.items()}
    rules = [f".{n}{{fill:{c}}}.{n}-line{{fill:none;stroke:{c}}}" for n, c in colour.items()]
    paper, edge, blue, soft = (colour[name] for name in ("paper", "edge", "blue", "soft"))
    return "".join(rules) + (
        f".hollow{{fill:{paper}}}.card{{fill:{paper};stroke:{edge}}}"
        f".box{{fill:{paper};stroke:{soft}}}.gone{{fill:none;stroke:{soft}}}"
        f".now{{fill:{paper};stroke:{blue};stroke-width:3}}"
    )
