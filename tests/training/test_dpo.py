"""Pairs of preferences: how rows are read, the losses of DPO and ORPO, and TRL's."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import write_rows
from helpers import (
    Stop,
    links_of,
    stage_dir,
    start_as_ours,
    stop_after,
    train_on,
    training_examples,
)
from helpers_data import CHAT, MARKED, encode_examples, make_tokenizer, pair_files, pairs, scored
from helpers_integrations import arguments, peft_model
from reference_scorer import reference_scores
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from chainlora import extend, train
from chainlora.config.reading import make_config
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.evaluation.pair_scores import orpo_losses
from chainlora.evaluation.scoring import evaluate_task
from chainlora.evaluation.stage_scores import Scorer, stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.opening import load_run
from chainlora.training import objectives
from chainlora.training.batches import make_batches
from chainlora.training.objectives import DPO


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


@pytest.fixture
def settings(tiny_folder, tmp_path):
    def make(output=None, train=(), **chain) -> dict:
        return {
            "model": str(tiny_folder),
            "data": pair_files(tmp_path),
            "chain": {"ranks": [4, 2], "steps": [4, 3], "target_modules": ["q_proj", "v_proj"]}
            | chain,
            "train": {"loss": "dpo", "lr": 1e-2, "batch_size": 4} | dict(train),
            "output": output and str(tmp_path / output),
            "start_data": "none",
        }

    return make


# --- rows ---

TALK = [user("one"), says("two"), user("three")]
SHARE = [{"from": "human", "value": "three"}]
TWO = {"chosen": [says("four")], "rejected": [says("five")]}
WHOLE = {side: [*TALK, *answer] for side, answer in TWO.items()}
FORMS = {
    "texts": {"prompt": "a cat", "chosen": " four", "rejected": " five"},
    "texts that share a prompt": {"chosen": "a cat four", "rejected": "a cat five"},
    "chats": {"prompt": TALK} | TWO,
    "chats that share a prompt": WHOLE,
    "chats beside the prompt as a text": {"prompt": "three"} | WHOLE,
    "ShareGPT": {"conversations": SHARE, "chosen": gpt("four"), "rejected": gpt("five")}
    | {"system": "hush"},
    "Alpaca": {"instruction": "add", "input": "1", "chosen": "four", "rejected": "five"}
    | {"system": "hush"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_two_answers_to_one_prompt(form):
    row, blank = FORMS[form], " " * form.startswith("texts")
    tokenizer = make_tokenizer("bos", CHAT)
    (found,) = encode_examples([row], tokenizer, "auto", objective="dpo")
    assert scored(found, tokenizer) == [[f"{blank}four</s>"], [f"{blank}five</s>"]]
    prompts = {
        tokenizer.decode(ids[: spans[0][0]])
        for ids, spans in zip(found.sequences, found.scored, strict=True)
    }
    assert len(prompts) == 1
    assert ("hush" in prompts.pop()) == ("system" in row)


PLAIN = {"prompt": "a", "completion": "b"}
UNLIKE = r"must both be (texts|lists of messages).*at row "
REFUSED = {
    "no pair": (PLAIN, r"and a `rejected` answer \(got prompt, completion at"),
    "KTO": (PLAIN | {"label": True}, "label: True .* TRL's KTOTrainer"),
    "half a pair": ({"prompt": "a", "chosen": "b"}, "a `rejected` answer"),
    "ms-swift": ({"messages": TALK, "rejected_response": "c"}, "a `rejected` answer"),
    "nothing": ({"prompt": "a cat", "chosen": "a", "rejected": None}, UNLIKE),
    "a chat and a text": ({"prompt": "a cat", "chosen": [says("a")], "rejected": "b"}, UNLIKE),
    "a text and a chat": ({"prompt": "a cat", "chosen": "a", "rejected": [says("b")]}, UNLIKE),
    "a prompt of another kind": (
        {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
        r"have the type of the answers, which are texts .*at row ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused_as_any_row(name):
    row, said = REFUSED[name]
    for rows in ([row], [*pairs(1), row]):
        with pytest.raises(DataError, match=said) as caught:
            encode_examples(rows, make_tokenizer("bos", CHAT), "auto", objective="dpo")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"prompt": "a"} | TWO, "neither"),
        ({side: [user(side), *answer] for side, answer in TWO.items()}, "neither"),
        ({"prompt": TALK} | TWO | {"chosen": []}, "an empty answer"),
    ],
)
def test_a_pair_of_chats_without_a_prompt_is_refused_in_its_own_words(row, got):
    rule = rf"a pair of chats must have messages as `prompt`, or begin with .*\(got {got} at row 0"
    with pytest.raises(DataError, match=rule):
        encode_examples([row], make_tokenizer("bos", CHAT), "auto", objective="dpo")


@pytest.mark.parametrize("template", [CHAT, MARKED])
@pytest.mark.parametrize("beside", [{}, {"prompt": [user("a")]}])
@pytest.mark.parametrize("other", [[user("quite another")], []])
def test_answers_to_different_turns_are_refused(template, beside, other):
    row = {"chosen": [user("b"), says("c")], "rejected": [*other, says("d")]} | beside
    if not beside:
        row = {side: [user("a"), *turns] for side, turns in row.items()}
    with pytest.raises(DataError, match=r"must follow the same turns .*at row 0\); begin"):
        encode_examples([row], make_tokenizer("", template), "auto", objective="dpo")


def test_pairs_of_equal_answers_are_counted_and_refused_where_all_are(settings, tmp_path, caplog):
    tree, path = settings(steps=[1, 1]), tmp_path / "equal.jsonl"
    tree["data"]["train"] = str(path)
    equal = [row | {"rejected": row["chosen"]} for row in pairs(6)]
    write_rows(path, equal)
    rule = r"must differ \(got the same in all 6 pairs of .*equal.jsonl"
    with pytest.raises(DataError, match=rule):
        train(tree)
    write_rows(path, [*equal[:2], *pairs(6)])
    result = train(tree)
    assert "train: the chosen and the rejected answer are the same in 2 of 8 " in caplog.text
    assert result["data"]["train"]["pairs_equal"] == 2


@pytest.mark.parametrize("data", [{"task": "sst2"}, {"format": "chat"}, {"format": "text"}])
def test_a_task_or_a_format_without_pairs_is_refused(data, settings):
    tree = settings()
    tree["data"] = {"train": tree["data"]["train"]} | data
    with pytest.raises(ConfigError, match="needs pairs of answers"):
        make_config(tree)


def test_a_cut_takes_as_much_of_both_prompts_and_nothing_of_the_answers():
    tokenizer = make_tokenizer("bos")
    row = {"prompt": "one two three four five", "chosen": " a cat sat", "rejected": " no"}
    (whole,) = encode_examples([row], tokenizer, "auto", objective="dpo")
    limit = len(whole.sequences[0]) - 3
    keys = {"objective": "dpo", "max_length": limit, "truncation": "cut"}
    (cut,) = encode_examples([row], tokenizer, "auto", **keys)
    assert scored(cut, tokenizer) == scored(whole, tokenizer)
    assert [len(a) - len(b) for a, b in zip(whole.sequences, cut.sequences, strict=True)] == [3, 3]


def test_columns_of_other_names_are_the_same_pairs(settings, tmp_path):
    expected, theirs = train(settings("ours"))["metrics"], settings("theirs")
    fields = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    for split, path in theirs["data"].items():
        rows = map(json.loads, Path(path).read_text().splitlines())
        named = [{fields[k]: v for k, v in row.items()} for row in rows]
        theirs["data"][split] = str(write_rows(tmp_path / f"{split} named.jsonl", named))
    theirs["data"]["fields"] = fields
    assert train(theirs)["metrics"] == expected


# --- the loss, its reference, and what a run reports ---


def means(model, examples) -> torch.Tensor:
    """The mean log-probability of an answer's tokens [E, 2], by plain transformers."""
    return torch.tensor(reference_scores(model, examples), dtype=torch.float64)


def lengths(examples) -> torch.Tensor:
    return torch.tensor([[end - start for ((start, end),) in each.scored] for each in examples])


def validation(tree) -> list:
    tokenizer = AutoTokenizer.from_pretrained(tree["model"])
    rows = [json.loads(line) for line in Path(tree["data"]["validation"]).read_text().splitlines()]
    return encode_examples(rows, tokenizer, "auto", objective="dpo")


@pytest.mark.parametrize(
    "chain",
    [{}, {"hold": "carried"}, {"knots": {"every": 2, "share": 0.5}}],
    ids=str,
)
def test_the_reference_is_the_model_at_the_start_through_links_and_knots(settings, chain):
    """Metrics of the run are those of its final weights against the base by plain transformers."""
    records: list = []
    tree = settings("run", train={"dpo_beta": 0.3}, **chain)
    result = train(tree, listener=records.append)
    start = next(e for e in records if e.name == "eval")
    assert start.metrics == {"loss": math.log(2), "accuracy": 0.5, "margin": 0.0}

    rows, run = validation(tree), tree["output"]
    ours, base = (means(load_run(run, num_links=count)[0], rows) for count in (None, 0))
    rewards = 0.3 * lengths(rows) * (ours - base)
    margin = rewards[:, 0] - rewards[:, 1]
    metrics = result["metrics"]["validation"]
    # a link with soft knots is stored to 3e-3 of its update
    close = {"rel": 1e-2 if "knots" in chain else 1e-4}
    assert metrics["margin"] == pytest.approx(margin.mean().item(), **close)
    assert metrics["loss"] == pytest.approx(-logsigmoid(margin).mean().item(), **close)
    assert metrics["accuracy"] == (margin > 0).double().mean().item() > 0.5
    assert metrics.keys() == {"loss", "accuracy", "margin"}

    found = evaluate_task(run)
    assert found["metrics"] == pytest.approx(metrics, **close)
    at_start = evaluate_task(run, num_links=0)["metrics"]
    assert at_start == {"loss": math.log(2), "accuracy": 0.5, "margin": 0.0}


def test_the_loss_of_a_step_is_smoothed_and_that_of_an_evaluation_is_not(settings, monkeypatch):
    seen: list = []

    class Watched(DPO):
        def loss(self, engine, batch):
            found = super().loss(engine, batch)
            seen.append((self.rewards(engine, batch).detach(), found.item()))
            return found

    monkeypatch.setitem(objectives.OBJECTIVES, "dpo", Watched)
    records: list = []
    train(settings(train={"dpo_label_smoothing": 0.2}), listener=records.append)
    for rewards, loss in seen:
        margin = (rewards[:, 0] - rewards[:, 1]).double()
        right, wrong = logsigmoid(margin), logsigmoid(-margin)
        assert loss == pytest.approx(-(0.8 * right + 0.2 * wrong).sum().item(), rel=1e-6)
    steps = [e.loss for e in records if e.name == "step"]
    assert steps[0] == pytest.approx(math.log(2), rel=1e-5)
    assert steps[-1] < steps[0]
    *_, last = [e.metrics for e in records if e.name == "eval"]
    assert last["loss"] < -logsigmoid(torch.tensor(last["margin"])).item() + 0.01  # by convexity


def test_orpo_has_no_reference_and_its_metrics_are_those_of_plain_transformers(settings):
    tree = settings("run", train={"loss": "orpo", "orpo_beta": 0.3})
    metrics = train(tree)["metrics"]["validation"]
    assert not [*Path(tree["output"]).rglob("reference.safetensors")]
    rows, model = validation(tree), load_run(tree["output"])[0]
    chosen, rejected = means(model, rows).unbind(1)
    whole = [replace(e, scored=tuple(((1, len(ids)),) for ids in e.sequences)) for e in rows]
    likelihood = means(model, whole)[:, 0]
    odds = [(p.exp() / (1 - p.exp())).log() for p in (chosen, rejected)]
    losses = -likelihood - 0.3 * logsigmoid(odds[0] - odds[1])
    expected = {
        "loss": losses.mean().item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": 0.3 * (chosen - rejected).mean().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert metrics["accuracy"] > 0.5
    assert evaluate_task(tree["output"])["metrics"] == pytest.approx(metrics, rel=1e-5)
    ((cell,),) = stage_matrix(tree["output"]).grid[1:]
    assert (cell.metric, cell.value) == ("accuracy", metrics["accuracy"])


def test_an_answer_that_is_certain_has_a_gradient():
    scores = torch.tensor([[0.0, -9.0, -1.0], [-9.0, 0.0, -1.0]], requires_grad=True)
    orpo_losses(scores, 0.1).sum().backward()
    assert scores.grad.isfinite().all()


def test_the_reference_of_a_stage_is_the_chain_that_it_begins_on(settings):
    first = settings("first")
    train(first)
    tree = settings("second", train={"save_every": 1}, knots={"every": 2, "share": 0.5})
    records: list = []
    again = {key: tree[key] for key in ("data", "chain", "train", "output")} | {"name": "again"}
    found = extend(first["output"], again, listener=records.append)
    at_start = {"loss": math.log(2), "accuracy": 0.5, "margin": 0.0}
    assert next(e for e in records if e.name == "eval").metrics == at_start
    assert evaluate_task(tree["output"], num_links=2)["metrics"] == at_start
    metrics = evaluate_task(tree["output"])["metrics"]
    assert metrics == pytest.approx(found["metrics"]["validation"], rel=1e-2)  # soft knots
    assert metrics["margin"] > 0


def test_later_stages_and_a_fork_change_no_reference(settings):
    first, fork = settings("run"), settings("fork")["output"]
    again = {key: first[key] for key in ("data", "train")} | {"name": "again"}
    train(first)
    for name in ("again", "third"):
        train_on(first["output"], again | {"name": name, "chain": {"ranks": [2], "steps": [2]}})
    own = {"name": "own", "chain": {"ranks": [2], "steps": [2]}, "output": fork}
    train_on(first["output"], again | own)
    state = open_run(f"{first['output']}@again").state
    metrics = evaluate_task(f"{first['output']}@again")["metrics"]  # of a tenth of the rewards
    for run in map(open_run, (first["output"], fork)):
        ((_, found),) = Scorer(run, run.kept()).evaluations("again", state, ["again"])
        assert found.metrics["margin"] == pytest.approx(10 * metrics["margin"])


# --- resume ---


def test_a_run_killed_while_its_reference_is_computed_starts_over(settings, tmp_path):
    tree = settings("run")

    def stop(event):
        if event.name == "reference":
            shutil.copytree(tree["output"], tmp_path / "left")  # as a kill leaves it
            raise Stop

    with pytest.raises(Stop):
        train(tree, listener=stop)
    assert not Path(tree["output"]).exists()
    metrics = train(tree)["metrics"]
    assert train(tree | {"output": str(tmp_path / "left")}, resume=True)["metrics"] == metrics


def test_a_resume_needs_its_reference(settings):
    tree = settings("run", train={"save_every": 1})
    stop_after(make_config(tree), 2)
    (stage_dir(Path(tree["output"])) / "reference.safetensors").unlink()
    with pytest.raises(RunError, match="must hold main/reference"):
        train(tree, resume=True)


# --- TRL ---


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_losses_rewards_and_weights_are_those_of_trl(
    loss, settings, tiny_folder, tmp_path, monkeypatch
):
    """Step by step, on the same rows, tokens and batches in float32.

    Every pair counts alike here; TRL's ORPO weighs pairs of a micro-batch by their lengths, so it
    gets micro-batches of one.
    """
    trl = pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rewards: list = []

    class Watched(DPO):
        def rewards(self, engine, batch):
            found = super().rewards(engine, batch)
            rewards.append(found.detach().mean(0).tolist())
            return found

    monkeypatch.setitem(objectives.OBJECTIVES, "dpo", Watched)
    keys = {"loss": loss, "optimizer": "sgd", "optimizer_options": {"momentum": 0.0}}
    keys |= {"lr": 1.0, "max_grad_norm": None, "schedule": "constant"}
    config = make_config(settings("run", train=keys, ranks=[4], steps=[8], alpha=8))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plan = make_batches(config, training_examples(config, tokenizer))
    losses = []
    train(config, listener=lambda e: losses.append(e.loss) if e.name == "step" else None)

    model = peft_model(tiny_folder)
    start_as_ours(model, config.chain.links()[0], 0)
    if loss == "dpo":
        trainer_of, args_of = trl.DPOTrainer, trl.DPOConfig
        own = {"per_device_train_batch_size": 4, "precompute_ref_log_probs": True}
    else:
        trainer_of, args_of = ORPOTrainer, ORPOConfig
        own = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.bos_token = None  # this trainer adds one where a tokenizer does not
    own |= {"max_steps": 8, "max_grad_norm": 0, "optim": "sgd", "learning_rate": 1.0}
    own |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    own |= {"bf16": False, "gradient_checkpointing": False}
    rows = pairs(40)
    order = [row for step in range(8) for row in plan.batches(step)[0]]
    trainer = trainer_of(
        model=model,
        args=args_of(**arguments(tmp_path / "trl", **own)),
        train_dataset=Dataset.from_list([rows[row] for row in order]),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in logs], rel=1e-5)
    for ours, entry in zip(rewards, logs, strict=loss == "dpo"):
        theirs = [entry["rewards/chosen"], entry["rewards/rejected"]]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    (found,) = links_of(config.output)
    for name, expected in peft.get_peft_model_state_dict(model).items():
        assert (found[name] - expected).norm() < 1e-5 * expected.norm()
