"""Rows that a run keeps, and what later stages make of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import settings

from chainlora import make_config, train
from chainlora.data.mixture import example_hashes, prompt_hashes
from chainlora.data.rows import MemoryRows
from chainlora.data.splits import prepare_splits
from chainlora.errors import RunError
from chainlora.models.loading import load_tokenizer
from chainlora.runs.reading import RunReader
from chainlora.runs.start import start_of
from chainlora.training.loop import train as train_run

SHORT = {"ranks": [2], "steps": [1]}


def test_a_run_keeps_a_sample_of_its_rows_and_hashes_of_all(
    tiny_folder, sentiment, tmp_path, monkeypatch
):
    monkeypatch.setattr("chainlora.data.splits.SAMPLE", 9)
    keys = {"output": str(tmp_path / "run"), "chain": SHORT}
    config = make_config(settings(tiny_folder, sentiment, **keys))
    train(config)
    (kept,) = RunReader(tmp_path / "run").kept().values()
    whole = prepare_splits(config.data, load_tokenizer(tiny_folder), 128)
    assert kept.counts == {"train": 32, "validation": 16, "test": 0}
    assert kept.validation[:] == whole.validation[:9]
    hashes = example_hashes(whole.train)
    assert kept.seen.tolist() == sorted(set(hashes.tolist()))
    assert example_hashes(kept.train).tolist() == sorted(hashes.tolist())[:9]
    assert kept.held_out.tolist() == np.unique(prompt_hashes(whole.validation, 0)).tolist()
    assert (kept.loss, kept.bound, len(kept.test)) == ("candidates", None, 0)


def test_a_stage_holds_the_rows_of_those_before_it(tiny_folder, sentiment, tmp_path):
    """A fork needs nothing of its parent; a stage that keeps no rows has those of the others."""
    whole = settings(tiny_folder, sentiment, tmp_path / "a", chain=SHORT)
    train(make_config(whole))
    start = start_of(RunReader(tmp_path / "a"), "b")
    data = {"data": whole["data"] | {"keep_rows": False}}
    for name in ("b", "c"):
        train_run(make_config(whole | data | {"output": str(tmp_path / name)}), start=start)
        start = start_of(RunReader(tmp_path / "b"), "c")
        data = {}
    assert list(RunReader(tmp_path / "b").kept()) == ["main"]
    assert list(RunReader(tmp_path / "c").kept()) == ["main", "c"]
    path = tmp_path / "b/rows/main.safetensors"
    assert path.read_bytes() == (tmp_path / "a/rows/main.safetensors").read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"rows/main.safetensors must be as the run wrote it"):
        RunReader(tmp_path / "b").kept()


def test_rows_are_written_and_read_as_they_are(tmp_path):
    from test_data_mixture import row

    from chainlora.data.kept import Kept, read_kept, write_kept

    rows = MemoryRows([row(3, (4, 5), (6,), (7, 8)), row(4, (), (9,))])
    hashes = np.array([1, 2**62], np.int64)
    kept = Kept(rows, MemoryRows(), rows, {"train": 7}, hashes, hashes[:1], "candidates", 2**62)
    write_kept(tmp_path / "rows.safetensors", kept)
    found = read_kept(tmp_path / "rows.safetensors")
    assert (found.train[:], found.validation[:], found.test[:]) == (rows[:], [], rows[:])
    assert (found.counts, found.loss, found.bound) == (kept.counts, kept.loss, kept.bound)
    assert (found.seen.tolist(), found.held_out.tolist()) == ([1, 2**62], [1])
    (tmp_path / "rows.safetensors").write_bytes(b"{}")
    with pytest.raises(RunError, match=r"must be readable \(got .*restore the file"):
        read_kept(tmp_path / "rows.safetensors")
