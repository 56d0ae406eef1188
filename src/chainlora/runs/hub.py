"""The Hub: an export becomes a repository's new commit, and runs are pushed and pulled.

A run is pushed as the files that its history names, without those that are there already, and then
the history. A folder is pushed to in the same way, without the Hub.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from chainlora.config.reading import read_tree
from chainlora.errors import ConfigError, FileError, RunError
from chainlora.runs.addresses import Address, nothing_at, open_run
from chainlora.runs.beginning import copy_files
from chainlora.runs.cards import Naming, is_hub_id, public_name
from chainlora.runs.changes import whole_run
from chainlora.runs.documents import write_part
from chainlora.runs.export import empty_folder, filled_folder
from chainlora.runs.history import CONFIG, History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.lineage import without_places
from chainlora.runs.locks import LOCK
from chainlora.runs.paths import HISTORY, exists_in

logger = logging.getLogger(__name__)


def check_push(run: Address, target: str, naming: Naming) -> None:
    """Raise ConfigError unless an export can be pushed.

    Its repository has a name, and an adapter a base that others can load.
    """
    if not is_hub_id(naming.name or ""):
        raise ConfigError(
            f"--push-to-hub must be OWNER/NAME (got {naming.name!r}); name a repository"
        )
    base = naming.base or public_name(open_run(run).base.model)
    if target == "adapter" and not is_hub_id(base):
        raise ConfigError(
            f"an adapter on the Hub must name a base that others can load (got {base}); give its "
            "Hub id as --base-name"
        )


def push_folder(
    folder: str | Path, name: str, *, private: bool = False, remedy: str | None = None
) -> str:
    """Upload a folder's files to a model repository, made if need be; return the address.

    Logs in as huggingface_hub does: by ``HF_TOKEN``, or as ``hf auth login`` left it. Raises
    FileError where the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        message = "A chain of LoRA, by chainlora"
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=LOCK
        )
    except Exception as error:  # its own, and those of whichever HTTP library it has
        by_hand = f"it is written to {folder}: log in with `hf auth login`, and push it by "
        raise FileError(
            "what is pushed must reach the Hub",
            f"{type(error).__name__}: {error!s:.200} for {name}",
            remedy or f"{by_hand}`hf upload {name} {folder}`",
        ) from error
    return str(done.commit_url)


# --- runs ---


def push_run(run: str | Path, target: str, *, rows: bool = False) -> list[str]:
    """Send to a folder, or a repository of the Hub, what it lacks of a run; return these files.

    Rows that stages kept are sent only with `rows`, or where they were sent before. A repository
    that is new becomes private. Raises RunError where the target has entries that the run has not.
    """
    folder, is_remote = whole_run(run), _is_repository(target)
    with TemporaryDirectory() if is_remote else nullcontext(expanduser(target)) as made:
        if is_remote:
            _download(target, allow_patterns=HISTORY, local_dir=made)
        names = _send(folder, Path(made), rows=rows)
        trees = {name: read_tree(folder / name) for name in names if Path(name).name == CONFIG}
        if told := [name for name, tree in trees.items() if without_places(tree) != tree]:
            shown = ", ".join(told)
            logger.warning("%s name paths of this machine: share %s with care", shown, target)
        if is_remote:
            remedy = f"log in with `hf auth login`, or for a folder write ./{target}"
            push_folder(made, target, private=True, remedy=remedy)
    return names


def pull_run(source: str, run: str | Path) -> list[str]:
    """Copy into a run, or a new one, what it lacks of one that was pushed; return these files."""
    folder = Path(source).expanduser()
    if _is_repository(source):
        folder = _download(source) or folder  # fetches only what is new, too
    return _send(folder, Path(run).expanduser(), rows=True)


def _download(name: str, **keys: Any) -> Path | None:
    """Return a folder with files of a repository; None where there is no such repository."""
    try:
        return Path(snapshot_download(name, **keys))
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # as in `push_folder`
        raise nothing_at(name, "repository") from error


def _is_repository(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists() and not Path(name).parent.exists()


def _send(source: Path, target: Path, *, rows: bool) -> list[str]:
    """Copy what is new from one folder into another, and then replace its history."""
    own = read_history(source)
    if exists_in(target):
        known = read_history(target)
        new = _joined(own, known, rows, target)
        names = copy_files(source, target, new, known.files)
        if new != known:  # else not even a lock is written
            update_history(target, lambda now: _joined(own, now, rows, target))
        return names
    target = empty_folder(target)
    history = _joined(own, History(base=own.base, hold=own.hold), rows, target)
    with filled_folder(target) as scratch:
        names = copy_files(source, scratch, history)
        write_part(scratch / HISTORY, history)
    return names


def _joined(own: History, known: History, rows: bool, target: Path) -> History:
    """Return a history as a target gets it: without kept rows, unless `rows`, or the target has
    some already. Raises RunError where the target is not an earlier state of the run, or that has
    none."""
    if not own.entries:
        rule, remedy = "what is sent has an entry that is built", "chainlora train RUN builds them"
        raise RunError(rule, f"none for {target}", remedy)
    for key in [entry.key for entry in (*known.entries, *known.unbuilt)]:
        mine, there = own.find(key), known.find(key)
        if mine is None or there is None or mine.state != there.state:
            rule, remedy = "the target must be earlier than the source", "choose another target"
            raise RunError(rule, f"another {key} in {target}", remedy)
    kept = {entry.key: entry.kept for entry in known.entries}
    entries = tuple(
        entry.model_copy(update={"kept": (rows and entry.kept) or kept.get(entry.key)})
        for entry in own.entries
    )
    # what is not built does not travel: nobody's plug-ins run because a run was received
    return own.model_copy(update={"entries": entries, "unbuilt": (), "target": None})
