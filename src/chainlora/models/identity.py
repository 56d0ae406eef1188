"""What makes a model folder the base that a run was trained on: a hash of each file that counts.

Counted are all bytes of the weights, the tokenizer's files, and the keys of ``config.json`` and
``generation_config.json`` that decide what is computed. Not counted: where the model came from,
versions, and the dtype that it is stored or loaded in, which a run states by itself.

Hashes are remembered in the cache folder, so that a file is read once. A hash holds for a path as
long as the file has the size and the times that it had. A file changed less than two seconds ago is
not remembered, since a second change within the resolution of its times could go unseen (Git calls
such entries racily clean).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from chainlora.errors import FileError, ModelError
from chainlora.files import make_folder, reported, sha256, write_text

logger = logging.getLogger(__name__)

_RACY_SECONDS = 2.0
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "sentencepiece*.model",
)
_BESIDE_TOKENIZERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_CONFIGS = ("config.json", "generation_config.json")
_NOT_COUNTED = {
    "_name_or_path",
    "_commit_hash",
    "_from_model_config",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
}
_INDEX = "model.safetensors.index.json"


def base_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256, by name within the folder, of every file that makes a model what it is.

    Large files are read once while they are unchanged. Of JSON configs, the keys that
    count are hashed, in sorted order.
    """
    hashed = [*weight_files(folder), *tokenizer_files(folder)]
    with reported(folder, "read"):
        names = [path.relative_to(folder).as_posix() for path in hashed]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            found = dict(zip(names, pool.map(hash_file, hashed), strict=True))
        for name in _CONFIGS:
            if (folder / name).is_file():
                found[name] = _config_digest(folder / name)
    return dict(sorted(found.items()))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: those that transformers reads."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{_INDEX} must map weights to files (got {error} in {folder}); download it again"
        ) from error
    for shard in shards:
        if not shard.is_file():
            raise ModelError(
                f"a model folder must hold every shard (got no {shard.name} in {folder}); "
                "download it again"
            )
    return [index, *shards]


def has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    patterns = (*_TOKENIZERS, *_BESIDE_TOKENIZERS)
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of files that differ, are missing or are new, in order."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _config_digest(path: Path) -> str:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} must be JSON (got {error} in {path.parent}); download it again"
        ) from error
    text = json.dumps(_counted(tree), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _counted(tree: Any) -> Any:
    """Leave out keys that do not count, in nested configs too."""
    if isinstance(tree, dict):
        return {key: _counted(value) for key, value in tree.items() if key not in _NOT_COUNTED}
    return [_counted(value) for value in tree] if isinstance(tree, list) else tree


# --- hashes of large files ---


def cache_dir() -> Path:
    """Return ``$CHAINLORA_CACHE``, ``$XDG_CACHE_HOME/chainlora`` or ``~/.cache/chainlora``."""
    if own := os.environ.get("CHAINLORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "chainlora"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, remembered while the file is unchanged."""
    before = _state(path)
    note = cache_dir() / "hashes" / hashlib.sha256(before.encode()).hexdigest()
    with suppress(OSError, ValueError):  # none yet, or a damaged one
        if len(known := note.read_text(encoding="utf-8")) == 64:
            return known
    digest = sha256(path)
    status = path.stat()
    age = time.time() - max(status.st_mtime, status.st_ctime)  # below 0 where the clock was set
    if _state(path) == before and age > _RACY_SECONDS:
        try:
            make_folder(note.parent)
            write_text(note, digest)
        except (FileError, OSError) as error:  # the file is read again next time
            logger.debug("a hash is not remembered: %s", error)
    return digest


def _state(path: Path) -> str:
    found = path.stat()  # with ctime, as an mtime can be copied
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
