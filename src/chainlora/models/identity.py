"""Identify a base model by hashes of its files, so that a run finds its exact base again.

The hashes cover all bytes of the weights, the tokenizer's files, and the keys of ``config.json``
and ``generation_config.json`` that affect outputs. They do not cover the source of the model,
versions and the dtype; a run records its own dtype.

A cache stores the hashes, so that each file is read once. An entry is valid while size and times of
the file stay the same. A file that changed less than two seconds ago is not cached: another change
within the resolution of its times would not be seen (Git calls such entries racily clean).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from chainlora.errors import FileError, ModelError
from chainlora.files import make_folder, reported, sha256, write_text

logger = logging.getLogger(__name__)

_RACY_SECONDS = 2.0
_TOKENIZERS = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"]
_TOKENIZERS += ["*.tiktoken", "tekken.json", "sentencepiece*.model"]
_TOKENIZER_EXTRAS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
_TOKENIZER_EXTRAS += ["merges.txt", "chat_template.json", "chat_template.jinja"]
_TOKENIZER_EXTRAS += ["additional_chat_templates/*.jinja"]
_CONFIGS = ("config.json", "generation_config.json")
_IGNORED_KEYS = {"_name_or_path", "_commit_hash", "_from_model_config", "transformers_version"}
_IGNORED_KEYS |= {"torch_dtype", "dtype", "use_cache"}
_INDEX = "model.safetensors.index.json"


def base_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that defines a model, by name within the folder.

    JSON configs are hashed without ignored keys, in sorted order. Hashes of unchanged files come
    from the cache.
    """
    hashed = [*weight_files(folder), *tokenizer_files(folder)]
    with reported(folder, "read"):
        names = [path.relative_to(folder).as_posix() for path in hashed]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            digests = dict(zip(names, pool.map(hash_file, hashed), strict=True))
        for name in _CONFIGS:
            if (folder / name).is_file():
                digests[name] = _config_digest(folder / name)
    return dict(sorted(digests.items()))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder that transformers would read."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        rule, got = f"{_INDEX} must map weights to files", f"{error} in {folder}"
        raise ModelError(rule, got, "download it again") from error
    for shard in shards:
        if not shard.is_file():
            got = f"no {shard.name} in {folder}"
            raise ModelError("a model folder must hold every shard", got, "download it again")
    return [index, *shards]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has a tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return all files of a folder that a tokenizer reads."""
    patterns = _TOKENIZERS + _TOKENIZER_EXTRAS
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def need_own_files(folder: Path, paths: Iterable[Path]) -> None:
    """Raise ModelError if one of `paths` in a folder is a symbolic link out of it.

    Otherwise a copy of them could contain any file of this machine. In the Hub's cache, links into
    its blobs are allowed.
    """
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    allowed = [own.resolve() for own in (folder, *blobs)]
    for path in sorted(paths):
        if path.exists() and not any(map(path.resolve().is_relative_to, allowed)):
            rule = "files of a model or an adapter must lie in its folder"
            got = f"{path.name} in {folder}, a link to {path.resolve()}"
            raise ModelError(rule, got, "put a copy in its place")


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the sorted names of files that differ, are missing or are new."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _config_digest(path: Path) -> str:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        got = f"{error} in {path.parent}"
        raise ModelError(f"{path.name} must be JSON", got, "download it again") from error
    text = json.dumps(_without_ignored(tree), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_ignored(tree: Any) -> Any:
    """Remove ignored keys, also from nested configs."""
    if isinstance(tree, dict):
        return {
            key: _without_ignored(value) for key, value in tree.items() if key not in _IGNORED_KEYS
        }
    return [_without_ignored(value) for value in tree] if isinstance(tree, list) else tree


# --- hashes of large files ---


def cache_dir() -> Path:
    """Return ``$CHAINLORA_CACHE``, ``$XDG_CACHE_HOME/chainlora`` or ``~/.cache/chainlora``."""
    if folder := os.environ.get("CHAINLORA_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "chainlora"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file; cached while the file is unchanged."""
    before = _state(path)
    entry = cache_dir() / "hashes" / hashlib.sha256(before.encode()).hexdigest()
    with suppress(OSError, ValueError):  # no entry yet, or a damaged one
        if len(known := entry.read_text(encoding="utf-8")) == 64:
            return known
    digest = sha256(path)
    status = path.stat()
    age = time.time() - max(status.st_mtime, status.st_ctime)  # below 0 if the clock was set back
    if _state(path) == before and age > _RACY_SECONDS:
        try:
            make_folder(entry.parent)
            write_text(entry, digest)
        except (FileError, OSError) as error:  # the next call hashes the file again
            logger.debug("cannot cache a hash: %s", error)
    return digest


def _state(path: Path) -> str:
    status = path.stat()  # including ctime: tools can copy an mtime
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
