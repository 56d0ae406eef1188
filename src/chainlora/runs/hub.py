"""Push exports to the Hub; push and pull runs, to and from the Hub or a folder.

Pushing a run copies the new files that its history names, and then the history. An export becomes a
commit of a repository.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from chainlora.config.reading import read_tree
from chainlora.errors import ConfigError, FileError, RunError
from chainlora.files import replaced_folder
from chainlora.runs.addresses import Address, nothing_at, open_run
from chainlora.runs.beginning import copy_files
from chainlora.runs.cards import Naming, is_hub_id, public_name
from chainlora.runs.changes import whole_run
from chainlora.runs.documents import write_part
from chainlora.runs.entries import CONFIG
from chainlora.runs.export import empty_folder
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.lineage import without_places
from chainlora.runs.locks import LOCK, writing
from chainlora.runs.paths import HISTORY, exists_in
from chainlora.runs.sent import note_sent

logger = logging.getLogger(__name__)


def check_push(run: Address, target: str, naming: Naming) -> None:
    """Raise ConfigError unless an export can be pushed to the Hub.

    It needs the name of a repository, and an adapter needs a base that others can load.
    """
    if not is_hub_id(naming.name or ""):
        rule = "--push-to-hub must be OWNER/NAME"
        raise ConfigError(rule, repr(naming.name), "name a repository")
    base = naming.base or public_name(open_run(run).base.model)
    if target == "adapter" and not is_hub_id(base):
        rule = "an adapter on the Hub must name a base that others can load"
        raise ConfigError(rule, base, "give its Hub id as --base-name")


def push_folder(
    folder: str | Path, name: str, *, private: bool = False, remedy: str | None = None
) -> str:
    """Upload a folder to a model repository, which is created if needed; return its address.

    The login is that of huggingface_hub: ``HF_TOKEN``, or ``hf auth login``. Raises FileError if
    the Hub refuses the upload or cannot be reached; the folder is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        message = "A chain of LoRA, by chainlora"
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=f"{LOCK}*"
        )
    except Exception as error:  # errors of huggingface_hub and of its HTTP library
        by_hand = f"it is written to {folder}: log in with `hf auth login`, and push it by "
        raise FileError(
            "a push must reach the Hub",
            f"{type(error).__name__}: {error!s:.200} for {name}",
            remedy or f"{by_hand}`hf upload {name} {folder}{' --private' if private else ''}`",
        ) from error
    return str(commit.commit_url)


# --- runs ---


def push_run(run: str | Path, target: str, *, rows: bool = False) -> list[str]:
    """Copy the new files of a run to a folder or a repository of the Hub; return their names.

    Kept rows are sent only with `rows`, or if they were sent before. A new repository is private.
    Raises RunError if the target has entries that the run does not have.
    """
    folder, is_remote = whole_run(run), _is_repository(target)
    remedy = f"log in with `hf auth login`, or for a folder write ./{target}"
    with TemporaryDirectory() if is_remote else nullcontext(expanduser(target)) as made:
        if is_remote:
            _download(target, remedy, allow_patterns=HISTORY, local_dir=made)
            rmtree(Path(made) / ".cache", ignore_errors=True)  # the download's own notes
        names = _send(folder, Path(made), rows=rows)
        trees = {name: read_tree(folder / name) for name in names if Path(name).name == CONFIG}
        if with_paths := [name for name, tree in trees.items() if without_places(tree) != tree]:
            said = "%s name paths of this machine: share %s with care"
            logger.warning(said, ", ".join(with_paths), target)
        if is_remote:
            push_folder(made, target, private=True, remedy=remedy)
    note_sent(folder, "copy", open_run(folder).state.digest, target)
    return names


def pull_run(source: str, run: str | Path) -> list[str]:
    """Copy the new files of a pushed run into a run, or into a new one; return their names."""
    folder = Path(source).expanduser()
    if _is_repository(source):
        found = _download(source)  # only new files
        if found is None:
            raise nothing_at(source, "repository")
        folder = found
    return _send(folder, Path(run).expanduser(), rows=True)


def _download(name: str, remedy: str | None = None, **keys: Any) -> Path | None:
    """Return a folder with files of a repository, None if there is no such repository.

    `remedy` is that of a push, for which the repository need not be there.
    """
    try:
        return Path(snapshot_download(name, **keys))
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # as in `push_folder`
        if remedy is not None:
            got = f"{type(error).__name__} for {name}"
            raise FileError("a push must reach the Hub", got, remedy) from error
        raise nothing_at(name, "repository") from error


def _is_repository(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists() and not Path(name).parent.exists()


def _send(source: Path, target: Path, *, rows: bool) -> list[str]:
    """Copy the new files of a run from one folder into another, then replace its history."""
    source_history = read_history(source)
    if exists_in(target):
        before = read_history(target)
        new = _joined(source_history, before, rows)
        if new == before and new.files.keys() <= before.files.keys():
            return copy_files(source, target, new, before.files)  # no lock file is written
        with writing(target):
            names = copy_files(source, target, new, before.files)
            update_history(target, lambda now: new)
        return names
    target = empty_folder(target)
    empty = History(base=source_history.base, hold=source_history.hold)
    history = _joined(source_history, empty, rows)
    with replaced_folder(target, only_empty=True) as scratch:
        names = copy_files(source, scratch, history)
        write_part(scratch / HISTORY, history)
    return names


def _joined(source: History, before: History, rows: bool) -> History:
    """Return the history that a target gets, in place of the one `before`.

    Without `rows`, it names only kept rows that the target has already. Raises RunError if the
    target is not an earlier version of the source, or if the source has no built entry.
    """
    if not source.entries:
        rule, remedy = "a run needs a built entry to be sent", "chainlora train RUN builds them"
        raise RunError(rule, "none", remedy)
    if source.versions[source.at].marks:
        rule, remedy = "a run is sent after its prune has ended", "chainlora train RUN ends it"
        raise RunError(rule, "marks of stages to delete", remedy)
    source = source.complete()
    sent = {entry.digest: entry.state for entry in source.entries}
    lacking = [e.key for e in before.entries if sent.get(e.digest) != e.state]
    if before.entries and source.versions[: len(before.versions)] != before.versions:
        lacking.append("a version")
    if lacking:
        rule, remedy = "the target must be earlier than the source", "choose a new target"
        raise RunError(rule, f"{lacking[0]}, which the source lacks", remedy)
    held = {entry.kept for entry in before.entries} - {*before.unsent}
    kept = {entry.kept for entry in source.entries if entry.kept is not None}
    unsent = {*source.unsent} if rows else kept - held
    stages = {  # paths are not sent
        key: stage.model_copy(update={"config": without_places(stage.config)})
        for key, stage in source.stages.items()
    }
    return source.model_copy(update={"unsent": tuple(sorted(unsent)), "stages": stages})
