"""What lies beside the weights of an export: the base's licences, the tokenizer of the rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from chainlora import files
from chainlora.errors import ModelError
from chainlora.models.identity import tokenizer_files

_CONFIGS = ("config.json", "generation_config.json")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def is_licence(name: str) -> bool:
    """Say whether a file's name is that of a licence's text."""
    return name.split(".")[0].upper() in _LICENCES


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
    for path in _links(sorted([*licences, *configs, *tokenizer_files(base)])):
        if not any(path.resolve().is_relative_to(home.resolve()) for home in _homes(base)):
            raise ModelError(
                f"what an export copies must lie in the base's folder (got {path.name} in {base}, "
                f"a link to {path.resolve()}); put a copy in its place"
            )


def _links(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_symlink() or path.parent.is_symlink()]


def _homes(base: Path) -> list[Path]:
    """Return the folders that a base's files may lie in."""
    in_cache = base.parent.name == "snapshots"
    return [base, base.parent.parent / "blobs"] if in_cache else [base]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as a transformers checkpoint."""
    _complete_generation(model.generation_config)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise files.unwritable(error, folder) from error


def _complete_generation(config: Any) -> None:
    """Make a base's generation config one that transformers saves: it reads sampling values without
    do_sample, but refuses to write them."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
