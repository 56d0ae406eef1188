"""Several processes share one model by FSDP2: the chain of one process.

torchrun starts the processes. A start costs seconds, so two launches do the jobs of all tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_folder
from helpers import records_of
from helpers_export import TARGETS
from helpers_processes import (
    assert_close_links,
    assert_close_records,
    assert_close_updates,
    assert_ended_by_one_sentence,
    job,
    launch,
    tree_of,
)

from chainlora import stage_matrix, train
from chainlora.config.staging import make_stages
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

    def tree(name: str, output: str, **train_keys: Any) -> dict[str, Any]:
        architecture = name if name in folders else "llama"
        rows = answers if name == "answers" else sentiment
        keys = JOBS[name] | {"train": JOBS[name].get("train", {}) | train_keys}
        targets = {"target_modules": TARGETS[architecture]}
        return tree_of(keys, folders[architecture], rows, folder / output, **targets)

    def stages(output: str, **train_keys: Any) -> dict[str, Any]:
        config = tree("llama", output, **train_keys)
        chain, data = config["chain"] | {"ranks": [4], "steps": [3]}, config.pop("data")
        later = {"data": data | {"replay": 0.25}, "train": {"lr": 2e-3}}
        both = [{"name": "facts", "data": data}, {"name": "style", "beside": False} | later]
        return config | {"chain": chain, "stages": both}

    for name in JOBS:
        train(tree(name, f"{name}-1"))
    train_stages(make_stages(stages("stages-1")))
    stopped = {name: f"{name}-stopped" for name in ("soft", "uneven")}
    two = [job(tree(name, f"{name}-2", **SHARED)) for name in JOBS]
    four = [job(tree("llama", "llama-4"))]
    four += [job(tree(name, there), stop=6) for name, there in stopped.items()]
    done = launch(4, folder, four, **BY_ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    two += [job(tree("soft", stopped["soft"], **SHARED), resume=True)]
    two += [{"command": ["train", job(stages("stages-2", **SHARED))["config"]]}]
    bases = folders | {"untied": make_tiny_folder(folder / "untied", tie_word_embeddings=False)}
    for name in LOADED:
        dtype = "bfloat16" if name == "opt" else "float32"
        told = str(folder / f"load-{name}.json")
        two += [{"load": str(bases[name]), "dtype": dtype, "outcome": told}]
    two += [job(tree("llama", "killed", **SHARED), kill=[1, 3])]
    done = launch(2, folder, two)
    assert (folder / "killed.json.0").is_file(), done.stderr[-3000:]  # all before it were done
    (folder / "stderr").write_text(done.stderr)
    train(tree("uneven", stopped["uneven"]), resume=True)
    return folder


@pytest.mark.parametrize(
    "other",
    # in two processes; in four that accelerate started; stopped there, and resumed by one
    [*(f"{name}-2" for name in EXACT), "llama-4", "uneven-stopped"],
)
def test_the_chain_is_that_of_one_process(launched, other):
    assert_close_links(launched / f"{other.partition('-')[0]}-1", launched / other)


def test_stages_are_those_of_one_process(launched):
    """Two of them, the second with rows of the first."""
    one, two = launched / "stages-1", launched / "stages-2"
    assert_close_links(one, two)
    found, known = stage_matrix(two, compute=False), stage_matrix(one, compute=False)
    for row, other in zip(found.grid, known.grid, strict=True):
        assert [cell.value for cell in row] == pytest.approx([cell.value for cell in other])


@pytest.mark.parametrize("name", ["llama", "uneven", "answers"])
def test_losses_and_evaluations_are_those_of_one_process(launched, name):
    assert_close_records(launched / f"{name}-1", launched / f"{name}-2")


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


def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    assert_ended_by_one_sentence(launched)
