"""What lies beside the weights of an export: the base's licences, the tokenizer of the rows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from chainlora.errors import ModelError
from chainlora.models.identity import tokenizer_files

_CONFIGS = ("config.json", "generation_config.json")
_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)([.-].*)?", re.IGNORECASE)


def is_licence(name: str) -> bool:
    """Say whether a file's name is that of a licence's text."""
    return _LICENCE.fullmatch(name) is not None


def copy_licences(base: Path, output: Path) -> None:
    """Copy the texts of a base's licences into an export."""
    for path in sorted(base.iterdir()):
        if path.is_file() and is_licence(path.name):
            shutil.copyfile(path, output / path.name)


def check_own_files(base: Path) -> None:
    """Raise ModelError where an export would hold what lies outside the base's folder.

    A link can lead a licence, a template or a config to any file of this machine. The Hub's cache
    has links too, to its own blobs.
    """
    licences = [path for path in base.iterdir() if is_licence(path.name)]
    configs = [base / name for name in _CONFIGS]
    blobs = [base.parent.parent / "blobs"] if base.parent.name == "snapshots" else []
    homes = [home.resolve() for home in (base, *blobs)]
    for path in sorted([*licences, *configs, *tokenizer_files(base)]):
        is_link = path.is_symlink() or path.parent.is_symlink()
        if is_link and not any(map(path.resolve().is_relative_to, homes)):
            raise ModelError(
                f"what an export copies must lie in the base's folder (got {path.name} in {base}, "
                f"a link to {path.resolve()}); put a copy in its place"
            )
