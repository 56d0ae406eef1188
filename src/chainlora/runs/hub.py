"""Exports on the Hub: a folder becomes a repository's new commit."""

from __future__ import annotations

from pathlib import Path

from chainlora.errors import ConfigError, FileError
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.cards import Naming, is_hub_id, public_name


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
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="A chain of LoRA, by chainlora"
        )
    except Exception as error:  # its own, and those of whichever HTTP library it has
        raise FileError(
            f"an export must reach the Hub to be pushed (got {type(error).__name__}: "
            f"{error!s:.200} for {name}); it is written to {folder}: log in with "
            f"`hf auth login`, and push it by `hf upload {name} {folder}`"
        ) from error
    return str(done.commit_url)
