"""Files are whole or absent, checked, and deleted by name first; errors say what to do."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from faults.lives import start, wait
from helpers import sign
from to_gguf.test_from_gguf import TOKENS, write_gguf

from chainlora import export_adapter, files
from chainlora.errors import FileError
from chainlora.evaluation.stage_scores import Cell, line_of, stage_matrix
from chainlora.models.loading import load_model
from chainlora.runs.export import empty_folder


@pytest.mark.parametrize("is_there", [True, False])
def test_a_symbolic_link_stays_one_and_its_target_is_filled(tmp_path, is_there):
    if is_there:
        (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with files.replaced_folder(tmp_path / "link") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text("x")
    assert (tmp_path / "link" / "sub" / "file").read_text() == "x"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "target"]
    assert (tmp_path / "link").is_symlink()


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


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused_beforehand(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FileError, match="must be writable"):
        files.check_writable(tmp_path / "closed" / "run")


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path):
    for name in ("out.99999999-3.new", "out.b.12-3.new"):  # the other one may be at work
        (tmp_path / name).mkdir()
    empty_folder(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out.b.12-3.new"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_two_exports_into_one_folder(chainlora, stored_run, tmp_path):
    """The second one deleted the files that the first one was writing."""
    out, flag = tmp_path / "out", tmp_path / "flag"

    def pause(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{out}.") and not flag.exists():
            flag.write_text("wait")
            while flag.read_text():
                time.sleep(0.01)

    first = start(lambda: (sys.addaudithook(pause), export_adapter(stored_run, out)))
    while not flag.exists():
        time.sleep(0.01)
    done = chainlora(f"export {stored_run} --to adapter --output {out}")
    done.refused(f"Cannot write {out}: process {first[0]} writes it. Wait for it")
    flag.write_text("")
    assert wait(first).status == 0
    assert chainlora(f"verify {out} {stored_run}").status == 0


def test_an_output_that_was_filled_meanwhile_stays(stored_run, tmp_path, caplog):
    """A base that is not at hand is told after `output` was looked at, before it is written."""
    run, other = shutil.copytree(stored_run, tmp_path / "run"), []
    sign(run, lambda tree: tree["base"].update(model="no/body"))

    def meanwhile(record: logging.LogRecord) -> bool:
        if not other:
            other.append(record)
            export_adapter(run, tmp_path / "out", rank=2)
        return True

    caplog.handler.addFilter(meanwhile)
    with pytest.raises(FileError, match=r"\(got Directory not empty for .*out\); choose another"):
        export_adapter(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


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


# --- a full disk, by the limit on the size of files; at every file operation: tests/faults ---


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Make the system refuse to write files beyond a size: EFBIG, as ENOSPC on a full disk."""
    resource = pytest.importorskip("resource", reason="no limit on the size of files here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_gguf_file_that_cannot_be_converted_leaves_nothing(tmp_path, cache):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(TOKENS)))
    with files_up_to(10_000), pytest.raises(FileError, match=r"must be written \(got .*; free"):
        load_model(file, torch.float32)
    assert [p.name for p in (cache / "gguf").iterdir() if p.suffix != ".lock"] == []
    load_model(file, torch.float32)


def test_what_is_only_looked_at_is_shown(chainlora, run_copy, caplog):
    facts = ("main", "rows", "validation", "accuracy", 0.5, 0.0, 9, 9)
    cells = [Cell(f"{n}", *facts) for n in range(200)]
    (run_copy / "matrix.jsonl").write_text("".join(map(line_of, cells)))  # of other states
    with files_up_to(20_000):
        shown, scored = chainlora("inspect", run_copy), stage_matrix(run_copy)
    assert (shown.status, "overlap" in shown.out) == (0, True)
    assert f"chainlora: a file must be written (got File too large for {run_copy}" in shown.err
    assert len(scored.cells) == 2
    assert "the scores are not kept: a file must be written" in caplog.text
