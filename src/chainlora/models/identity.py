"""What makes a model folder the base that a run was trained on: a hash of each file that counts.

Counted are all bytes of the weights, the tokenizer's files, and the keys of ``config.json`` and
``generation_config.json`` that decide what is computed. Not counted: where the model came from,
versions, and the dtype that it is stored or loaded in, which a run states by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainlora.errors import ModelError
from chainlora.files import reported
from chainlora.models.hashing import hash_files

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

    Large files are read once while they are unchanged (`hashing`). Of JSON configs, the keys that
    count are hashed, in sorted order.
    """
    hashed = [*weight_files(folder), *tokenizer_files(folder)]
    with reported(folder, "read"):
        digests = hash_files(hashed)
        found = {
            path.relative_to(folder).as_posix(): digest
            for path, digest in zip(hashed, digests, strict=True)
        }
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
