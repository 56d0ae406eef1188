"""Whether a folder can become a run's, and what a resume needs: the run for itself, the config and
the rows that it began with."""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from chainlora import files
from chainlora.config.schema import RunConfig
from chainlora.config.yaml_text import one_value
from chainlora.errors import FileError, RunError
from chainlora.registry import plugin_digest
from chainlora.runs.manifest import REFERENCE, TOKENIZER, Change
from chainlora.runs.reading import RunReader

logger = logging.getLogger(__name__)

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of a network disk that has none

# Keys that a resume may change by name: they decide steps to come, and nothing that is on disk.
CHANGEABLE = ("train.lr", "train.max_grad_norm")
# Keys that say where something lies. A resume reads it, and checks that it is the same.
_PLACES = ("model", "data.train", "data.validation", "data.test")

_BEFORE_THE_MANIFEST = {LOCK, "config.yaml", "links", "rows", TOKENIZER, REFERENCE}


def refuse_if_taken(run: RunReader) -> None:
    """Raise RunError where something else than an empty directory is."""
    if not run.path.is_dir():
        return
    with files.reported(run.path, "read"):
        entries = {entry.name for entry in run.path.iterdir()}
    if entries <= {LOCK}:
        return
    what, remedy = (
        ("holds a run", "pass --resume to resume it, or ")
        if run.exists
        else ("is not empty and not a whole run", "")
    )
    raise RunError(
        f"`output` must be a new or empty directory (got {run.path}, which {what}); "
        f"{remedy}choose another output"
    )


def refuse_if_nothing(run: RunReader) -> None:
    """Raise RunError where there is nothing to resume.

    A run that was killed before it had a manifest starts over: nothing in it is worth keeping. It
    has a lock; without one, files of the same names are somebody's own.
    """
    if not run.path.is_dir():
        raise RunError(
            f"--resume needs a run directory (got {run.path}, which does not exist); check "
            "`output`, or leave --resume out to start"
        )
    names = {entry.name for entry in run.path.iterdir() if not files.is_scratch(entry.name)}
    is_killed_run = LOCK in names and names <= _BEFORE_THE_MANIFEST
    if not run.exists and not is_killed_run:
        refuse_if_taken(run)


def take_lock(run: Path, wait: float = 0.2) -> FileLock | None:
    """Lock a run directory for this process; the system unlocks it when the process ends.

    Raises RunError where another process holds it for longer than `wait` seconds: who looks whether
    it is in use holds it for a moment.
    """
    lock = FileLock(str(run / LOCK), timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"a run directory must be used by one process at a time (got {run}, which another "
            "process is training in); wait for it, or choose another output"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise files.file_error(error, run / LOCK) from error
        logger.warning("%s cannot be locked; start one process at a time in it", run)
        return None
    return lock


def is_in_use(run: Path) -> bool:
    """Say whether another process is training in a run directory, or changing its stages."""
    if not (run / LOCK).is_file():
        return False
    try:
        lock = take_lock(run, wait=0)
    except RunError:
        return True
    except FileError:  # not ours to write in: nobody here can tell
        return False
    if lock is not None:
        lock.release()
    return False


def changes(
    before: RunConfig,
    now: RunConfig,
    named: Collection[str],
    step: int = 0,
    *,
    stage: str | None = None,
    may_move: bool = False,
) -> list[Change]:
    """Return the keys that a resume changes: `named` by the user, or places, if base and rows
    `may_move`.

    Raises RunError where the config is not the one that the run, or its `stage`, has.
    """
    old, new = _science(before), _science(now)
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    allowed = set(named).intersection(CHANGEABLE)
    if may_move:
        allowed |= {key for key in _PLACES if _without_place(old[key]) == _without_place(new[key])}
    refused = [key for key in differing if key not in allowed]
    if refused:
        first, sections = refused[0], dict.fromkeys(key.partition(".")[0] for key in refused)
        differs = f"{first} is {one_value(new[first]):.40}, was {one_value(old[first]):.40}"
        if stage is not None:
            raise RunError(
                "a stage must stay what it was begun as",
                f"stage {stage!r}, where {differs}",
                "give another one a name of its own",
            )
        raise RunError(
            "--resume needs the config the run began with",
            f"other values under {', '.join(sections)}: {differs}",
            f"use the run's config.yaml or a new output{_how_to_change(refused)}",
        )
    return [Change(key=key, before=old[key], after=new[key], step=step) for key in differing]


def _without_place(value: Any) -> Any:
    """Return what is left of a model or a source of rows when it may lie anywhere.

    Of several files the digest of the rows does not tell which row is of which: their names do.
    """
    if isinstance(value, list | tuple):
        return [(PurePath(each["path"]).name, each["weight"]) for each in value]
    return str if isinstance(value, str) else value


def compare_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn where a run goes on under other versions: the same steps, but other roundings."""
    other = [
        f"{name} {old}, now {now[name]}"
        for name, old in before.items()
        if old != now.get(name, old)
    ]
    if other:
        logger.warning(
            "the run was begun with %s; with other versions a resume is not the same to the bit",
            "; ".join(other),
        )


def check_plugins(run: RunReader, config: RunConfig) -> None:
    """Raise RunError unless the config names the plug-ins that a run was begun with.

    A run says which code it needs, and never runs it by itself: a run may come from somebody else.
    Warns of a plug-in that has changed since.
    """
    before, now = run.manifest().plugins, {name: plugin_digest(name) for name in config.plugins}
    known = set(now.values())
    if missing := [name for name in before if name not in now and before[name] not in known]:
        raise RunError(not_named(f"resume {run}", missing))
    if changed := [name for name in before if name in now and before[name] != now[name]]:
        logger.warning(
            "the run was begun with another content of %s; later steps use the new one",
            ", ".join(changed),
        )


def not_named(what: str, plugins: Sequence[str]) -> str:
    """Say what cannot be done without plug-ins that only a run names."""
    return (
        f"Cannot {what}: it was begun with the plug-in {', '.join(plugins)}, code that would run "
        f"here. Add --plugins {','.join(plugins)} if you trust it"
    )


def check_rows(before: str | None, rows: str | None) -> None:
    """Raise RunError unless the rows are those that the run began with."""
    if rows is not None and before is not None and before != rows:
        raise RunError(
            "--resume needs the rows the run began with, in their order",
            f"digest {rows}, was {before}",
            "restore the data files, or start over",
        )


def _science(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a config that decide the weights.

    Not where it is written, what it begins on (its links tell), where rows of a task and plug-ins
    lie (`check_plugins`), who watches, which process holds what.
    """
    of_run = {"output": True, "start": True, "plugins": True}
    tree = config.model_dump(exclude={**of_run, "data": {"dir"}})
    for key in ("trackers", "save_every", "log_every", "shard"):
        tree["train"].pop(key)
    flat = {key: tree.pop(key) for key in ("model", "quantize")}
    for section, keys in tree.items():
        flat |= {f"{section}.{key}": value for key, value in keys.items()}
    return flat


def _how_to_change(refused: list[str]) -> str:
    if any(key.startswith(("data.", "chain.")) for key in refused):
        return (
            "; to train other rows or further links on top of it: chainlora extend RUN --name NAME"
        )
    if not all(key in CHANGEABLE for key in refused):
        return ""
    words = " ".join(f"--{key} VALUE" for key in refused)
    return f"; to continue with another value, pass --resume {words}"
