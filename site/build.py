"""Build the documentation site: `make site`, or python site/build.py OUTPUT. No network is used.

Pages are the repository's own Markdown files at their own paths, so that one link is right here and
on a code host. The start page is a part of the README; `reference/` is generated from the code.
Every warning of Sphinx is an error, and so is a link in the built pages that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import yaml
from sphinx.cmd.build import main as sphinx

import chainlora
from chainlora.cli.main import cli
from chainlora.config.messages import foreign_keys

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDERS = ("docs", "benchmarks", "examples")  # whose files pages link to
START = ("Start", "Three uses", "Limits", "Where next")  # sections of the README; others have pages
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "CITATION.cff")


def main() -> int:
    """Build the site into the folder that is named; return an exit status."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/site")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        lay_out(source)
        shutil.rmtree(output, ignore_errors=True)
        options = ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(Path(scratch) / "cache")]
        status = int(sphinx([*options, str(source), str(output)]))
    broken = list(broken_links(output))
    for link in broken:
        print(link, file=sys.stderr)
    pages = len(list(output.rglob("*.html")))
    print(f"{pages} pages in {output}, {len(broken)} broken links")
    return 1 if status or broken else 0


def lay_out(source: Path) -> None:
    """Write all pages, and the files that they link to, into a folder."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("runs"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    nav = yaml.safe_load((HERE / "nav.yaml").read_text(encoding="utf-8"))
    (source / "index.md").write_text(start_page(readme) + toctrees(nav, source), encoding="utf-8")
    for page in source.rglob("*.md"):  # links to the repository's README lead to the start page
        up = "../" * (len(page.relative_to(source).parts) - 1)
        text = page.read_text(encoding="utf-8").replace(f"]({up}README.md", f"]({up}index.md")
        page.write_text(text, encoding="utf-8")
    (source / "reference").mkdir()
    for name, make in (("commands", commands_page), ("names", names_page), ("keys", keys_page)):
        (source / f"reference/{name}.md").write_text(make(), encoding="utf-8")


def start_page(readme: str) -> str:
    """Return the README's beginning and its sections `START`."""
    beginning, *sections = re.split(r"^## (.*\n)", readme, flags=re.MULTILINE)
    texts = dict(zip(map(str.strip, sections[::2]), sections[1::2], strict=True))
    return beginning + "".join(f"## {title}\n{texts[title]}\n" for title in START)


def toctrees(nav: dict[str, list[str | dict[str, str]]], source: Path) -> str:
    """Return the navigation as Sphinx reads it."""
    named = {page for entries in nav.values() for each in entries for page in pages_named(each)}
    blocks = []
    for caption, entries in nav.items():
        listed = "\n".join(line for each in entries for line in expand(each, source, named))
        blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n")
    return "\n".join(blocks)


def pages_named(entry: str | dict[str, str]) -> list[str]:
    """Return the pages that an entry of the navigation names itself."""
    return list(entry.values()) if isinstance(entry, dict) else [entry]


def expand(entry: str | dict[str, str], source: Path, named: set[str]) -> list[str]:
    """Return the pages that an entry of the navigation stands for, with its title if it has one."""
    if isinstance(entry, dict):
        return [f"{title} </{page}>" for title, page in entry.items()]
    if not entry.endswith("*"):
        return [f"/{entry}"]
    found = sorted((source / entry).parent.rglob("*.md"))
    pages = [file.relative_to(source).with_suffix("").as_posix() for file in found]
    return [f"/{page}" for page in pages if page not in named]


# --- reference ---


def commands_page() -> str:
    """Return a page of every command and its options."""
    return "\n".join(["# Commands\n", *_command(cli, "chainlora")])


def _command(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[str]:
    context = click.Context(command, parent, info_name=name, **command.context_settings)
    if name != "chainlora":
        yield f"{'##' if name.count(' ') == 1 else '###'} {name}\n"
    yield f"{_text(command.help or '')}\n"
    pieces = [piece for piece in command.collect_usage_pieces(context) if piece]
    yield f"```console\n$ {' '.join([name, *pieces])}\n```\n"
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    yield from (_option(each, context) for each in options)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            if (found := command.get_command(context, child)) is not None:
                yield from _command(found, f"{name} {child}", context)


def _option(option: click.Option, context: click.Context) -> str:
    shown = option.get_help_record(context) or ("", option.help or "")
    names, meaning = (_text(part) for part in shown)
    return f"`{names}`\n: {meaning}\n"


def _text(text: str) -> str:
    """Return help as one paragraph a paragraph, without click's own marks."""
    paragraphs = text.replace("\b", "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def names_page() -> str:
    """Return a page of every public name, with its signature and docstring."""
    lines = [
        "# Public names\n",
        "What each is for, in groups: [Python](../docs/python.md).\n",
        "```{eval-rst}",
    ]
    for name in sorted(set(chainlora.__all__) - {"__version__"}, key=str.lower):
        value = getattr(chainlora, name)
        kind = "class" if isinstance(value, type) else "function"
        directive = f".. auto{kind}:: {value.__module__}.{name}"
        lines += [directive, *(["   :members:"] if name in ("Chain", "Link") else []), ""]
    return "\n".join([*lines, "```\n"])


def keys_page() -> str:
    """Return a page of the keys of other tools: a list, since a table is too wide for a phone."""
    lines = ["# All keys of other tools\n", "In groups and by example: [keys](../docs/keys.md).\n"]
    for key, entry in sorted(foreign_keys().items()):
        here = f"[`{entry.ours}`](../docs/config.md)" if entry.ours else "–"
        values = (f"`{theirs}` is `{ours}`" for theirs, ours in entry.values.items())
        said = "; ".join([here, *filter(None, [entry.say]), *values])
        lines.append(f"`{key}` ({', '.join(entry.tools)})\n: {said}\n")
    return "\n".join(lines)


# --- links ---


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value for key, value in attributes if value}
        self.links += [values[key] for key in ("href", "src") if key in values]
        self.anchors |= {values[key] for key in ("id", "name") if key in values}


def broken_links(site: Path) -> Iterator[str]:
    """Yield each link within the site that leads nowhere, with its page."""
    pages = {}
    for file in site.rglob("*.html"):
        pages[file] = page = _Page()
        page.feed(file.read_text(encoding="utf-8"))
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = file
            if parts.path:
                target = Path(os.path.normpath(file.parent / unquote(parts.path)))
            heading = unquote(parts.fragment)
            if not target.is_file():
                yield f"{file.relative_to(site)}: {link}"
            elif heading and target in pages and heading not in pages[target].anchors:
                yield f"{file.relative_to(site)}: {link} (no such heading)"


if __name__ == "__main__":
    sys.exit(main())
