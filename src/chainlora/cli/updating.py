"""The command `update`: stages whose row files have changed are trained again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from chainlora.cli.common import (
    json_option,
    print_json,
    quiet,
    to_stderr,
    verbose_option,
    whole_run,
)
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from chainlora.training.updating import Changed, Update


@click.command
@click.argument("run", type=click.Path())
@click.argument("names", metavar="[STAGE]...", nargs=-1)
@click.option("--data.train", "rows", metavar="FILE", help="Where the rows of STAGE lie now.")
@click.option("--purge", is_flag=True, help="Then delete all that came from the former rows.")
@click.option(
    "--certificate",
    metavar="FILE",
    help="With --purge: where to write the certificate.  [default: RUN-certificate.json]",
)
@click.option("--plugins", metavar="NAMES", help="Plug-ins that these stages need, with commas.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@click.option("--yes", is_flag=True, help="Accept all changed files, and with --purge delete.")
@verbose_option
@json_option
def update(
    run: str,
    names: tuple[str, ...],
    rows: str | None,
    purge: bool,
    certificate: str | None,
    plugins: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Train the stages of RUN again whose row files have changed, and combine all.

    Correct a row in its file, or take rows out (`chainlora rows`); then update. The files that have
    changed are found by their contents. Their stages are trained again, and so are stages on top of
    them; other stages are untouched. The result has the bits of a run that was trained on the
    changed files from the beginning. `undo` goes back.

    With --purge everything that was computed from the former rows is deleted: links, kept rows,
    hashes, scores, records and pictures. A certificate says what was deleted;
    `chainlora verify RUN --certificate FILE --rows REMOVED.jsonl` checks it.

    Without names the command lists the files, and accepts them with --yes. A run that you received
    may name any file of this machine: look at the list. --purge always needs --yes.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.cli.train import with_progress
    from chainlora.training.updating import certificate_place, plan_update
    from chainlora.training.updating import update as update_run

    named = [name for name in (plugins or "").split(",") if name]
    keys: dict[str, Any] = {"rows": rows, "purge": purge, "plugins": named}
    planned = plan_update(folder, names, **keys)
    if dry_run or not planned.is_due or not (yes or (names and not purge)):
        _show(run, planned, as_json)
        if planned.is_due and not dry_run:
            remedy = "Add --yes" if purge else "Add --yes, or name the stages"
            raise ConfigError(f"Nothing changed. {remedy}.")
        if dry_run or not purge:
            return  # a purge may have been stopped before its certificate was written
    else:
        for line in _lines(run, planned):
            to_stderr(line)
    more: dict[str, Any] = {"certificate": certificate, **keys}
    state = with_progress(run, lambda show: update_run(folder, names, listener=show, **more))
    place = certificate_place(folder, certificate) if purge and planned.is_due else None
    if as_json:
        shown = {"run": run, "now": state.key, "changed": _as_dicts(planned)}
        print_json(shown | {"certificate": place and str(place)})
        return
    click.echo(f"{run} is {state.key} now")
    if place is not None:
        click.echo(f"certificate: {place} and {place.with_suffix('.md')}")


def _show(run: str, planned: Update, as_json: bool) -> None:
    if as_json:
        shown = {"run": run, "changed": _as_dicts(planned), "again": planned.again}
        print_json(shown | {"missing": dict(planned.missing), "erased": planned.erased})
        return
    for line in _lines(run, planned):
        click.echo(line)


def _as_dicts(planned: Update) -> dict[str, Any]:
    return {
        each.stage.name: {"files": each.files, "added": each.added, "removed": each.removed}
        for each in planned.changed
    }


def _lines(run: str, planned: Update) -> Iterator[str]:
    """Yield what an update does, one line each."""
    if not planned.changed:
        yield f"{run}: no row file has changed since its stage was trained"
    for each in planned.changed:
        yield f"{each.stage.name}: {_counts(each)} in {', '.join(each.files)}; trained again"
    for name in planned.again:
        yield f"{name}: stands on it, and is trained again from its own rows"
    if planned.changed and planned.minutes is not None:
        yield f"about {planned.minutes:.1f} minutes of training; then all are combined"
    for name, why in planned.missing.items():
        yield f"{name}: not looked at ({why})"
    if planned.missing:
        place = shlex.quote(run)
        yield f"chainlora update {place} STAGE --data.train FILE names the file of a stage"
    if planned.erased:
        yield f"deleted for good: {', '.join(planned.erased)}, with their links, rows and scores"


def _counts(each: Changed) -> str:
    if each.added is None or each.removed is None:
        return "other rows"
    return f"{each.added} new row{'s' * (each.added != 1)} and {each.removed} removed"
