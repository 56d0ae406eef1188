"""The command for data files: `rows`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from chainlora.cli.common import json_option, show

if TYPE_CHECKING:
    from chainlora.data.removal import FoundRows

_NAMED = 20  # the most lines that the text names; --json names all


@click.command
@click.argument("file", type=click.Path())
@click.option(
    "--where",
    metavar="COLUMN=VALUE",
    multiple=True,
    required=True,
    help="Find rows with this value. Several: rows that have all of them.",
)
@click.option("--output", type=click.Path(), help="Write FILE without these rows to a new file.")
@click.option("--removed", type=click.Path(), help="Write these rows to a new JSONL file.")
@json_option
def rows(
    file: str, where: tuple[str, ...], output: str | None, removed: str | None, as_json: bool
) -> None:
    """Find rows of FILE by their values, and write FILE without them.

    FILE is JSONL, JSON, CSV or Parquet, and does not change. Values are compared as text: 42 also
    finds the number 42. Numbers of lines (JSONL, CSV) count from 1, numbers of rows (JSON, Parquet)
    from 0, as in error messages.

    With --output, the other rows keep their order. In JSONL and CSV they keep their bytes, in
    Parquet their schema. No file is overwritten.
    """
    pairs = [(column, value) for column, _, value in (pair.partition("=") for pair in where)]
    if wrong := [pair for pair in where if "=" not in pair]:
        raise click.UsageError(f"--where {wrong[0]} has no value; write --where COLUMN=VALUE")
    if output is not None and output == removed:
        raise click.UsageError("--output and --removed must be different files")
    from chainlora.data.removal import check_target, find_rows, write_found, write_without

    targets = {removed: ".jsonl", output: Path(file).suffix.lower()}
    for target, suffix in targets.items():
        if target is not None:
            check_target(Path(target), suffix)
    found = find_rows(file, pairs)
    if removed is not None:
        write_found(found, Path(removed))
    if output is not None:
        write_without(found, Path(output))
    _show_found(found, where, output, removed, as_json)


def _show_found(
    found: FoundRows,
    where: tuple[str, ...],
    output: str | None,
    removed: str | None,
    as_json: bool,
) -> None:
    """Print how many rows were found, where they are, and the files that were written."""
    count, total, values = len(found.rows), found.total, " and ".join(where)
    text = f"No row of {found.path} has {values} ({total} rows)"
    if count:
        have = "have" if count > 1 else "has"
        text = f"{count} of {total} rows of {found.path} {have} {values}: {_places(found)}"
    written = {output: total - count, removed: count}
    lines = [f"{path}: {number} rows" for path, number in written.items() if path is not None]
    shown = {"file": str(found.path), "where": where, "total": total, "found": count}
    shown |= {f"{found.counted}s": found.numbers, "output": output, "removed": removed}
    show(shown, "\n".join([text, *lines]), as_json)


def _places(found: FoundRows) -> str:
    """Return the numbers of the rows that were found, as words."""
    *first, last = map(str, found.numbers[:_NAMED])
    more = len(found.numbers) - _NAMED
    if more > 0:
        return f"{found.counted}s {', '.join([*first, last])} and {more} more"
    if not first:
        return f"{found.counted} {last}"
    return f"{found.counted}s {', '.join(first)} and {last}"
