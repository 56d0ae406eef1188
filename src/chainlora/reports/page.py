"""A page: sections of text, figures and tables, rendered into one HTML file.

The file loads nothing, and its content security policy forbids it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from chainlora.files import make_folder, write_text
from chainlora.reports.figures import OWN, Picture
from chainlora.reports.tables import Table


@dataclass(frozen=True)
class Text:
    """Markdown."""

    markdown: str
    kind: str = "text"


@dataclass(frozen=True)
class Tiles:
    """A few numbers to see first: (what it is, the number)."""

    values: Sequence[tuple[str, str]]
    kind: str = "tiles"


@dataclass(frozen=True)
class Numbers:
    """A table, folded away unless `is_open`."""

    table: Table
    is_open: bool = True
    kind: str = "numbers"


@dataclass(frozen=True)
class Listing:
    """Text as it stands in a file, folded away."""

    title: str
    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class Answer:
    """What was asked, what was expected if that is known, and what was answered when."""

    prompt: str
    expected: str | None
    answers: Sequence[tuple[str, str]]
    kind: str = "answer"


Block = Text | Tiles | Numbers | Listing | Answer | Picture


@dataclass(frozen=True)
class Column:
    """Blocks that belong together under a heading; an empty one where there is one column."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A section. Its columns stand side by side where the screen is wide enough."""

    title: str
    columns: Sequence[Column]
    note: str = ""

    @property
    def anchor(self) -> str:
        """Return what the section is linked by."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    """A page: its title, what it says in one sentence, and its sections."""

    title: str
    lead: str
    sections: Sequence[Section]


def write_page(page: Page, path: Path) -> int:
    """Write a page; return its size in bytes."""
    text = render(page)
    make_folder(path.parent)
    write_text(path, text)
    return len(text.encode("utf-8"))


def render(page: Page) -> str:
    """Return a page as HTML. The same page gives the same text."""
    counter = iter(range(10**6))

    def svg(picture: Picture) -> Markup:
        return Markup(picture.svg.replace(OWN, f"f{next(counter)}-"))

    template = _environment().get_template("page.html")
    sections = [each for each in page.sections if any(c.blocks for c in each.columns)]
    return template.render(
        page=page, sections=sections, svg=svg, style=_file("page.css"), script=_file("page.js")
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: str(_file(name))),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["markdown"] = _html
    return environment


def _file(name: str) -> Markup:
    folder = resources.files("chainlora.reports") / "assets"
    return Markup((folder / name).read_text(encoding="utf-8"))


def _html(markdown: str) -> Markup:
    """Return Markdown as HTML. HTML inside it is shown as it stands."""
    from markdown_it import MarkdownIt

    return Markup(MarkdownIt("commonmark", {"html": False}).render(markdown))


def pictures(sections: Sequence[Section]) -> list[Picture]:
    """Return the figures of some sections."""
    blocks: list[Any] = [b for s in sections for c in s.columns for b in c.blocks]
    return [block for block in blocks if isinstance(block, Picture)]
