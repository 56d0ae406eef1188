"""Training as a user meets it: one call from config to result, the best point, what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import yaml
from conftest import WORDS, write_rows
from helpers import links_of, plain_chain, records_of, stage_dir, training_examples
from helpers_integrations import peft_model, trained_by_peft
from transformers import AutoModelForCausalLM

from chainlora import load_run, make_config, train
from chainlora.errors import ChainLoRAError
from chainlora.runs.addresses import open_run
from chainlora.training.batches import make_batches

NO_TASK = {"task": None, "validation": None}


def test_a_run_from_config_to_result(configure, tmp_path):
    run, seen = tmp_path / "run", []
    result = train(configure(), listener=seen.append)
    assert result["steps"] == 11
    assert result["metrics"]["validation"]["accuracy"] > 0.9  # the word is in the sentence
    assert json.loads((stage_dir(run) / "result.json").read_text()) == result
    records = records_of(run)
    assert [dict(r) for r in seen[1:-1]] == records
    assert [seen[0]["event"], seen[-1]["event"]] == ["plan", "scored"]
    scored = [r["where"] for r in records if r["event"] == "eval"]
    assert scored == ["start", "knot", "knot", "knot"]
    assert all(r["function_change"] < 1e-5 for r in records if r["event"] == "knot")
    assert records[-1]["loss"] < records[0]["loss"]
    links = open_run(run).links()
    assert [link.rank for link in links] == [4, 4, 2]
    assert [link.scaling for link in links] == [2.0, 2.0, 2.0]  # proportional alpha
    written = yaml.safe_load((stage_dir(run) / "config.yaml").read_text())
    assert make_config(written) == configure()
    model, _ = load_run(run)  # plain: nothing of ours or of PEFT is on it
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_every_link_is_an_adapter_that_peft_loads(tiny_folder, stored_run):
    """Merged one after the other, they are the chain."""
    ids = torch.tensor([[5, 9, 30, 7]])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for folder in sorted((stored_run / "links").iterdir()):
        base = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    model, _ = load_run(stored_run)
    # float32 sums in another order
    torch.testing.assert_close(base(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_law_5_the_schedule_is_where_it_should_be(configure):
    def rates(**keys) -> list[float]:
        seen = []
        train(configure(None, train=keys), listener=seen.append)
        return [event.learning_rate for event in seen if event.name == "step"]

    continuing = rates()
    torch.testing.assert_close(continuing, [1e-2 * (1 - step / 11) for step in range(11)])
    restarting = [1e-2 * (1 - s / n) for n in (4, 4, 3) for s in range(n)]
    torch.testing.assert_close(rates(restart_schedule=True), restarting)
    warm = rates(restart_schedule=True, warmup_steps=2)
    assert warm[0] == warm[4] == warm[8] == 0.0
    assert warm[1] == warm[5] == pytest.approx(5e-3)


@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_law_6_a_chain_of_one_is_peft_lora(configure, tiny_folder, tmp_path, speedups):
    """The same losses and factors as PEFT's in transformers' Trainer with AdamW."""
    rows = [{"prompt": f"the {word}", "completion": " sat" * n} for n, word in enumerate(WORDS, 1)]
    data = NO_TASK | {"train": str(write_rows(tmp_path / "rows.jsonl", rows[:8]))}
    keys = {"seed": 3, "lr": 1e-3, "speedups": speedups}
    config = configure(data=data, chain={"ranks": [4], "steps": [6]}, train=keys)
    losses = []
    train(config, listener=lambda e: losses.append(e.loss) if e.name == "step" else None)
    expected, theirs = trained_by_peft(config, peft_model(tiny_folder), tmp_path / "trainer")
    assert losses == pytest.approx(expected, abs=1e-3)  # as it prints them
    (ours,) = links_of(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam divides by the gradient's size, so a rounding error in a tiny gradient moves a weight
        # by a small share of the learning rate; six steps of 1e-3 moved the weights by up to 4e-3
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)
        assert (ours[name] - theirs[name]).abs().median() < 1e-7


def test_the_best_point_over_the_whole_chain_is_kept(configure, tmp_path):
    # a learning rate that wrecks the model later on: the best point lies inside the chain
    keys = {"lr": 3e-2, "schedule": "constant", "keep_best": True, "eval_every": 1}
    keys |= {"select_metric": "loss"}
    result = train(configure(chain={"ranks": [4, 4], "steps": [6, 6]}, train=keys))
    run = tmp_path / "run"
    evals = [r for r in records_of(run) if r["event"] == "eval"]
    best = min((r for r in evals if r["where"] != "start"), key=lambda r: r["loss"])
    assert result["best"]["step"] == best["step"]
    assert result["metrics"]["validation"]["loss"] == pytest.approx(best["loss"], abs=1e-5)
    load_run(run)
    assert len(open_run(run).links()) == result["best"]["num_links"] + result["best"]["partial"]
    assert len(open_run(run).links(2)) == 2  # the whole chain is still there


@pytest.mark.parametrize("knots", [None, {"every": 2, "share": 0.3}], ids=["whole", "soft"])
def test_a_chain_is_the_loop_written_out_in_float64(configure, tmp_path, knots):
    """Two links on rows of unlike lengths, accumulated, clipped and decayed, B at another rate."""
    rows = [{"prompt": "the cat", "completion": " sat" * n} for n in (1, 40, 2, 1, 30, 3, 1)]
    data = NO_TASK | {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    chain = {"ranks": [3, 2], "alpha": 6, "steps": [4, 3], "knots": knots}
    chain["target_modules"] = ["q_proj", "down_proj"]
    keys = {"lr": 5e-3, "lora_plus_ratio": 4, "weight_decay": 0.1, "max_grad_norm": 0.05}
    keys |= {"batch_size": 2, "gradient_accumulation": 2, "betas": [0.8, 0.95], "eps": 1e-6}
    run, config = tmp_path / "run", configure(data=data, chain=chain, train=keys)
    train(config)
    losses, norms, model = plain_chain(config)
    assert max(norms) > 0.05 > min(norms)
    steps = [record for record in records_of(run) if record["event"] == "step"]
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        # float32; a link with soft knots is stored to a relative error of 3e-3
        near = 1e-3 if knots and step["link"] else 2e-6
        assert (step["loss"], step["grad_norm"]) == pytest.approx((loss, norm), abs=near)
    ids = torch.tensor([[5, 9, 30, 7]])
    found = load_run(run)[0](ids).logits.double()
    torch.testing.assert_close(found, model(ids).logits, atol=1e-3 if knots else 1e-5, rtol=0)


def of_rank(rank: int, init: str) -> dict:
    return {"chain": {"init": init, "ranks": [rank], "steps": [1]}}  # v_proj is 16 × 32


def with_shots(shots: int, **chain) -> dict:
    return {"data": {"shots": shots, "truncation": "left"}, "chain": chain}  # of 32 rows


NOTHING = {"ranks": [], "steps": []}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (of_rank(17, "gradient"), r"`init: gradient` .*\(got rank 17 for 16 at .*v_proj\); lower"),
        (with_shots(33, **NOTHING), r"`data.shots` must be at most .*\(got 33 for 32\); lower it"),
        (with_shots(32), r"training needs rows \(got none beside 32 demonstrations\); lower data"),
        ({"chain": {"steps": None, "epochs": [1, 0.01, 1]}}, "at least one step"),
        ({"train": {"trackers": ["tensorboard", "notebook"]}}, r"knows \(got 'notebook'\)"),
        (
            {"name": None, "train": {"trackers": ["tensorboard"]}},
            r"needs a place for them \(got 'tensorboard' .*; give output",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_the_output_is_claimed(
    configure, tmp_path, sections, said
):
    with pytest.raises(ChainLoRAError, match=said):
        train(configure(**sections))
    assert not (tmp_path / "run").exists()


def test_what_can_just_be_trained_is(configure):
    assert train(configure(None, **of_rank(16, "gradient")))["steps"] == 1
    assert train(configure(None, **with_shots(31)))["rows"] == 1
    assert train(configure(None, **with_shots(32, **NOTHING)))["rows"] == 0


def test_epochs_split_steps_at_the_knots(configure, tokenizer):
    config = configure(chain={"steps": None, "epochs": [1, 0.5, 0.5]})
    plan = make_batches(config, training_examples(config, tokenizer))
    assert plan.lengths == (4, 2, 2)
    rows = [row for step in range(4) for batch in plan.batches(step) for row in batch]
    assert sorted(rows) == list(range(32))  # an epoch sees every row once
