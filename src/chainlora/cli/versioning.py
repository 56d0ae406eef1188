"""The commands for stages and history.

These are `extend`, `add`, `combine`, `update`, `undo`, `redo` and `log`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from chainlora.cli.common import (
    WithKeys,
    forgetting_option,
    general_keys,
    general_option,
    is_run,
    is_verbose,
    json_option,
    keys_argument,
    need_run,
    print_json,
    quiet,
    to_stderr,
    verbose_option,
    whole_run,
    words_and_overrides,
)
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from chainlora.runs.state import OpenState
    from chainlora.training.updating import Changed, Update


@click.command(cls=WithKeys)
@keys_argument("RUN[@STAGE] [ROWS|STAGE.yaml]")
@click.option("--resume", is_flag=True, hidden=True, expose_value=False, help="Not needed.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and train nothing.")
@click.option(
    "--beside/--on-top",
    default=None,
    help="Train the stage beside the others and combine them, or train it on top of RUN. Default: "
    "beside, pairs on top.",
)
@click.option(
    "--keep-conflicts",
    is_flag=True,
    help="Reuse earlier rows even if this stage answers their prompt differently.",
)
@forgetting_option
@general_option
@verbose_option
@json_option
def extend(
    arguments: tuple[str, ...],
    dry_run: bool,
    beside: bool | None,
    keep_conflicts: bool,
    max_forgetting: float | None,
    general: str | None,
    as_json: bool,
) -> None:
    """Train one more stage of RUN: new data, new links, the same chain.

    A file of ROWS is enough: chainlora extend runs/january february.jsonl trains the stage
    february. The default is one link of rank 8, for one epoch, or for as many epochs as read 640
    rows, at most 10. The command prints its choice. Change it by --name, --chain.ranks and
    --chain.epochs, or by other keys; STAGE.yaml can set keys too.

    By default a stage of answers is trained beside the others and combined with them in closed
    form. Preference pairs are trained on top of RUN, and every stage with --on-top or on RUN@STAGE.
    A stage with data.replay or data.new_rows_only needs --on-top or --beside.

    If the stage answers an earlier prompt differently, a warning gives an example. The newest
    answer counts: earlier rows with that prompt are not reused.

    Keys are inherited from the previous stage (beside others: from the first), except rows, ranks,
    lengths, trackers, keep_best, early_stop and select_metric. data.fields and data.format are
    inherited if ROWS has these columns. With --output FOLDER
    the stage becomes a fork: it starts from RUN or RUN@STAGE, which do not change. The same command
    again resumes a stopped or killed stage.
    """
    words, overrides = words_and_overrides(list(arguments))
    overrides = [*general_keys(general), *overrides]
    if not words or words[2:]:
        got = f"unexpected {words[2]!r}" if words[2:] else "Missing argument 'RUN'"
        raise click.UsageError(f"{got}; write: chainlora extend RUN [ROWS|STAGE.yaml] …")
    need_run(words[0])
    quiet()
    from chainlora.cli.train import train_and_show
    from chainlora.training.extending import extension

    section: Any = words[1] if words[1:] else {}
    overrides += [("data.keep_conflicts", "true")] * keep_conflicts
    stages = extension(words[0], section, overrides, beside=beside)
    train_and_show(stages, dry_run, as_json, max_forgetting=max_forgetting)


@click.command(cls=WithKeys)
@keys_argument("RUN ADAPTER")
@click.option("--rows", metavar="FILE", help="Some of the rows that ADAPTER was trained on.")
@click.option("--name", help="Name of the entry. Default: the name of FILE.")
@click.option("--model", help="Base of a new run. Default: the base that ADAPTER names.")
@general_option
@forgetting_option
@verbose_option
@json_option
def add(
    arguments: tuple[str, ...],
    rows: str | None,
    name: str | None,
    model: str | None,
    general: str | None,
    max_forgetting: float | None,
    as_json: bool,
) -> None:
    """Add a LoRA that was trained elsewhere to RUN, and combine it with RUN.

    ADAPTER is the folder or Hub id of a LoRA for the base of RUN, in PEFT's format. Nothing is
    trained. RUN keeps a sample of FILE for combinations and scores. The entry can be undone, pruned
    and exported like a stage. If RUN does not exist, it becomes a new run.

    Keys define how FILE is read: --data.format, --data.fields, --data.task, --data.validation 0.1.
    A new run also takes --train.dtype, --quantize, --chain.hold and --data.chat_template. The same
    command again continues after a kill, or does nothing.
    """
    words, overrides = words_and_overrides(list(arguments))
    if len(words) != 2:
        raise click.UsageError("write: chainlora add RUN ADAPTER --rows FILE [--KEY VALUE]…")
    quiet()
    from chainlora.cli.train import with_progress
    from chainlora.config.reading import set_key
    from chainlora.runs.addresses import open_run
    from chainlora.training.stages import add as add_to

    run, adapter = words
    before = open_run(run).key if is_run(run) else None
    keys: dict[str, Any] = {}
    for key, value in [*general_keys(general), *overrides]:
        set_key(keys, key, value)
    given: Any = {"name": name, "model": model, "config": keys, "max_forgetting": max_forgetting}
    state = with_progress(run, lambda show: add_to(run, adapter, rows, listener=show, **given))
    _show_added(run, before, state, as_json)


def _show_added(run: str, before: str | None, state: OpenState, as_json: bool) -> None:
    """Show a run after `add`. `before` is the key of its state before the command."""
    from chainlora.cli.screen import scored_matrix, show_matrix

    matrix = scored_matrix(run, compute=False) if state.keepers else None
    if as_json:
        shown = {"run": run, "now": state.key, "stages": state.stages}
        print_json(shown | {"matrix": matrix and matrix.as_dict()})
    elif state.key == before:
        click.echo(f"{run} is {before}, as before")
    else:
        entry = state.entry
        parts = f", of {', '.join(entry.parents)}" if entry and entry.kind == "combine" else ""
        click.echo(f"{run} is {state.key} now{parts}")
        if matrix is not None:
            show_matrix(matrix)


@click.command
@click.argument("run", type=click.Path())
@click.argument("names", metavar="[STAGE|OTHER_RUN][=IMPORTANCE]...", nargs=-1)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the combination.  [default: the sum of the ranks of its links, at least 16]",
)
@click.option("--no-general", is_flag=True, help="Leave out the origin of RUN, and its rows.")
@click.option("--keep-conflicts", is_flag=True, help="Use old answers too, not only the newest.")
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=0,
    help="Train the combined link for this many steps on kept rows.  [default: 0]",
)
@click.option("--output", type=click.Path(), help="Folder of a new run. RUN does not change.")
@click.option(
    "--no-scores", is_flag=True, help="Do not score the combination on the rows of each stage."
)
@verbose_option
@json_option
def combine(
    run: str,
    names: tuple[str, ...],
    no_general: bool,
    no_scores: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Combine stages of RUN in closed form, layer by layer.

    Without --steps, nothing is trained. Each layer is solved to match the outputs of the stages'
    own models on their kept rows, and those of the base on general rows. facts=2 counts the rows of
    the stage facts twice, runs/other=2 those of all stages of another run. Without names the last
    combination is repeated, or all stages are combined on which no other stage was trained. Stages
    of other runs on the same base are copied into RUN, or into --output. `undo` goes back to the
    state before.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.cli.screen import evaluation_progress, scored_matrix, show_matrix
    from chainlora.evaluation.combination import summary_of
    from chainlora.training.stages import combine as combined

    keys, importance = _parse_importance(names)
    with evaluation_progress("combining {} {} of {}") as progress:
        options |= {"importance": importance, "general": not no_general}
        state = combined(folder, keys, progress=progress, **options)
    assert state.entry is not None
    to_stderr(f"{state.run} is {state.key} now, of {', '.join(state.entry.parents)}")
    if is_verbose():
        to_stderr(summary_of(state.history, state.key))
    matrix = None if no_scores else scored_matrix(str(state.run))
    if as_json:
        shown = {"run": str(state.run), "now": state.key, "of": state.entry.parents}
        print_json(shown | {"matrix": matrix and matrix.as_dict()})
    elif matrix is not None:
        show_matrix(matrix)


def _parse_importance(names: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Return the names, and the importance of each ``NAME=IMPORTANCE``."""
    from chainlora.runs.entries import START

    keys, importance = list[str](), dict[str, float]()
    for name in names:
        key, _, value = name.rpartition("=")
        try:
            importance[key] = float(value)
        except ValueError:  # a name alone
            key = name
        keys += [key] * (key != START)
    return keys, importance


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
    from chainlora.evaluation.certificate import certificate_place
    from chainlora.training.updating import plan_update
    from chainlora.training.updating import update as update_run

    keys: dict[str, Any] = {"rows": rows, "purge": purge}
    planned = plan_update(folder, names, **keys)
    if dry_run or not planned.is_due or not (yes or (names and not purge)):
        _show_update(run, planned, as_json)
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


def _show_update(run: str, planned: Update, as_json: bool) -> None:
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
        yield f"about {planned.minutes:.1f} minutes of training"
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


@click.command
@click.argument("run", type=click.Path())
@click.option("--to", metavar="NAME", help="Go to this entry of `chainlora log`.")
@json_option
def undo(run: str, to: str | None, as_json: bool) -> None:
    """Undo the last combination or stage of RUN.

    A stage is undone together with its combination. Nothing is deleted: rows and
    links stay in RUN (`prune` deletes them); only a stage in training is dropped. With --to, RUN
    goes to any state that a command has made of it. `redo` reverts an undo.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.runs.changes import undo as undo_last

    _show_now(run, undo_last(folder, to), as_json)


@click.command
@click.argument("run", type=click.Path())
@json_option
def redo(run: str, as_json: bool) -> None:
    """Revert the last undo of RUN."""
    folder = whole_run(run)
    quiet()
    from chainlora.runs.changes import redo as redo_last

    _show_now(run, redo_last(folder), as_json)


def _show_now(run: str, state: OpenState, as_json: bool) -> None:
    if as_json:
        print_json({"run": run, "now": state.key, "stages": state.stages})
    else:
        of = f", of {', '.join(state.stages)}" * state.is_combined
        click.echo(f"{run} is now {state.key}{of}; nothing was deleted")


@click.command
@click.argument("run", type=click.Path())
@json_option
def log(run: str, as_json: bool) -> None:
    """Show the history of RUN: stages and combinations, the latest first.

    * marks the current state of RUN, | the states from which it was computed. RUN@NAME is the
    address of a state.
    """
    folder = whole_run(run)
    quiet()
    from rich.table import Table

    from chainlora.runs.changes import log as entries_of
    from chainlora.training.progress import Terminal

    entries = entries_of(folder)
    if as_json:
        print_json({"run": run, "entries": entries})
        return
    table = Table(box=None, header_style="", pad_edge=False)
    least = {"kind": 11, "on": 12, "stages": 12, "ended": 16}  # characters
    for head in ("", "name", "kind", "on", "links", "stages", "ended", "state"):
        is_list = head in ("on", "stages")
        table.add_column(head, no_wrap=not is_list, min_width=least.get(head))
    for entry in entries:
        if entry["kind"] in ("training", "declared"):
            kind = "in training" if entry["kind"] == "training" else "declared"
            table.add_row("", entry["name"], kind, "", "", "", "", "")
            continue
        mark = "*" if entry["now"] else "|" if entry["before"] else ""
        on = " ".join(entry["parents"]) or "base" * (entry["kind"] != "base")
        ended = (entry["ended"] or "")[:16].replace("T", " ")
        of = (str(entry["links"]), " ".join(entry["stages"]) or "none", ended, entry["state"])
        table.add_row(mark, entry["name"], entry["kind"], on, *of)
    console, wide = Terminal(), Terminal(width=10_000)
    if console.is_terminal:  # a narrower table would cut names; the terminal wraps the lines
        wide.width = max(console.width, wide.measure(table).minimum)
    wide.print(table, markup=False)
