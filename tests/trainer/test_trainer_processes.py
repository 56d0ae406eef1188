"""A chain in trainers of several processes: the links of one, by DDP.

torchrun starts them. A start costs seconds, so one launch does the jobs of all tests.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many_trainers
import pytest
import torch
from accelerate import Accelerator
from helpers_integrations import assert_adapter_is_the_model, logits, plain_model
from helpers_processes import launch

from chainlora import load_chain
from chainlora.errors import ConfigError
from chainlora_trainer.lengths import find_trainer_processes

pytestmark = pytest.mark.slow  # processes that torchrun starts
CHAIN = {"ranks": [4, 4, 4], "steps": [4, 4, 3]}
SAVED = {"save_strategy": "steps", "save_steps": 2}
SCORED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"arguments": SAVED},
    "soft": {"chain": {"knots": {"every": 3, "share": 0.5}}},
    "best": {"arguments": SAVED | SCORED | {"greater_is_better": True}},
    "accumulated": {"arguments": {"gradient_accumulation_steps": 2, "max_steps": 5}}
    | {"chain": {"epochs": 0.5, "restart_schedule": True}},
}
if find_spec("trl"):
    JOBS |= {"sft": {"kind": "SFTTrainer"}, "dpo": {"kind": "DPOTrainer"}}
REFUSED: dict[str, dict[str, Any]] = {
    "unequal": {"chain": {"ranks": [4, 2]}},
    "late": {"late": True},
    "sharded": {"arguments": {"fsdp": True}},
}


def job(name: str, folder: Path, model: Path, processes: int, **keys: Any) -> dict[str, Any]:
    """A job whose batch is 4 rows, however many processes share it."""
    told = {"chain": CHAIN} | JOBS.get(name, {}) | REFUSED.get(name, {})
    arguments = told.get("arguments", {}) | {"per_device_train_batch_size": 4 // processes}
    where = {"model": str(model), "output": str(folder / f"{name}-{processes}")}
    return told | where | {"arguments": arguments} | keys


@pytest.fixture(scope="module")
def launched(tiny_folder, tmp_path_factory) -> Path:
    """Every job in one process and in two."""
    folder = tmp_path_factory.mktemp("trainers")
    for name in JOBS:
        found = many_trainers.run(job(name, folder, tiny_folder, 1))
        (folder / f"{name}-1.json.0").write_text(json.dumps(found))
    jobs = [job(name, folder, tiny_folder, 2) for name in [*JOBS, *REFUSED]]
    killed = job("plain", folder, tiny_folder, 2, stop=5) | {"output": str(folder / "killed-2")}
    done = launch(2, folder, [*jobs, killed], script="many_trainers.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def outcome(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json.{rank}").read_text())


def chain_in(launched: Path, name: str, model: Path) -> Any:
    return load_chain(launched / name / "final-0", plain_model(model))


@pytest.mark.parametrize("name", [name for name in JOBS if name != "soft"])
def test_the_links_are_those_of_one_process(launched, tiny_folder, name):
    one, two = (chain_in(launched, f"{name}-{count}", tiny_folder) for count in (1, 2))
    assert len(one) == len(two)
    for chain in (one, two):
        chain.tie()
    for mine, theirs in zip(one.links, two.links, strict=True):
        assert mine.num_steps == theirs.num_steps
        for module, factors in mine.factors.items():
            # The same sums in another order: Adam divides by the gradient's size, so rounding in a
            # tiny gradient moves a weight by a small share of the rate, 1e-2.
            other = theirs.factors[module]
            torch.testing.assert_close(factors.a, other.a, atol=5e-4, rtol=0)
            torch.testing.assert_close(factors.b, other.b, atol=5e-4, rtol=0)
            assert (factors.b - other.b).abs().median() < 1e-6


def test_soft_knots_give_the_function_of_one_process(launched, tiny_folder):
    """A compressed link has no factors of its own to compare."""
    one, two = (chain_in(launched, f"soft-{count}", tiny_folder).model for count in (1, 2))
    torch.testing.assert_close(logits(one), logits(two), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", JOBS)
def test_every_process_tells_the_same_and_the_first_one_writes(launched, name):
    first, second = (outcome(launched, f"{name}-2", rank) for rank in (0, 1))
    assert first["score"] == second["score"]
    assert [r.get("knot") for r in first["history"]] == [r.get("knot") for r in second["history"]]
    assert not (launched / f"{name}-2/final-1").exists()
    assert first["score"] == pytest.approx(outcome(launched, f"{name}-1")["score"], abs=1e-3)


def test_a_killed_run_resumes_across_a_knot(launched, tiny_folder):
    """To the same bits: processes sum in one order."""
    whole, resumed = (chain_in(launched, f"{name}-2", tiny_folder) for name in ("plain", "killed"))
    assert outcome(launched, "killed-2")["step"] == 11
    assert torch.equal(logits(whole.model), logits(resumed.model))


def test_the_adapter_loads_in_peft(launched, tiny_folder):
    """One layer's W x + s·B A x is summed in another order than (W + s·B A) x."""
    for name in ("plain-2/final-0", "plain-2/checkpoint-6", "best-2/final-0"):
        chain = load_chain(launched / name, plain_model(tiny_folder))
        assert_adapter_is_the_model(tiny_folder, launched / name, chain.model, 2e-5)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("unequal", "in several processes all ranks must be equal (got [4, 2])"),
        ("late", "in several processes, a trainer needs ChainCallback when it is made"),
        ("sharded", "each process needs the whole model (got fsdp)"),
    ],
)
def test_what_ddp_cannot_do_is_refused_before_the_first_step(launched, name, rule):
    for rank in (0, 1):
        assert rule in outcome(launched, f"{name}-2", rank)["error"]


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({"deepspeed": "zero3.json"}, "each process needs the whole model (got deepspeed)"),
        ({"n_gpu": 2}, "each process uses one GPU (got 2)"),
    ],
    ids=["DeepSpeed", "two GPUs"],
)
def test_what_no_machine_here_could_launch_is_refused_too(told, rule):
    Accelerator(cpu=True)  # as a trainer has made it
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "n_gpu": 1} | told)
    with pytest.raises(ConfigError, match=re.escape(rule)):
        find_trainer_processes(args, torch.nn.Linear(2, 2))
