"""A page: sections of text, charts and tables, rendered into one HTML file, or into Markdown.

The HTML file loads nothing, and its content security policy forbids it to.
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
    """Return Markdown that says words as they are, whatever marks are in them."""
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", words)


@dataclass(frozen=True)
class Tiles:
    """A few numbers to see first: (what it is, the number)."""

    values: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Numbers:
    """A table. A file is named after `name`."""

    table: Table
    name: str = ""


@dataclass(frozen=True)
class Listing:
    """Text as it stands in a file, folded away."""

    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What was asked, of which stage, what was expected if that is known, and what was answered."""

    prompt: str
    expected: str | None
    answers: Sequence[Said]
    stage: str = ""


Block = Text | Tiles | Numbers | Listing | Answer | Picture


@dataclass(frozen=True)
class Column:
    """Blocks that belong together under a heading; an empty one where there is one column."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A section. Its columns stand side by side where the screen is wide enough. One that is for
    specialists is folded."""

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
    """Return a section of one column, with the blocks that have something in them."""
    kept = [b for b in blocks if b and not (isinstance(b, Numbers) and not b.table.rows)]
    return Section(title, [Column("", kept)], is_folded)


@dataclass(frozen=True)
class Page:
    """A page: its title, what it says in one sentence, its sections. Empty ones are left out."""

    title: str
    lead: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Return a page as HTML. The same page gives the same text."""
    return _rendered("page.html", page.sections, page=page, style=_file("page.css"))


def render_part(sections: Sequence[Section]) -> str:
    """Return sections as HTML for a page of somebody else's, styled by `part_style`."""
    return f'<div class="chainlora">{_rendered("sections.html", sections)}</div>'


def part_style() -> str:
    """Return the style of `render_part`, which is that of a page, for nothing around it."""
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

    `pictures` are files of charts to show, by the title of the section that they stand in.
    """
    parts = [f"# {page.title}\n"]
    for section in page.sections:
        again = f"### {section.title}\n\n"  # a table of the section's name needs none of its own
        found = []
        for block in section.blocks:
            if isinstance(block, Text):
                found.append(block.markdown.strip() + "\n")
            elif isinstance(block, Numbers):
                found.append(block.table.markdown().removeprefix(again))
        found += [f"![{name}]({name})\n" for name, of in pictures.items() if of == section.title]
        if found:
            parts += [f"## {section.title}\n", *found]
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
    commonmark = MarkdownIt("commonmark", {"html": False})  # HTML inside is shown as it stands
    environment.filters["markdown"] = lambda text: Markup(commonmark.render(text))
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment


def _file(name: str) -> Markup:
    folder = resources.files("chainlora_pages") / "assets"
    return Markup((folder / name).read_text(encoding="utf-8"))
