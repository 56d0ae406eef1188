"""Files are whole or absent, checked, and deleted by name first; errors say what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chainlora import files
from chainlora.errors import FileError


def test_every_kind_of_file_is_written_and_leaves_no_scratch(tmp_path):
    files.write_text(tmp_path / "a.txt", "ä\n")
    files.write_bytes(tmp_path / "a.bin", b"\0\1")
    files.write_json(tmp_path / "a.json", {"b": 1, "a": "ä"})
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)}, {"format": "pt"})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä\n"
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1"
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": "ä"}
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"got No space left on device for .*a.json\); free some"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "folder"
    for content in ("one", "two"):
        with files.replaced_folder(target) as scratch:
            (scratch / "inner").mkdir()
            (scratch / "inner" / "file").write_text(content)
        assert (target / "inner" / "file").read_text() == content

    def fail(scratch) -> None:
        (scratch / "half").write_text("half")
        raise KeyError

    with pytest.raises(KeyError), files.replaced_folder(target) as scratch:
        fail(scratch)
    assert [each.name for each in target.iterdir()] == ["inner"]
    assert [each.name for each in target.parent.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(FileError, match="check the disk"),
        files.replaced_folder(tmp_path / "folder"),
    ):
        pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_an_empty_folder_that_keeps_its_name_is_filled(tmp_path, monkeypatch):
    """A mount point cannot be renamed; a symbolic link stays one."""
    (tmp_path / "mount").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    rename = Path.rename

    def busy(self, target):
        if self.name == "mount":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    for name in ("mount", "link"):
        with files.replaced_folder(tmp_path / name) as scratch:
            (scratch / "sub").mkdir()
            (scratch / "sub" / "file").write_text("x")
        assert (tmp_path / name / "sub" / "file").read_text() == "x"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "mount", "target"]
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(FileError, match="busy"), files.replaced_folder(tmp_path / "mount"):
        pass  # not empty any more


def test_what_is_removed_disappears_by_name_first(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *a, **k: None)  # killed before it deletes
        files.remove(tmp_path / "folder")
    (left,) = tmp_path.iterdir()
    assert files.is_scratch(left.name)
    files.remove_scratch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    files.remove(tmp_path / "nothing")
    files.remove_scratch(tmp_path / "nothing")


def test_checksums_are_those_of_the_bytes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "sub" / "a").write_bytes(b"a")
    assert files.checksums(tmp_path) == {
        "b": hashlib.sha256(b"b").hexdigest(),
        "sub/a": hashlib.sha256(b"a").hexdigest(),
    }


def test_a_folder_that_cannot_be_made_is_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, message in [
        ("file/run", "must lie in folders"),
        ("file", "must lie in folders"),
        ("link", "symbolic link to nothing"),
        ("x" * 300, "File name too long for .*; choose a shorter name"),
        ("a\0b", "without NUL"),
        ("a\ud800b", "without NUL"),
    ]:
        with pytest.raises(FileError, match=message) as raised:
            files.check_writable(tmp_path / name)
        assert "\n" not in str(raised.value)
        str(raised.value).encode()  # can be printed
    files.check_writable(tmp_path / "new" / "run")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused_beforehand(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FileError, match="must be writable"):
        files.check_writable(tmp_path / "closed" / "run")
