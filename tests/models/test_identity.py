"""Which files make a base what it is, and that each is read once while it is unchanged."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from helpers import edit_json
from safetensors.torch import load_file, save_file

from chainlora import files
from chainlora.errors import ModelError
from chainlora.models import identity
from chainlora.models.identity import base_files, changed_files
from chainlora.models.loading import load_model

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def later(monkeypatch) -> None:
    """Files that have just been written are a minute old."""
    monkeypatch.setattr(identity, "time", SimpleNamespace(time=lambda: time.time() + 60))


def test_all_that_decides_what_a_base_computes_is_counted(folder):
    before = base_files(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(before)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3  # one value of one tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert changed_files(before, base_files(folder)) == ["model.safetensors"]
    edit_json(folder / "config.json", rms_norm_eps=1e-4)
    edit_json(folder / "tokenizer_config.json", eos_token="<s>")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(folder / "generation_config.json", eos_token_id=7)
    assert changed_files(before, base_files(folder)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]


def test_every_shard_is_counted(tmp_path, folder):
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    found = base_files(tmp_path / "sharded")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert {*shards, "model.safetensors.index.json"} <= set(found)
    (tmp_path / "sharded" / shards[0]).unlink()
    with pytest.raises(ModelError, match="every shard"):
        base_files(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="must map weights to files"):
        base_files(tmp_path / "sharded")


def test_a_file_is_read_once_while_it_is_unchanged(folder, later, monkeypatch):
    path = folder / "model.safetensors"
    read = []

    def counted(each: Path) -> str:
        read.append(each)
        return files.sha256(each)

    monkeypatch.setattr(identity, "sha256", counted)
    first = identity.hash_file(path)
    assert identity.hash_file(path) == first == files.sha256(path)
    assert len(read) == 1
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size, inode and mtime the same
    assert identity.hash_file(path) == files.sha256(path) != first


def test_a_damaged_or_unwritable_cache_does_no_harm(folder, cache, later, monkeypatch):
    path = folder / "model.safetensors"
    true = identity.hash_file(path)
    (note,) = (cache / "hashes").iterdir()
    for content in (b"", true[:-1].encode(), b"\xff" * 64):
        note.write_bytes(content)
        assert identity.hash_file(path) == true
    (cache / "file").write_text("")
    monkeypatch.setenv("CHAINLORA_CACHE", str(cache / "file"))
    assert identity.hash_file(path) == true


def test_integer_buffers_are_no_weights(tmp_path, folder):
    """Old GPT-2 checkpoints hold their causal masks as bytes, under names that end in bias."""
    tiny_model("gpt2", vocab_size=400).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder, torch.float32)
