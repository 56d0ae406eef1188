"""The verbs of stages and of a run's history: `extend`, `add`, `combine`, `rehearse`, `mix`,
`undo`, `redo`, `log`, `prune`, `push`, `pull`."""

from __future__ import annotations

from collections.abc import Sequence
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
    read_strengths,
    show,
    to_stderr,
    verbose_option,
    whole_run,
    words_and_overrides,
)
from chainlora.errors import ChainLoRAError, ConfigError

if TYPE_CHECKING:
    from chainlora.runs.changes import Pruning
    from chainlora.runs.state import OpenState


@click.command(cls=WithKeys)
@keys_argument("RUN[@STAGE] [ROWS|STAGE.yaml]")
@click.option("--resume", is_flag=True, hidden=True, help="Accepted, and not needed.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and train nothing.")
@click.option(
    "--beside/--on-top",
    default=None,
    help="Beside the others and combined with them, or on what RUN is. Default: beside, if it can.",
)
@click.option("--rehearse", is_flag=True, help="Rehearse the combination of a stage beside others.")
@click.option(
    "--keep-conflicts",
    is_flag=True,
    help="Read earlier rows again also if this stage has another answer to their prompt.",
)
@forgetting_option
@general_option
@verbose_option
@json_option
def extend(
    arguments: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    beside: bool | None,
    rehearse: bool,
    keep_conflicts: bool,
    max_forgetting: float | None,
    general: str | None,
    as_json: bool,
) -> None:
    """Train one more stage of RUN: new data, fresh links, the same chain.

    A file of ROWS is enough: chainlora extend runs/january february.jsonl trains the stage
    february. By default it is one link of rank 8, for one epoch or as many as read 640 rows, at
    most 10; the command prints what it chose. --name, --chain.ranks and --chain.epochs change it.

    It is trained beside the others and combined with them in closed form. On top of RUN it is
    trained with --on-top, on RUN@STAGE, on a mix, on pairs, with data.replay or data.new_rows_only,
    and where it cannot be combined.

    If it has another answer to a prompt of an earlier stage, a warning names one, and the newest
    answer counts: no earlier row with that prompt is read again.

    Other keys are inherited from the stage before, beside others from the first, but for how its
    end was chosen (keep_best, early_stop, select_metric). STAGE.yaml may set keys, too. With
    --output FOLDER the stage becomes a fork, which begins on RUN or RUN@STAGE and leaves it as it
    is. The same command again resumes a stage that was stopped or killed, or does nothing.
    """
    words, overrides = words_and_overrides(list(arguments))
    overrides += general_keys(general)
    if not words or words[2:]:
        got = f"unexpected {words[2]!r}" if words[2:] else "Missing argument 'RUN'"
        raise click.UsageError(f"{got}; it is chainlora extend RUN [ROWS|STAGE.yaml] …")
    need_run(words[0])
    quiet()
    from chainlora.cli.train import train_and_show
    from chainlora.training.extending import extension

    section: Any = words[1] if words[1:] else {}
    overrides += [("data.keep_conflicts", "true")] * keep_conflicts
    stages = extension(words[0], section, overrides, beside=beside, rehearse=rehearse)
    train_and_show(stages, overrides, dry_run, as_json, max_forgetting=max_forgetting)


@click.command(cls=WithKeys)
@keys_argument("RUN ADAPTER")
@click.option("--rows", metavar="FILE", help="Some of the rows that ADAPTER was trained on.")
@click.option("--name", help="Name of the entry. Default: that of FILE.")
@click.option("--model", help="Base of a new run. Default: the one that ADAPTER names.")
@forgetting_option
@verbose_option
@json_option
def add(
    arguments: tuple[str, ...],
    rows: str | None,
    name: str | None,
    model: str | None,
    max_forgetting: float | None,
    as_json: bool,
) -> None:
    """Add a LoRA that was trained elsewhere to RUN, and combine it with what RUN is.

    ADAPTER is the folder or Hub id of a LoRA that PEFT, TRL, Unsloth, Axolotl or another tool has
    saved, for the base of RUN. Nothing is trained. A sample of FILE is kept in RUN: combinations
    and scores read it. The entry is undone, pruned and exported like a stage. Where no RUN is, it
    becomes a new one.

    Keys say how FILE is read: --data.format, --data.fields, --data.task, --data.validation 0.1. A
    new run also takes --train.dtype, --quantize, --chain.hold and --data.chat_template. The same
    command again goes on after a kill, or does nothing.
    """
    words, overrides = words_and_overrides(list(arguments))
    if len(words) != 2:
        raise click.UsageError("it is chainlora add RUN ADAPTER --rows FILE [--KEY VALUE]…")
    quiet()
    from chainlora.cli.screen import scored_matrix, show_matrix
    from chainlora.cli.train import with_progress
    from chainlora.config.reading import set_key
    from chainlora.runs.addresses import open_run
    from chainlora.training.stages import add as add_to

    run, adapter = words
    before = open_run(run).key if is_run(run) else None
    keys: dict[str, Any] = {}
    for key, value in overrides:
        set_key(keys, key, value)
    given: Any = {"name": name, "model": model, "config": keys, "max_forgetting": max_forgetting}
    state = with_progress(run, lambda tell: add_to(run, adapter, rows, listener=tell, **given))
    matrix = scored_matrix(run, compute=False) if state.keepers else None
    if as_json:
        shown = {"run": run, "now": state.key, "strengths": state.strengths}
        print_json(shown | {"matrix": matrix and matrix.as_dict()})
    elif state.key == before:
        click.echo(f"{run} is {before}, as before")
    else:
        click.echo(f"{run} is {state.key} now{_parts(state)}")
        if matrix is not None:
            show_matrix(matrix)


def _parts(state: OpenState) -> str:
    """Return what a combination is of, in words."""
    is_combined = state.entry is not None and state.entry.kind == "combine"
    return f", of {', '.join(state.entry.parents)}" if state.entry and is_combined else ""


@click.command
@click.argument("run", type=click.Path())
@click.argument("names", metavar="[STAGE|OTHER_RUN][=IMPORTANCE]...", nargs=-1)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the combination.  [default: 16]")
@click.option("--no-general", is_flag=True, help="Leave out what RUN began on, and its rows.")
@click.option("--keep-conflicts", is_flag=True, help="Read old answers too, not the newest alone.")
@click.option("--output", type=click.Path(), help="Folder of a new run; RUN stays as it is.")
@click.option("--no-scores", is_flag=True, help="Do not score it on the rows of each stage.")
@verbose_option
@json_option
def combine(
    run: str,
    names: tuple[str, ...],
    rank: int | None,
    no_general: bool,
    keep_conflicts: bool,
    output: str | None,
    no_scores: bool,
    as_json: bool,
) -> None:
    """Combine stages of RUN in closed form, layer by layer.

    Nothing is trained. Each layer is solved so that it gives what the stages' own models give on
    rows that they kept, and what the base gives on general rows. facts=2 counts the rows of the
    stage facts twice. Without names, RUN is combined again of what it was, or of all stages that no
    other was trained on. Stages of other runs on the same base are copied into RUN, or --output.
    What `mix` set is not carried over; `undo` takes the combination back.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.cli.screen import evaluation_progress, scored_matrix, show_matrix
    from chainlora.evaluation.combination import combine as combined
    from chainlora.evaluation.combination import summary_of

    keys, importance = _weighed(names)
    with evaluation_progress("combining {}: layer {} of {}") as progress:
        state = combined(
            folder,
            keys,
            rank=rank,
            importance=importance,
            general=not no_general,
            keep_conflicts=keep_conflicts,
            output=output,
            progress=progress,
        )
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


def _weighed(names: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Return the names, and the importance of those that say one."""
    from chainlora.runs.history import START  # which is a part without being named

    keys, importance = list[str](), dict[str, float]()
    for name in names:
        key, _, value = name.rpartition("=")
        try:
            importance[key] = float(value)
        except ValueError:  # a name alone
            key = name
        keys += [key] * (key != START)
    return keys, importance


@click.command(cls=WithKeys)
@keys_argument("RUN")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and train nothing.")
@verbose_option
@json_option
def rehearse(arguments: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train a stage on rows that all stages of RUN kept, as many of each.

    In batches of 8 rows it takes 32 steps for each stage, fewer for one that kept under 128 rows.
    It is a stage like any other: `undo` takes it back. Keys are those of `extend`, for example
    --chain.steps 20. The same command again resumes it, or does nothing where RUN ends in it.
    """
    words, overrides = words_and_overrides(list(arguments))
    if len(words) != 1:
        raise click.UsageError("it is chainlora rehearse RUN [--KEY VALUE]…")
    whole_run(words[0])
    quiet()
    from chainlora.cli.train import train_and_show
    from chainlora.training.rehearsing import rehearsal

    train_and_show(rehearsal(words[0], {}, overrides), overrides, dry_run, as_json)


@click.command
@click.argument("run", type=click.Path())
@click.argument("strengths", metavar="[STAGE=STRENGTH]...", nargs=-1)
@click.option("--no-scores", is_flag=True, help="Do not score the mix on the rows of each stage.")
@json_option
def mix(run: str, strengths: tuple[str, ...], no_scores: bool, as_json: bool) -> None:
    """Switch stages of RUN off and on, or weaken them: style=0 law=0.5.

    Nothing is trained or deleted: strength 1 restores a stage to the bit. From then on RUN is
    this mix for every command; RUN@STAGE stays what that stage ended in. Without strengths, they
    are shown. What the mix does to the rows of each stage is scored on those that the run kept.
    """
    folder = whole_run(run)
    chosen = read_strengths(strengths, default=None)
    quiet()
    from chainlora.cli.screen import scored_matrix, show_matrix
    from chainlora.runs.addresses import open_run
    from chainlora.runs.changes import mix_stages

    state = mix_stages(folder, chosen) if chosen else open_run(folder)
    can_score = bool(chosen and state.keepers)
    if can_score and not no_scores:  # said first: a kill while it scores undoes no mix
        to_stderr(f"{run} is now {state.key}; scoring it")
    matrix = None
    try:
        if not no_scores:
            matrix = scored_matrix(run, compute=can_score)
    except ChainLoRAError as error:  # the run is this mix, whatever its scores are
        to_stderr(f"chainlora: the mix was not scored: {error}")
    if as_json:
        shown = {"run": run, "strengths": state.strengths}
        print_json(shown | {"matrix": matrix and matrix.as_dict()})
        return
    if matrix is not None:
        show_matrix(matrix)
    _show_strengths(state)


def _show_strengths(state: OpenState) -> None:
    from chainlora.runs.history import COMBINED

    parts = ", ".join(state.history.parts(state.key))
    for name, strength in state.strengths.items():
        click.echo(f"{name}={strength:g}" + (f" of {parts}" if name == COMBINED else ""))


@click.command
@click.argument("run", type=click.Path())
@click.option("--to", metavar="NAME", help="The entry of `chainlora log` to make the run.")
@json_option
def undo(run: str, to: str | None, as_json: bool) -> None:
    """Make RUN what it was before its last mix, combination or stage.

    A stage goes back together with its combination and rehearsal. Nothing is deleted: the rows and
    links of what is undone stay in RUN (`prune` deletes them).
    With --to, RUN becomes any state of its history. `redo` goes forward
    again; after `undo --to`, `undo` goes back.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.runs.changes import undo as undo_last

    _show_now(run, undo_last(folder, to), as_json)


@click.command
@click.argument("run", type=click.Path())
@json_option
def redo(run: str, as_json: bool) -> None:
    """Take the last undo of RUN back."""
    folder = whole_run(run)
    quiet()
    from chainlora.runs.changes import redo as redo_last

    _show_now(run, redo_last(folder), as_json)


def _show_now(run: str, state: OpenState, as_json: bool) -> None:
    if as_json:
        print_json({"run": run, "now": state.key, "strengths": state.strengths})
    else:
        click.echo(f"{run} is now {state.key}; nothing was deleted")
        _show_strengths(state)


@click.command
@click.argument("run", type=click.Path())
@json_option
def log(run: str, as_json: bool) -> None:
    """Show the history of RUN: its stages, mixes and combinations, the latest first.

    * marks what RUN is now, | what that was computed from. RUN@NAME names each state.
    """
    folder = whole_run(run)
    quiet()
    from rich.table import Table

    from chainlora.runs.changes import log as entries_of
    from chainlora.training.progress import Terminal

    found = entries_of(folder)
    if as_json:
        print_json({"run": run, "entries": found})
        return
    table = Table(box=None, header_style="", pad_edge=False)
    least = {"kind": 11, "on": 12, "strengths": 12, "ended": 16}  # characters
    for head in ("", "name", "kind", "on", "links", "strengths", "ended", "state"):
        is_list = head in ("on", "strengths")
        table.add_column(head, no_wrap=not is_list, min_width=least.get(head))
    for entry in found:
        if entry["kind"] in ("training", "declared"):
            kind = "in training" if entry["kind"] == "training" else "declared"
            table.add_row("", entry["name"], kind, "", "", "", "", "")
            continue
        mark = "*" if entry["now"] else "|" if entry["before"] else ""
        strengths = " ".join(f"{name}={value:g}" for name, value in entry["strengths"].items())
        texts = (mark, entry["name"], entry["kind"], " ".join(entry["parents"]) or "base")
        ended = entry["ended"][:16].replace("T", " ")
        table.add_row(*texts, str(entry["links"]), strengths or "none", ended, entry["state"])
    console, wide = Terminal(), Terminal(width=10_000)
    if console.is_terminal:  # what is narrower would cut names; it wraps the lines
        wide.width = max(console.width, wide.measure(table).minimum)
    wide.print(table, markup=False)


@click.command
@click.argument("run", type=click.Path())
@click.argument("stage")
@click.option("--yes", is_flag=True, help="Delete it. Without, say what would be deleted.")
@json_option
def prune(run: str, stage: str, yes: bool, as_json: bool) -> None:
    """Delete STAGE of RUN for good: links, kept rows, config, records, result, scores.

    Stages that were trained on top of it stay, without its links, and so do mixes of these stages.
    Combinations that were computed from it go with it, with all on top of them; so do rehearsals on
    its rows, and RUN's pictures and report. What is left is combined again, as it was. What
    stays is listed: data files, forks, exports, copies, and tokenised rows of large files, which
    are in a cache outside RUN. Without --yes nothing is deleted, and the exit status is 1. To
    switch a stage off, and on again, take mix; to go back to what was before it, take undo.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.runs.addresses import open_run
    from chainlora.runs.changes import plan_pruning, prune_stage

    found = (prune_stage if yes else plan_pruning)(folder, stage)
    gone = [str(path) for path in found.gone]
    fork = f"chainlora extend {run}@{found.before} STAGE.yaml --name {{0}} --output FOLDER"
    again = [fork.format(name) for name in found.later]
    stays = _what_stays(found)
    if as_json:
        shown = {"run": run, "stage": stage, "deleted": yes, "files": gone}
        shown |= {"computed": found.with_it, "again": again, "stays": stays, "now": found.now}
        print_json(shown)
    else:
        for what in [*gone, *(f"{name}, computed from it" for name in found.with_it)]:
            click.echo(f"{'deleted' if yes else 'would delete'} {what}")
        for what in stays:
            click.echo(f"stays: {what}")
        if again:
            click.echo("\n  ".join(["to train these without it:", *again]))
        if found.now is not None:
            click.echo(f"{run} {'is' if yes else 'would be'} {found.now} now")
        if len(found.left) > 1 and not yes:
            click.echo(f"would combine the others again: {', '.join(found.left)}")
    if not yes:
        raise ConfigError("Nothing deleted. Add --yes.")
    if len(found.left) > 1:
        from chainlora.training.progress import progress_listener
        from chainlora.training.stages import combine_again

        with progress_listener() as listener:
            combine_again(folder, found, listener=listener)
        to_stderr(f"{run} is {open_run(folder).key} now, of {', '.join(found.left)}")


def _what_stays(found: Pruning) -> list[str]:
    """Return what a pruning leaves of a stage, in words."""
    from chainlora.data.preparing import IN_MEMORY
    from chainlora.models.identity import cache_dir

    later = ", ".join(found.later)
    return [
        *([f"{later}, tuned on top of it, with data.replay also on its rows"] if later else []),
        "its data files or adapter, forks (prune them too), pushed copies, exports, predictions, "
        "reports in other places, and what trackers keep in other places",
        f"tokenised rows of files of more than {IN_MEMORY:,} rows, of all runs: "
        f"{cache_dir() / 'rows'}",
    ]


@click.command
@click.argument("run", type=click.Path())
@click.argument("target", metavar="FOLDER|OWNER/NAME")
@click.option("--rows", is_flag=True, help="Send the rows that stages kept, too.")
@json_option
def push(run: str, target: str, rows: bool, as_json: bool) -> None:
    """Send RUN to a folder, or to a repository of the Hub, which becomes private if it is new.

    Sent are the history and the files that it names and the target lacks: links, configs, records,
    results. Kept rows stay here without --rows. Configs name your files as you wrote them.
    """
    whole_run(run)
    quiet()
    from chainlora.runs.hub import push_run

    _show_sent(push_run(run, target, rows=rows), run, target, as_json)


@click.command
@click.argument("source", metavar="FOLDER|OWNER/NAME")
@click.argument("run", type=click.Path())
@json_option
def pull(source: str, run: str, as_json: bool) -> None:
    """Copy a run that was pushed into RUN, a new folder or an earlier state of that run."""
    quiet()
    from chainlora.runs.hub import pull_run

    _show_sent(pull_run(source, run), source, run, as_json)


def _show_sent(names: Sequence[str], source: str, target: str, as_json: bool) -> None:
    text = "\n".join([*names, f"{len(names)} files, and history.json: {source} -> {target}"])
    show({"from": source, "to": target, "files": names}, text, as_json)
