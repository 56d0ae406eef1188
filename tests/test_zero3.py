"""Several processes share one model by DeepSpeed's ZeRO-3: the chain of one process, carried.

One launch of two processes does the jobs of all tests. The first import of DeepSpeed on a CPU
compiles an extension, for about a minute.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny_folder
from helpers import settings
from helpers_export import TARGETS
from helpers_processes import assert_close_links, launch, outcome
from safetensors.torch import load_file
from torch import nn

from chainlora import ChainLoRAError, export_adapter, make_config, train
from chainlora.models import zero3
from chainlora.runs.directory import RunDirectory
from chainlora.training.sharing import check_shards, wants_shards

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="ZeRO-3 is DeepSpeed's, which is not installed"
)
SHARED = {"shard": "zero3"}
LOADED = ("llama", "opt", "gpt2", "untied")
JOBS: dict[str, dict[str, Any]] = {
    "llama": {},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "opt": {"chain": {"lora_bias": True}},
    "gpt2": {},  # stores in × out, head and embedding are one weight
    # Adam would divide the rounding of gradients that are all but zero by their size
    "head": {
        "chain": {"target_modules": ["q_proj", "lm_head"]},
        "train": {"optimizer": "sgd", "lr": 0.1},
    },
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    # 29 rows in micro-batches of 4: one process has no row of the last one
    "uneven": {"train": {"batch_size": 4, "gradient_accumulation": 2}, "data": {"num_train": 29}},
    "soft": {"chain": {"knots": {"every": 2, "share": 0.3}, "init": "gradient"}},
    "answers": {"data": {"num_validation": 3}},
}


@pytest.fixture(scope="module")
def bases(folders, tmp_path_factory) -> dict[str, Path]:
    untied = make_tiny_folder(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)
    return folders | {"untied": untied, "head": untied}


@pytest.fixture(scope="module")
def launched(bases, answers, sentiment, tmp_path_factory) -> Path:
    """Every job in one process and in two; runs stopped after the first knot and resumed."""
    folder = tmp_path_factory.mktemp("zero3")

    def tree_of(name: str, output: Path, **train_keys: Any) -> dict[str, Any]:
        keys, base = JOBS[name], name if name in bases else "llama"
        targets = TARGETS.get(base, TARGETS["llama"])
        chain = {"ranks": [4, 4], "steps": [4, 3], "target_modules": targets, "hold": "carried"}
        return settings(
            bases[base],
            answers if name == "answers" else sentiment,
            output,
            chain=chain | keys.get("chain", {}),
            train={"lr": 1e-3, "batch_size": 8, "eval_every": 2, "save_every": 1}
            | keys.get("train", {})
            | train_keys,
            data=keys.get("data", {}),
        )

    def job(name: str, output: str, **keys: Any) -> dict[str, Any]:
        path = folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(tree_of(name, folder / output, **SHARED)))
        return {"config": str(path), "outcome": str(folder / f"{output}.json")} | keys

    for name in JOBS:
        train(make_config(tree_of(name, folder / f"{name}-1")))
    two = [job(name, f"{name}-2") for name in JOBS]
    two += [job(name, f"{name}-stopped", stop=5) for name in ("llama", "soft", "uneven")]
    two += [job(name, f"{name}-stopped", resume=True) for name in ("llama", "soft")]
    for name in LOADED:
        dtype = "bfloat16" if name == "opt" else "float32"
        told = str(folder / f"load-{name}.json")
        two += [{"load": str(bases[name]), "dtype": dtype, "outcome": told} | SHARED]
    two += [job("llama", "killed", kill=[1, 3])]
    done = launch(2, folder, two)
    assert (folder / "killed.json.0").is_file(), done.stderr[-3000:]  # all before it were done
    (folder / "stderr").write_text(done.stderr)
    train(make_config(tree_of("uneven", folder / "uneven-stopped")), resume=True)
    return folder


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_deepspeed
@pytest.mark.parametrize(
    "name", ["llama", "checkpointed", "opt", "gpt2", "head", "uneven", "answers"]
)
def test_the_chain_is_that_of_one_process(launched, name):
    assert_close_links(launched / f"{name}-1", launched / f"{name}-2")


@needs_deepspeed
@pytest.mark.parametrize("name", ["llama", "uneven"])
def test_a_run_that_was_stopped_after_a_knot_is_resumed(launched, name):
    """By two processes again, and by one that holds the whole model."""
    assert_close_links(launched / f"{name}-1", launched / f"{name}-stopped")


@needs_deepspeed
@pytest.mark.parametrize("name", ["llama", "uneven", "answers"])
def test_losses_and_evaluations_are_those_of_one_process(launched, name):
    one, two = records(launched / f"{name}-1"), records(launched / f"{name}-2")
    assert [r["event"] for r in one] == [r["event"] for r in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "em"):
            assert a.get(key) == pytest.approx(b.get(key), abs=5e-6)  # float32 sums


@needs_deepspeed
@pytest.mark.parametrize("other", ["soft-2", "soft-stopped"])
def test_soft_knots_are_those_of_one_process(launched, other):
    """Their factors come from a singular value decomposition; their products are compared."""
    links = [RunDirectory(launched / name).load_links(2) for name in ("soft-1", other)]
    for one, two in zip(*links, strict=True):
        for name in one.factors:
            a, b = one.delta_weight(name), two.delta_weight(name)
            assert (a - b).norm() < 2e-3 * a.norm()  # each is stored to 1e-3


@needs_deepspeed
def test_in_bfloat16_losses_are_those_of_one_process_to_its_rounding(launched):
    one, two = records(launched / "bfloat16-1"), records(launched / "bfloat16-2")
    for a, b in zip(one, two, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=2e-2)  # of 0.7, eight bits each


@needs_deepspeed
@pytest.mark.parametrize("name", LOADED)
def test_each_process_holds_its_ranges_alone(launched, name):
    loaded = [json.loads((launched / f"load-{name}.json.{rank}").read_text()) for rank in range(2)]
    for each in loaded:
        assert each["same"]
        assert each["same_logits"]
        assert each["freed"]  # after the forward
        assert 0 <= each["held"] - each["whole"] / 2 <= each["tensors"]  # odd sizes are padded
    assert "loads all" not in (launched / "stderr").read_text()


@needs_deepspeed
def test_its_adapter_is_exported_like_any_other(launched, tmp_path):
    adapters = []
    for name in ("llama-1", "llama-2"):
        export_adapter(launched / name, tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    one, two = adapters
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=5e-5, rtol=0)


@needs_deepspeed
def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    error = outcome(launched, "killed")["error"]
    assert error.startswith("TrainingError: the 2 processes of a run must go on together")
    assert RunDirectory(launched / "killed").verify().position.step in (2, 3)


# --- what needs no DeepSpeed ---


def config_of(**chain: Any):
    return make_config(
        {
            "model": "m",
            "data": {"train": "rows.jsonl"},
            "chain": {"ranks": [4], "steps": [2], "hold": "carried"} | chain,
            "train": SHARED,
        }
    )


def test_a_link_that_would_be_tied_is_refused():
    with pytest.raises(ChainLoRAError, match=r"zero3` cuts flattened weights.*hold: tied.*carried"):
        check_shards(config_of(hold="tied"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ChainLoRAError, match=r"needs the package deepspeed .*chainlora\[deepspeed"):
        check_shards(config_of())


def test_two_ways_to_share_a_model_are_refused(monkeypatch):
    assert wants_shards(config_of()) == "zero3"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ChainLoRAError, match=r"in one way \(got train.shard: zero3 and"):
        wants_shards(config_of())


def test_experts_in_a_list_are_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(ChainLoRAError, match=r"call the same modules \(got experts, a list"):
        zero3.share(model, None, torch.float32, torch.device("cpu"))
