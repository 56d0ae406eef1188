"""The Hub: an export becomes a repository's new commit, and a run is pushed and pulled.

A run is pushed as the files that its history names, of which those that are there are not sent
again, and at last the history. A folder is pushed to in the same way, without the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chainlora import files
from chainlora.config.staging import HISTORY
from chainlora.errors import ChainLoRAError, ConfigError, FileError, RunError
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.cards import Naming, is_hub_id, public_name
from chainlora.runs.changes import whole_run
from chainlora.runs.history import (
    DAMAGED,
    RECORDS,
    History,
    exists_in,
    read_history,
    update_history,
    write_part,
)
from chainlora.runs.locks import refuse_links
from chainlora.runs.resuming import refuse_if_taken


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


def push_folder(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload a folder's files to a model repository, made if need be; return the address.

    Logs in as huggingface_hub does: by ``HF_TOKEN``, or as ``hf auth login`` left it. Raises
    FileError where the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    remedy = f"push it by `hf upload {name} {folder}`"
    with _reaching("an export", name, f"it is written to {folder}: log in with", remedy):
        api.create_repo(name, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="A chain of LoRA, by chainlora"
        )
    return str(done.commit_url)


@contextmanager
def _reaching(what: str, name: str, login: str, remedy: str) -> Iterator[None]:
    """Turn what an upload or download raises into a FileError."""
    try:
        yield
    except ChainLoRAError:
        raise
    except Exception as error:  # its own, and those of whichever HTTP library it has
        raise FileError(
            f"{what} must reach the Hub (got {type(error).__name__}: {error!s:.200} for {name}); "
            f"{login} `hf auth login`, and {remedy}"
        ) from error


# --- runs ---


def push_run(run: str | Path, target: str, *, rows: bool = False) -> list[str]:
    """Send to a folder, or a repository of the Hub, what it lacks of a run; return these files.

    Rows that stages kept are sent only with `rows`, or where they were sent before. A repository
    that is new becomes private. Raises RunError where the target has entries that the run has not.
    """
    run = whole_run(run)
    if not _is_repository(target):
        return _send(run, Path(target).expanduser(), rows=rows)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    remedy = f"push it again, or for a folder write ./{target}"
    with _reaching("a run", target, "log in with", remedy), TemporaryDirectory() as made:
        api.create_repo(target, private=True, exist_ok=True)
        there = Path(api.snapshot_download(target, allow_patterns=HISTORY))
        known = read_history(there) if exists_in(there) else None
        history, names = _new(run, known, rows=rows, target=target)
        write_part(Path(made) / HISTORY, history)
        sent = [CommitOperationAdd(name, run / name) for name in names]
        sent.append(CommitOperationAdd(HISTORY, Path(made) / HISTORY))
        api.create_commit(target, sent, commit_message="A run, by chainlora")
    return names


def pull_run(source: str, run: str | Path) -> list[str]:
    """Copy into a run, or a new one, what it lacks of one that was pushed; return these files."""
    folder = Path(source).expanduser()
    if _is_repository(source):
        from huggingface_hub import snapshot_download

        remedy = f"pull it again, or for a folder write ./{source}"
        with _reaching("a run", source, "log in with", remedy):
            folder = Path(snapshot_download(source))  # it fetches only what is new, too
    else:
        refuse_links(folder)
    return _send(folder, Path(run).expanduser(), rows=True)


def _is_repository(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists() and not Path(name).parent.exists()


def _send(source: Path, target: Path, *, rows: bool) -> list[str]:
    """Copy what is new from one folder into another, and then replace its history."""
    if exists_in(target):
        history, names = _new(source, read_history(target), rows=rows, target=target)
        for name in names:
            files.copy_file(source / name, target / name)
        update_history(target, lambda now: _joined(read_history(source), now, rows, target))
        return names
    refuse_if_taken(target)
    history, names = _new(source, None, rows=rows, target=target)
    with files.replaced_folder(target) as scratch:
        for name in names:
            files.copy_file(source / name, scratch / name)
        write_part(scratch / HISTORY, history)
    return names


def _new(
    source: Path, known: History | None, *, rows: bool, target: object
) -> tuple[History, list[str]]:
    """Return the history that a target gets, and the files that it lacks, each checked."""
    history = _joined(read_history(source), known, rows, target)
    there = {} if known is None else known.files
    names = [name for name, digest in history.files.items() if there.get(name) != digest]
    names = [n for n in names if (source / n).is_file() or Path(n).name != RECORDS]
    for name in names:
        with files.reported(source / name, "read"):
            if not files.sha256(source / name).startswith(history.files[name]):
                rule = f"{name} must be as the run wrote it"
                raise RunError(rule, f"other bytes in {source}", DAMAGED)
    return history, names


def _joined(own: History, known: History | None, rows: bool, target: object) -> History:
    """Return a history as a target gets it: without kept rows, unless `rows`, or the target has
    some already."""
    before = {} if known is None else {entry.key: entry for entry in known.entries}
    for key, entry in before.items():
        if (mine := own.find(key)) is None or mine.state != entry.state:
            rule, got = (
                "what is there must be an earlier state of the same run",
                f"{key} in {target}",
            )
            raise RunError(rule, got, "pull it first, or take another place")
    kept = {key: entry.kept for key, entry in before.items()}
    entries = tuple(
        e.model_copy(update={"kept": (e.kept if rows else None) or kept.get(e.key)})
        for e in own.entries
    )
    return own.model_copy(update={"entries": entries})
