"""Run directories of version 0.1 load, resume and export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import as_format_1, assert_same_links, settings, stop_after

from chainlora import export_adapter, inspect_run, load_run, make_config, train
from chainlora.errors import RunError
from chainlora.runs.directory import RunDirectory


def test_a_run_of_version_0_1_loads_inspects_and_exports(run_copy, tmp_path):
    before = load_run(run_copy)[0].state_dict()
    as_format_1(run_copy)
    after = load_run(run_copy)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(inspect_run(run_copy)["links"]) == 3
    export_adapter(run_copy, tmp_path / "adapter")


def test_a_run_of_version_0_1_resumes_to_the_same_bits_and_is_checked_from_then_on(
    rich_config, tmp_path
):
    train(rich_config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(rich_config, 6)
    as_format_1(tmp_path / "run")
    train(rich_config, resume=True)
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    manifest = RunDirectory(tmp_path / "run").manifest()
    assert manifest.format == 2
    assert "links/000/adapter_model.safetensors" in (manifest.files or {})
    assert manifest.base.files


def test_a_base_of_version_0_1_is_known_by_its_fingerprint(tiny_folder, sentiment, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = {"ranks": [2], "steps": [1]}
    train(make_config(settings(base, sentiment, tmp_path / "run", chain=keys)))
    as_format_1(tmp_path / "run")
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"got fingerprint \w{12} for \w{12}\); restore it"):
        load_run(tmp_path / "run")


def test_an_incomplete_checkpoint_of_version_0_1_is_left_out(rich_config, tmp_path, caplog):
    train(rich_config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(rich_config, 6)
    as_format_1(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "00000006" / "progress.json").unlink()
    train(rich_config, resume=True)
    assert "is incomplete and is left out" in caplog.text
    assert_same_links(tmp_path / "run", tmp_path / "whole")
