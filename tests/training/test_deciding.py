"""What a config leaves open is decided at the start, recorded, shown, and kept by a resume."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_same_links, entry_of, history_of, records_of, stage_dir, stop_after
from helpers_integrations import StopAt, arguments, collator, make_trainer, peft_model, token_rows
from helpers_tasks import write_rows, write_task
from transformers import Trainer, TrainingArguments

from chainlora import ChainCallback, inspect_run, train
from chainlora.errors import ConfigError, RunError
from chainlora.knots import numbers
from chainlora.training import deciding
from chainlora.training.batches import make_batches


def numbers_of(run: Path) -> dict:
    return entry_of(run)["training"]["numbers"]


OPEN = {
    "chain": {"ranks": [4, 4], "steps": None, "epochs": [2, 1.5], "knots": {"every": 1}},
    "train": {"save_every": 1, "restart_schedule": True, "warmup_steps": 2, "keep_best": True},
}


@pytest.fixture
def later_version(monkeypatch):
    """Call it to decide as some later version might."""

    def change() -> None:
        monkeypatch.setattr(numbers, "_TIME_CONSTANT", 50.0)
        monkeypatch.setattr(numbers, "_KNOTS_PER_TIME_CONSTANT", 3)
        monkeypatch.setattr(deciding, "restart_warmup", lambda train: 0)
        monkeypatch.setattr("chainlora.training.setup.make_batches", _other_lengths)

    return change


def _other_lengths(*arguments):
    plan = make_batches(*arguments)
    return replace(plan, lengths=tuple(length + 1 for length in plan.lengths))


def test_a_resume_takes_what_was_decided_at_the_start(configure, tmp_path, later_version):
    killed = configure("killed", **OPEN)
    train(configure("whole", **OPEN))
    stop_after(killed, 2)
    later_version()
    train(killed, resume=True)
    assert_same_links(tmp_path / "whole", tmp_path / "killed")
    decided = [numbers_of(tmp_path / name) for name in ("whole", "killed")]
    assert decided[0] == decided[1]
    assert inspect_run(tmp_path / "killed")["numbers"] == {"main": decided[0]}
    assert len(decided[0]["lengths"]) == len(decided[0]["knots"]) == 2
    assert None not in decided[0].values()


@pytest.mark.parametrize("kind", ["pair", "candidates"])
def test_soft_knots_are_paced_by_learned_tokens_a_parameter_and_short_runs_are_warned(
    kind, tiny_folder, tmp_path, caplog
):
    """Twelve knots in τ = 1.4·n/√N, with N learned tokens a parameter; below 11 a run is warned.

    What is learned is the right answer alone: a wrong one counts neither here nor in the result.
    """
    make = {
        "pair": lambda i: {"prompt": "a", "chosen": " cat" * (1 + i % 3), "rejected": " sat" * 5},
        "candidates": lambda i: {"text": "a", "label": i % 2},
    }[kind]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", [make(i) for i in range(42)]))}
    if kind == "candidates":
        data["task"] = str(write_task(tmp_path, labels=[" cat", " sat on"]))
    loss = {"loss": "dpo"} if kind == "pair" else {}
    a_row = 1.5 if kind == "candidates" else 2 + 1  # the end of a completion too
    for rank, steps, is_warned in ((1, 96, False), (3, 48, True)):
        chain = {"ranks": [rank], "steps": [steps], "target_modules": ".*0.*q_proj"}
        keys = {"chain": chain | {"knots": "auto"}, "train": {"batch_size": 8} | loss}
        run = tmp_path / str(rank)
        caplog.clear()
        result = train({"model": str(tiny_folder), "data": data, "output": str(run)} | keys)
        assert result["scored_tokens"] == steps * 7 * a_row  # 5 · 8 + 2 rows in six steps
        learned = result["scored_tokens"] / result["trainable_parameters"]
        assert (learned < 11) == is_warned
        assert ("so `knots: auto` turns them off; leave soft knots out" in caplog.text) == is_warned
        tau = 1.4 * steps / math.sqrt(learned)
        every = max(1, round(tau / 12))
        soft = None if is_warned else [every, pytest.approx(1 - math.exp(-every / tau))]
        assert numbers_of(run)["knots"] == [soft]
        assert ("soft_knot" in {each["event"] for each in records_of(run)}) == (not is_warned)


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"warmup_steps": 4}, "the chain never reaches `train.lr`: its warm-up takes 4 of 4 steps"),
        ({"warmup_steps": 1, "restart_schedule": True}, "link 1 .* 1 of 1 steps; lower train.warm"),
        (
            {"restart_warmup_steps": 2, "restart_schedule": True},
            "link 1 .* 2 of 1 steps; lower train.restart_warmup_steps",
        ),
        ({"warmup_steps": 3}, None),
        ({}, None),
    ],
)
def test_a_link_that_ends_before_its_warm_up_is_named(tiny_folder, tmp_path, caplog, keys, warning):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat sat"}] * 4)
    chain = {"ranks": [1, 1], "steps": [3, 1], "target_modules": ".*0.*q_proj"}
    chain |= {} if keys else {"ranks": [], "steps": []}  # a run without steps
    train({"model": str(tiny_folder), "data": {"train": str(rows)}, "chain": chain, "train": keys})
    found = [each for each in caplog.messages if "never reaches" in each]
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0])


def test_keys_that_have_no_effect_are_named(tiny_folder, tmp_path, caplog):
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"text": "the cat sat"}] * 4))

    def told(chain=(), train_keys=(), **data) -> str:
        caplog.clear()
        tree = {"model": str(tiny_folder), "data": {"train": rows} | data}
        tree |= {"chain": {"ranks": [1], "steps": [3]} | dict(chain)}
        train(tree | {"train": dict(train_keys)})
        return caplog.text

    keys = {"eval_every": 2, "select_metric": "loss"}
    text = told({"knots": {"every": 3, "share": 0.1}}, keys)
    assert "main: train.eval_every has no effect without validation rows" in text
    assert "main: train.select_metric has no effect" in text
    assert "no soft knot comes: they are 3 steps apart, and the longest link has 3" in text
    keys = {"keep_best": True, "optimizer": "sgd", "betas": (0.9, 0.9), "lr": 1e-4}
    text = told((), keys, validation=rows)
    for key in ("train.keep_best", "train.betas"):
        assert f"main: {key} has no effect" in text
    assert "train.eps" not in text
    used = {"keep_best": True, "eval_every": 1}
    assert "has no effect" not in told((), used, validation=rows)


def test_a_trainer_paces_them_by_its_collator_s_labels(tiny_folder, tokenizer, tmp_path, caplog):
    callback = ChainCallback(knots={"moments": "new"})  # no `auto`, which would tie none
    keys = {"gradient_accumulation_steps": 5, "max_steps": 3, "save_strategy": "no"}
    trainer = make_trainer(peft_model(tiny_folder), tokenizer, tmp_path, callback, **keys)
    trainer.train()
    rows = [trainer.train_dataset[i]["input_ids"] for i in range(len(trainer.train_dataset))]
    a_row = sum(map(len, rows)) / len(rows)
    steps = math.ceil(len(trainer.get_train_dataloader()) / 5)  # of an epoch, the last one short
    learned = len(rows) / steps * a_row / trainer.model.num_parameters(True)
    ((every, share),) = callback._wrapped.numbers.knots
    tau = 1.4 * math.sqrt(3 / learned)
    assert every == max(1, round(tau / 12))
    assert share == pytest.approx(1 - math.exp(-every / tau))
    assert "soft knots break even with plain LoRA near 11 learned tokens" in caplog.text


def test_rows_without_places_ask_for_a_time_constant(tiny_folder, tokenizer, tmp_path):
    from datasets import Dataset

    def trainer(**knots) -> Trainer:
        keys = arguments(tmp_path, max_steps=3)
        return Trainer(
            model=peft_model(tiny_folder),
            args=TrainingArguments(**keys),
            train_dataset=Dataset.from_list(token_rows()).to_iterable_dataset(),
            data_collator=collator(tokenizer),
            callbacks=[ChainCallback(knots=knots or "auto")],
        )

    with pytest.raises(ConfigError, match=r"must have a length .*; give `knots` a time_constant"):
        trainer().train()
    assert trainer(time_constant=20).train().global_step == 3


def test_a_trainer_too(tiny_folder, tokenizer, tmp_path, later_version):
    keys = {"save_strategy": "steps", "save_steps": 5}

    def trainer(name: str):
        callback = ChainCallback(knots={"every": 2})
        return make_trainer(peft_model(tiny_folder), tokenizer, tmp_path / name, callback, **keys)

    whole = trainer("whole")
    whole.train()
    killed = trainer("killed")
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    later_version()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)
    one, two = (tmp_path / name / "checkpoint-11/chain" for name in ("whole", "killed"))
    decided = [json.loads((stage_dir(each) / "chain.json").read_text()) for each in (one, two)]
    assert decided[0]["numbers"] == decided[1]["numbers"] is not None
    assert history_of(one)["links"] == history_of(two)["links"]  # the same bits
    assert entry_of(one)["files"] == entry_of(two)["files"]


def test_a_finished_run_is_answered_at_once(configure, tmp_path, monkeypatch):
    config = configure()
    first = train(config)
    monkeypatch.setattr("chainlora.training.loop.prepare", None)  # nothing is loaded
    events = []
    again = train(config, resume=True, listener=events.append)
    assert again == json.loads(json.dumps(first))
    assert [event.name for event in events] == ["finished"]
    result = stage_dir(tmp_path / "run") / "result.json"
    result.write_text(result.read_text().replace('"loss": 1', '"loss": 0', 1) + " ")
    with pytest.raises(RunError, match=r"result.json must be as the run wrote it"):
        train(config, resume=True)
