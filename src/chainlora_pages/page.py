"""A page: sections of text, charts and tables, rendered as one HTML file or as Markdown.

The HTML file loads no other resource; its content security policy enforces this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from chainlora.evaluation.answers import Said
from chainlora_pages.charts import OWN, Picture, Table


@dataclass(frozen=True)
class Text:
    """Markdown."""

    markdown: str


def as_text(words: str) -> str:
    """Escape a text for Markdown."""
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", words)


@dataclass(frozen=True)
class Tiles:
    """A few numbers for the top of a page: (name, value)."""

    values: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Numbers:
    """A table. `name` names the file of the table, if there is one."""

    table: Table
    name: str = ""


@dataclass(frozen=True)
class Texts:
    """A table of texts and answers; on a narrow screen its rows are below each other."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Said]]


@dataclass(frozen=True)
class Listing:
    """The text of a file, folded."""

    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A prompt of a stage, the expected answer if it is known, and the answers."""

    prompt: str
    expected: str | None
    answers: Sequence[Said]
    stage: str = ""


Block = Text | Tiles | Numbers | Texts | Listing | Answer | Picture


@dataclass(frozen=True)
class Column:
    """Blocks under a heading. The heading of a single column is empty."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A section with columns, side by side if the screen is wide enough.

    Sections for specialists are folded.
    """

    title: str
    columns: Sequence[Column]
    is_folded: bool = False

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().split())

    @property
    def blocks(self) -> list[Block]:
        return [block for column in self.columns for block in column.blocks]


def section(title: str, *blocks: Block | None, is_folded: bool = False) -> Section:
    """Return a section of one column without empty blocks."""
    kept = [b for b in blocks if b and not (isinstance(b, Numbers) and not b.table.rows)]
    return Section(title, [Column("", kept)], is_folded)


@dataclass(frozen=True)
class Page:
    """A page: its title, a sentence that sums it up, its sections. Empty sections are omitted."""

    title: str
    lead: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Return a page as HTML. The same page gives the same text."""
    return _rendered("page.html", page.sections, page=page, style=_file("page.css"))


def render_part(sections: Sequence[Section]) -> str:
    """Return sections as HTML for another page; `part_style` is their style."""
    return f'<div class="chainlora">{_rendered("sections.html", sections)}</div>'


def part_style() -> str:
    """Return the style of a page, limited to the output of `render_part`."""
    style = re.sub(r"(:root|body) \{", "& {", _file("page.css"))
    return f".chainlora {{ {style} }}"


def _rendered(template: str, sections: Sequence[Section], **values: Any) -> str:
    counter = iter(range(10**6))

    def svg(picture: Picture) -> Markup:
        return Markup(picture.svg.replace(OWN, f"f{next(counter)}-"))

    kept = [section for section in sections if section.blocks]
    return _environment().get_template(template).render(sections=kept, svg=svg, **values)


def markdown(page: Page, pictures: Mapping[str, str]) -> str:
    """Return the texts and tables of a page as Markdown.

    `pictures` maps files of charts to the titles of their sections.
    """
    parts = [f"# {page.title}\n"]
    for section in page.sections:
        heading = f"### {section.title}\n\n"  # removed from a table with the section's title
        blocks = []
        for block in section.blocks:
            if isinstance(block, Text):
                blocks.append(block.markdown.strip() + "\n")
            elif isinstance(block, Numbers):
                blocks.append(block.table.markdown().removeprefix(heading))
        blocks += [f"![{name}]({name})\n" for name, of in pictures.items() if of == section.title]
        if blocks:
            parts += [f"## {section.title}\n", *blocks]
    return "\n".join(parts)


@cache
def _environment() -> jinja2.Environment:
    from markdown_it import MarkdownIt

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: str(_file(name))),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    commonmark = MarkdownIt("commonmark", {"html": False})  # HTML in it is escaped
    environment.filters["markdown"] = lambda text: Markup(commonmark.render(text))
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment


def _file(name: str) -> Markup:
    folder = resources.files("chainlora_pages") / "assets"
    return Markup((folder / name).read_text(encoding="utf-8"))
