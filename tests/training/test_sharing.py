"""Several processes share one model by FSDP2: the chain of one process.

torchrun starts the processes. A start costs seconds, so two launches do the jobs of all tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny_folder
from helpers import records_of, settings
from helpers_data import pair_files
from helpers_export import TARGETS
from helpers_processes import assert_close_links, assert_close_updates, launch, outcome
from safetensors.torch import load_file

from chainlora import export_adapter, stage_matrix, train
from chainlora.config.staging import make_stages
from chainlora.runs.addresses import open_run
from chainlora.training.stages import train_stages

pytestmark = pytest.mark.slow  # processes that torchrun starts
SHARED = {"shard": "fsdp2"}
LOADED = ("llama", "opt", "gpt2", "untied")
JOBS: dict[str, dict[str, Any]] = {
    "llama": {"train": {"gradient_checkpointing": True}},
    "opt": {"chain": {"lora_bias": True}},  # its biases are cut as well
    "gpt2": {},  # stores in × out, so that A is cut and not B
    # 29 rows in micro-batches of 4: one process has no row of the last one
    "uneven": {"train": {"batch_size": 4, "gradient_accumulation": 2}, "data": {"num_train": 29}},
    "answers": {"data": {"num_validation": 3}},
    "pairs": {"train": {"loss": "dpo"}, "data": {"task": None}},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "soft": {
        "chain": {"knots": {"every": 2, "share": 0.3}, "hold": "carried", "init": "gradient"},
        "train": {"keep_best": True},
    },
}
EXACT = ("llama", "opt", "gpt2", "uneven", "answers", "pairs")
BY_ACCELERATE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def launched(folders, answers, sentiment, tmp_path_factory) -> Path:
    """Every job in one process and in two; runs that were stopped, resumed by two and by one.

    They were stopped in four, which the variables of `accelerate launch` start.
    """
    folder = tmp_path_factory.mktemp("fsdp2")

    def tree_of(name: str, output: Path, **train_keys: Any) -> dict[str, Any]:
        keys = JOBS[name]
        architecture = name if name in folders else "llama"
        targets = {"target_modules": TARGETS[architecture]}
        return settings(
            folders[architecture],
            answers if name == "answers" else sentiment,
            output,
            chain={"ranks": [4, 4], "steps": [4, 3]} | targets | keys.get("chain", {}),
            train={"lr": 1e-3, "batch_size": 8, "eval_every": 2, "save_every": 1}
            | keys.get("train", {})
            | train_keys,
            data=keys.get("data", {}) | (pair_files(sentiment) if name == "pairs" else {}),
        )

    def job(name: str, output: str, train: dict[str, Any], **keys: Any) -> dict[str, Any]:
        path = folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(tree_of(name, folder / output, **train)))
        return {"config": str(path), "outcome": str(folder / f"{output}.json")} | keys

    def stages(output: str, **train_keys: Any) -> dict[str, Any]:
        tree = tree_of("llama", folder / output, **train_keys)
        chain, data = tree["chain"] | {"ranks": [4], "steps": [3]}, tree.pop("data")
        later = {"data": data | {"replay": 0.25}, "train": {"lr": 2e-3}}
        both = [{"name": "facts", "data": data}, {"name": "style"} | later]
        return tree | {"chain": chain, "stages": both}

    for name in JOBS:
        train(tree_of(name, folder / f"{name}-1"))
    train_stages(make_stages(stages("stages-1")))
    stopped = {name: f"{name}-stopped" for name in ("soft", "uneven")}
    two = [job(name, f"{name}-2", SHARED) for name in JOBS]
    four = [job("llama", "llama-4", {})]
    four += [job(name, there, {}, stop=6) for name, there in stopped.items()]
    done = launch(4, folder, four, **BY_ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    two += [job("soft", stopped["soft"], SHARED, resume=True)]
    (folder / "stages.yaml").write_text(yaml.safe_dump(stages("stages-2", **SHARED)))
    two += [{"command": ["train", str(folder / "stages.yaml")]}]
    bases = folders | {"untied": make_tiny_folder(folder / "untied", tie_word_embeddings=False)}
    for name in LOADED:
        dtype = "bfloat16" if name == "opt" else "float32"
        told = str(folder / f"load-{name}.json")
        two += [{"load": str(bases[name]), "dtype": dtype, "outcome": told}]
    two += [job("llama", "killed", SHARED, kill=[1, 3])]
    done = launch(2, folder, two)
    assert (folder / "killed.json.0").is_file(), done.stderr[-3000:]  # all before it were done
    (folder / "stderr").write_text(done.stderr)
    train(tree_of("uneven", folder / stopped["uneven"]), resume=True)
    return folder


@pytest.mark.parametrize("name", EXACT)
def test_the_chain_is_that_of_one_process(launched, name):
    assert_close_links(launched / f"{name}-1", launched / f"{name}-2")


def test_stages_are_those_of_one_process(launched):
    """Two of them, the second with rows of the first."""
    one, two = launched / "stages-1", launched / "stages-2"
    assert_close_links(one, two)
    found, known = stage_matrix(two, compute=False), stage_matrix(one, compute=False)
    for row, other in zip(found.grid, known.grid, strict=True):
        assert [cell.value for cell in row] == pytest.approx([cell.value for cell in other])


def test_a_stopped_run_is_resumed_by_one_process(launched):
    assert_close_links(launched / "uneven-1", launched / "uneven-stopped")


def test_four_processes_that_accelerate_started_train_the_same_chain(launched):
    assert_close_links(launched / "llama-1", launched / "llama-4")


@pytest.mark.parametrize("name", ["llama", "uneven", "answers"])
def test_losses_and_evaluations_are_those_of_one_process(launched, name):
    one, two = records_of(launched / f"{name}-1"), records_of(launched / f"{name}-2")
    assert [r["event"] for r in one] == [r["event"] for r in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "em"):
            assert a.get(key) == pytest.approx(b.get(key), abs=5e-6)  # float32 sums


@pytest.mark.parametrize("other", ["soft-2", "soft-stopped"])
def test_carried_links_with_soft_knots_are_those_of_one_process(launched, other):
    assert_close_updates(launched / "soft-1", launched / other)


def test_in_bfloat16_weights_are_rebuilt_and_rounded_once(launched):
    """A row is computed beside others, so activations round differently; knots do not."""
    one, two = records_of(launched / "bfloat16-1"), records_of(launched / "bfloat16-2")
    for a, b in zip(one, two, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=2e-2)  # of 0.7, eight bits each
    changes = [r["function_change"] for r in one + two if r["event"] == "knot"]
    assert max(changes) < 1e-2  # one cast


@pytest.mark.parametrize("name", LOADED)
def test_each_process_holds_its_part_alone(launched, name):
    loaded = [json.loads((launched / f"load-{name}.json.{rank}").read_text()) for rank in range(2)]
    for each in loaded:
        assert each["same"]
        assert each["same_logits"]
        assert each["freed"]  # after the forward
        # a table of odd length has one row more in the first process; rows are up to 64 wide
        assert abs(each["held"] - each["whole"] / 2) <= 64 * each["tensors"]
    assert "loads all" not in (launched / "stderr").read_text()  # each read its part alone


def test_its_adapter_is_exported_like_any_other(launched, tmp_path):
    adapters = []
    for name in ("llama-1", "llama-2"):
        export_adapter(launched / name, tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    one, two = adapters
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=5e-5, rtol=0)


def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    error = outcome(launched, "killed")["error"]
    assert error.startswith("TrainingError: the 2 processes of a run must go on together")
    assert open_run(launched / "killed").verify().draft.position.step in (2, 3)
