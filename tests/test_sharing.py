"""Several processes share one model by FSDP2: the chain of one process, each with rows of the base.

torchrun starts the processes. A start costs seconds, so two launches do the jobs of all tests: two
processes by `train.shard`, four by the variables that `accelerate launch` sets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny_folder
from helpers import settings
from helpers_export import TARGETS, live
from helpers_processes import assert_close_links, launch, outcome

from chainlora import ChainLoRAError, export_merged, make_config, train
from chainlora.runs.directory import RunDirectory
from chainlora.training.sharing import check_shards, wants_shards

SOFT = {"knots": {"every": 2, "share": 0.3}, "hold": "carried", "init": "gradient"}
JOBS: dict[str, dict[str, Any]] = {
    "llama": {"train": {"gradient_checkpointing": True}},
    "opt": {"chain": {"lora_bias": True}},  # its biases are cut as well
    "gpt2": {},  # stores in × out, so that A is cut and not B
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    # 29 rows in micro-batches of 4: one process has no row of the last one
    "uneven": {"train": {"batch_size": 4, "gradient_accumulation": 2}, "data": {"num_train": 29}},
    "soft": {"chain": SOFT, "train": {"keep_best": True}},
    "answers": {"data": {"num_validation": 3}},
}
BY_ACCELERATE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def launched(folders, answers, sentiment, tmp_path_factory) -> Path:
    """Every job in one process and in two; a run of four stopped, and resumed by two and by one."""
    folder = tmp_path_factory.mktemp("sharing")

    def tree_of(name: str, output: Path, **train_keys: Any) -> dict[str, Any]:
        keys = JOBS.get(name, {})
        architecture = name if name in folders else "llama"
        return settings(
            folders[architecture],
            answers if name == "answers" else sentiment,
            output,
            chain={"ranks": [4, 4], "steps": [4, 3], "target_modules": TARGETS[architecture]}
            | keys.get("chain", {}),
            train={"lr": 1e-3, "batch_size": 8, "eval_every": 2, "save_every": 1}
            | keys.get("train", {})
            | train_keys,
            data=keys.get("data", {}),
        )

    def job(name: str, output: str, **keys: Any) -> dict[str, Any]:
        shard = keys.pop("train", {"shard": "fsdp2"})
        path = folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(tree_of(name, folder / output, **shard)))
        return {"config": str(path), "outcome": str(folder / f"{output}.json")} | keys

    for name in JOBS:
        train(make_config(tree_of(name, folder / f"{name}-1")))
    stopped = {"stop": 6, "train": {}}
    four = [job("llama", "llama-4", train={})]
    four += [job("soft", "to-two", **stopped), job("uneven", "to-one", **stopped)]
    done = launch(4, folder, four, **BY_ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    two = [job(name, f"{name}-2") for name in JOBS]
    two += [job("soft", "to-two", resume=True)]
    two += [job("llama", "odd", train={"shard": "fsdp2", "batch_size": 9})]
    base_of = dict(folders)
    base_of["untied"] = make_tiny_folder(folder / "untied", tie_word_embeddings=False)
    for name, base in base_of.items():
        dtype = "bfloat16" if name == "opt" else "float32"
        told = str(folder / f"load-{name}.json")
        two += [{"load": str(base), "dtype": dtype, "outcome": told}]
    two += [job("llama", "killed", kill=[1, 3])]
    done = launch(2, folder, two)
    assert (folder / "killed.json.0").is_file(), done.stderr[-3000:]  # all before it were done
    (folder / "stderr").write_text(done.stderr)
    train(make_config(tree_of("uneven", folder / "to-one")), resume=True)
    return folder


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((f"{name}-1", f"{name}-2") for name in ("llama", "opt", "gpt2", "uneven", "answers")),
        ("llama-1", "llama-4"),
        ("uneven-1", "to-one"),
    ],
)
def test_the_chain_is_that_of_one_process(launched, one, other):
    assert_close_links(launched / one, launched / other)


@pytest.mark.parametrize("name", ["llama", "uneven", "answers"])
def test_losses_and_evaluations_are_those_of_one_process(launched, name):
    one, two = records(launched / f"{name}-1"), records(launched / f"{name}-2")
    assert [r["event"] for r in one] == [r["event"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a.get("tokens") == b.get("tokens")  # what is computed for nothing does not count
        for key in ("loss", "grad_norm", "accuracy", "em"):
            assert a.get(key) == pytest.approx(b.get(key), abs=5e-6)  # float32 sums


@pytest.mark.parametrize("other", ["soft-2", "to-two"])
def test_carried_links_with_soft_knots_are_those_of_one_process(launched, other):
    """Their factors come from a singular value decomposition; their products are compared."""
    links = [RunDirectory(launched / name).load_links(2) for name in ("soft-1", other)]
    for one, two in zip(*links, strict=True):
        for name in one.factors:
            a, b = one.delta_weight(name), two.delta_weight(name)
            assert (a - b).norm() < 2e-3 * a.norm()  # each is stored to 1e-3


def test_in_bfloat16_weights_are_rebuilt_and_rounded_once(launched):
    """A row is computed beside others, so activations round differently; knots do not."""
    one, two = records(launched / "bfloat16-1"), records(launched / "bfloat16-2")
    for a, b in zip(one, two, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=2e-2)  # of 0.7, eight bits each
    changes = [[r["function_change"] for r in run if r["event"] == "knot"] for run in (one, two)]
    assert changes[1] == pytest.approx(changes[0], rel=0.5)
    assert max(changes[1]) < 1e-2  # one cast


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "untied"])
def test_each_process_loads_its_rows_alone(launched, name):
    loaded = [json.loads((launched / f"load-{name}.json.{rank}").read_text()) for rank in range(2)]
    assert sum(each["held"] for each in loaded) == loaded[0]["whole"]
    for each in loaded:
        assert each["same"]
        assert each["same_logits"]
        assert each["freed"]  # after the forward
        # a table of odd length has one row more in the first process; rows are up to 64 wide
        assert abs(each["held"] - each["whole"] / 2) <= 64 * each["tensors"]
    assert "loads all" not in (launched / "stderr").read_text()  # each read its rows alone


def test_a_run_of_shares_is_exported_like_any_other(launched, tmp_path):
    export_merged(launched / "llama-4", tmp_path / "merged")
    merged = live(launched / "llama-4")
    # float32 sums in another order through two layers
    torch.testing.assert_close(merged, live(launched / "llama-1"), atol=1e-4, rtol=0)


def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    error = outcome(launched, "killed")["error"]
    assert error.startswith("TrainingError: the 2 processes of a run must go on together")
    assert RunDirectory(launched / "killed").verify().position.step in (2, 3)


# --- what is asked for ---


def config_of(**sections: Any):
    base = {
        "model": "m",
        "data": {"train": "rows.jsonl"},
        "chain": {"ranks": [4], "steps": [2]},
        "train": {"shard": "fsdp2"},
    }
    for key, value in sections.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return make_config(base)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"chain": {"extra_modules": ["norm"]}}, r"\(got chain.extra_modules, which needs whole"),
        ({"chain": {"dora": True}}, r"\(got chain.dora, which needs whole weights\)"),
        ({"chain": {"init": "pissa"}}, r"\(got chain.init: pissa, which needs whole weights\)"),
        ({"chain": {"tune": "full"}}, r"\(got chain.tune: full, which needs whole weights\)"),
        ({"quantize": "int8", "chain": {"hold": "carried"}}, r"\(got quantize, which needs whole"),
        ({"chain": {"knots": "auto"}}, r"soft knots on a shared model need hold: carried"),
    ],
)
def test_what_a_shared_model_cannot_do_is_refused(sections, message):
    with pytest.raises(ChainLoRAError, match=message):
        check_shards(config_of(**sections))


def test_fsdp1_is_refused_by_the_name_of_fsdp2(monkeypatch):
    assert wants_shards(config_of())
    assert not wants_shards(config_of(train={"shard": None}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ChainLoRAError, match=r"must be FSDP2 .*fsdp_version: 1\); set"):
        wants_shards(config_of(train={"shard": None}))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wants_shards(config_of(train={"shard": None}))


def test_deepspeed_is_refused_by_the_name_of_fsdp2(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ChainLoRAError, match=r"\(got an Accelerate config with DeepSpeed\); launch"
    ):
        wants_shards(config_of())
