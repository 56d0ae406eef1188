"""Writes that fail for real, by the system's limit on the size of files: our error, nothing left.

The long list, of every file operation, is in tests/faults.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from conftest import tiny_model
from test_models import TOKENS, write_gguf

from chainlora.cli.main import run as command
from chainlora.errors import FileError
from chainlora.evaluation.stage_scores import Cell, stage_matrix
from chainlora.models.loading import load_model


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Make the system refuse to write files beyond a size: EFBIG, as ENOSPC on a full disk."""
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
    cells = [
        Cell(f"{n}", "main", "rows", "validation", "accuracy", 0.5, 0.0, 9, 9) for n in range(200)
    ]
    lines = [json.dumps(asdict(cell)) + "\n" for cell in cells]  # of other states
    (run_copy / "matrix.jsonl").write_text("".join(lines))
    with files_up_to(20_000):
        shown, scored = chainlora("inspect", run_copy), stage_matrix(run_copy)
    assert (shown.status, "overlap" in shown.out) == (0, True)
    assert f"chainlora: a file must be written (got File too large for {run_copy}" in shown.err
    assert len(scored.cells) == 2
    assert "the scores are not kept: a file must be written" in caplog.text


def test_predictions_that_cannot_be_written_are_refused_before_the_model_loads(
    sentiment, tmp_path, capsys
):
    (tmp_path / "file").write_text("mine")
    where = str(tmp_path / "file" / "predictions.jsonl")
    words = ["eval", "/no/such/model", "--task", str(sentiment / "task.yaml")]
    words += ["--data", str(sentiment), "--predictions", where]
    assert command(words) == 1
    assert "at or below the file" in capsys.readouterr().err
