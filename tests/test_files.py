"""Files are whole or absent, checked, and deleted by name first; errors say what to do."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from chainlora import files
from chainlora.errors import FileError
from chainlora.runs.export import empty_folder


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


def test_a_folder_that_is_replaced_is_there_but_for_an_instant(tmp_path, monkeypatch):
    place, gone = tmp_path / "place", []
    rename = Path.rename

    def watched(self, target):
        rename(self, target)
        gone.append(not place.is_dir())

    monkeypatch.setattr(Path, "rename", watched)
    for text in "ab":
        with files.replaced_folder(place) as scratch:
            (scratch / text).write_text(text)
    assert gone == [False, True, False]
    assert [path.name for path in place.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_that_cannot_be_made_is_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, message in [
        ("file/run", "must lie in folders"),
        ("file", "must lie in folders"),
        ("link", "symbolic link to nothing"),
        ("x" * 300, "File name too long for .*; choose a shorter name"),
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


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path):
    for name in ("out.12-3.new", "out.b.12-3.new"):  # the other one may be at work
        (tmp_path / name).mkdir()
    empty_folder(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out.b.12-3.new"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path, monkeypatch):
    """In containers, every process that writes has the same one."""
    monkeypatch.setattr(files, "_counter", itertools.count())
    (tmp_path / f"out.{os.getpid()}-0.new").mkdir()
    with files.replaced_folder(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert (tmp_path / "out" / "file").is_file()


def test_what_is_named_as_backups_are_is_no_scratch(tmp_path):
    own = {"history.json.old", "config.yaml.new", "links.old", "v1-2.old"}
    for name in (*own, "history.json.12-3.new", "links.12-0.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "links.12-1.old").symlink_to(tmp_path / "mine")
    files.remove_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*own, "mine"}
