"""Training as a user meets it: one call from config to result, the best point, what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import yaml
from conftest import write_rows
from helpers import (
    assert_trains_as_peft,
    plain_chain,
    records_of,
    settings,
    stage_dir,
    training_examples,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import export_adapter, load_run, make_config, train
from chainlora.errors import ChainLoRAError, ConfigError, ModelError
from chainlora.runs.addresses import open_run
from chainlora.training.batches import make_batches


def test_a_run_from_config_to_result(tiny_folder, sentiment, tmp_path):
    run = tmp_path / "run"
    seen = []
    result = train(settings(tiny_folder, sentiment, run), listener=seen.append)
    assert result["steps"] == 11
    assert result["metrics"]["validation"]["accuracy"] > 0.9  # the word is in the sentence
    assert json.loads((stage_dir(run) / "result.json").read_text()) == result
    records = records_of(run)
    assert [dict(r) for r in seen[1:-1]] == records
    assert [seen[0]["event"], seen[-1]["event"]] == ["plan", "scored"]
    assert [r["where"] for r in records if r["event"] == "eval"] == [
        "start",
        "knot",
        "knot",
        "knot",
    ]
    assert all(r["function_change"] < 1e-5 for r in records if r["event"] == "knot")
    assert records[-1]["loss"] < records[0]["loss"]
    links = open_run(run).links()
    assert [link.rank for link in links] == [4, 4, 2]
    assert [link.scaling for link in links] == [2.0, 2.0, 2.0]  # proportional alpha
    assert make_config(yaml.safe_load((stage_dir(run) / "config.yaml").read_text())) == make_config(
        settings(tiny_folder, sentiment, run)
    )
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


def test_law_5_the_schedule_is_where_it_should_be(tiny_folder, sentiment):
    def rates(**keys) -> list[float]:
        seen = []
        config = make_config(settings(tiny_folder, sentiment, train=keys))
        train(
            config,
            listener=lambda r: seen.append(r["learning_rate"]) if r["event"] == "step" else None,
        )
        return seen

    continuing = rates()
    torch.testing.assert_close(continuing, [1e-2 * (1 - step / 11) for step in range(11)])
    restarting = rates(restart_schedule=True)
    torch.testing.assert_close(
        restarting, [1e-2 * (1 - s / n) for n in (4, 4, 3) for s in range(n)]
    )
    warm = rates(restart_schedule=True, warmup_steps=2)
    assert warm[0] == warm[4] == warm[8] == 0.0
    assert warm[1] == warm[5] == pytest.approx(5e-3)


@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_law_6_a_chain_of_one_is_peft_lora(tiny_folder, sentiment, tmp_path, speedups):
    run = tmp_path / "run"
    tree = settings(
        tiny_folder,
        sentiment,
        run,
        chain={"ranks": [4], "steps": [6]},
        train={"seed": 3, "lr": 1e-3, "speedups": speedups},
    )
    assert_trains_as_peft(make_config(tree))


@pytest.mark.parametrize("module", ["mlp", "self_attn"])  # which a fast decoder layer goes into
def test_a_block_is_trained_whole_in_a_narrow_model_as_its_own_forward_has_it(
    tiny_folder, sentiment, module
):
    losses: dict[str, list[float]] = {"auto": [], "off": []}
    for speedups, seen in losses.items():
        keys = {"ranks": [4], "steps": [3], "target_modules": "all-linear"}
        tree = settings(
            tiny_folder,
            sentiment,
            chain=keys | {"extra_modules": [module]},
            train={"speedups": speedups, "dtype": "bfloat16", "lr": 1e-3},
        )
        train(tree, listener=lambda e, seen=seen: seen.append(e.loss) if e.name == "step" else None)
    assert losses["auto"] == pytest.approx(losses["off"], abs=5e-3)  # roundings of activations


def test_the_best_point_over_the_whole_chain_is_kept(tiny_folder, sentiment, tmp_path):
    run = tmp_path / "run"
    # a learning rate that wrecks the model later on: the best point lies inside the chain
    tree = settings(
        tiny_folder,
        sentiment,
        run,
        chain={"ranks": [4, 4], "steps": [6, 6]},
        train={
            "lr": 3e-2,
            "schedule": "constant",
            "keep_best": True,
            "eval_every": 1,
            "select_metric": "loss",
        },
    )
    result = train(tree)
    evals = [r for r in records_of(run) if r["event"] == "eval"]
    best = min((r for r in evals if r["where"] != "start"), key=lambda r: r["loss"])
    assert result["best"]["step"] == best["step"]
    assert result["metrics"]["validation"]["loss"] == pytest.approx(best["loss"], abs=1e-5)
    load_run(run)
    assert len(open_run(run).links()) == result["best"]["num_links"] + result["best"]["partial"]
    assert len(open_run(run).links(2)) == 2  # the whole chain is still there


@pytest.mark.parametrize("knots", [None, {"every": 2, "share": 0.3}], ids=["whole", "soft"])
def test_a_chain_is_the_loop_written_out_in_float64(tiny_folder, tmp_path, knots):
    """Two links on rows of unlike lengths, accumulated, clipped and decayed, B at another rate."""
    rows = [{"prompt": "the cat", "completion": " sat" * n} for n in (1, 40, 2, 1, 30, 3, 1)]
    run, targets = tmp_path / "run", ["q_proj", "down_proj"]
    chain = {"ranks": [3, 2], "alpha": 6, "steps": [4, 3], "target_modules": targets}
    keys = {"lr": 5e-3, "lora_plus_ratio": 4, "weight_decay": 0.1, "max_grad_norm": 0.05}
    tree = {
        "model": str(tiny_folder),
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "chain": chain | {"knots": knots},
        "train": keys | {"batch_size": 2, "gradient_accumulation": 2},
        "output": str(run),
    }
    config = make_config(tree)
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


def test_full_fine_tuning_is_evaluated_at_its_end_which_may_be_its_best_point(
    tiny_folder, sentiment, tmp_path
):
    run = tmp_path / "run"
    chain = {"tune": "full", "ranks": [1, 1], "steps": [4, 4]}
    keys = {"lr": 1e-3, "eval_every": 2, "select_metric": "loss"}
    result = train(settings(tiny_folder, sentiment, run, chain=chain, train=keys))
    records = records_of(run)
    losses = {r["step"]: r["loss"] for r in records if r["event"] == "eval"}
    assert [r["step"] for r in records if r["event"] == "eval"] == [0, 2, 4, 6, 8]
    # small steps, and few
    assert losses[8] == min(losses.values()) == result["metrics"]["validation"]["loss"]
    assert (result["best"]["step"], result["best"]["value"]) == (8, losses[8])
    config = json.loads((stage_dir(run) / "model" / "config.json").read_text())
    assert config["use_cache"]  # as the base: without one, generating takes far longer


@pytest.mark.parametrize("init", ["gradient", "pissa"])
def test_a_start_along_more_directions_than_a_layer_has_is_refused_before_the_output_is_claimed(
    tiny_folder, sentiment, tmp_path, init
):
    def config(rank):  # v_proj is 16 × 32
        chain = {"init": init, "ranks": [rank], "steps": [1]}
        return make_config(settings(tiny_folder, sentiment, tmp_path / "run", chain=chain))

    with pytest.raises(
        ModelError, match=rf"`init: {init}` .*\(got rank 17 for 16 at .*v_proj\); lower the rank or"
    ):
        train(config(17))
    assert not (tmp_path / "run").exists()
    assert train(config(16))["steps"] == 1


def test_demonstrations_that_are_not_there_or_leave_nothing_to_train_on_are_refused(
    tiny_folder, sentiment, tmp_path
):
    def config(shots, **chain):  # of 32 training rows
        data = {"shots": shots, "truncation": "left"}
        return make_config(
            settings(tiny_folder, sentiment, tmp_path / "run", data=data, chain=chain)
        )

    nothing = {"ranks": [], "steps": []}
    with pytest.raises(
        ConfigError,
        match=r"`data.shots` must be at most .* training rows \(got 33 for 32\); lower it",
    ):
        train(config(33, **nothing))
    with pytest.raises(
        ConfigError, match=r"training needs rows \(got none beside 32 demonstrations\); lower data"
    ):
        train(config(32))
    assert not (tmp_path / "run").exists()
    assert train(config(31))["rows"] == 1
    # nothing to train
    assert train(config(32, **nothing).model_copy(update={"output": None}))["rows"] == 0


def test_a_tracker_without_a_place_is_told_apart_from_one_that_is_missing(tiny_folder, sentiment):
    tree = settings(tiny_folder, sentiment) | {"output": None}
    for names, rule in (
        (["tensorboard"], r"needs a place for them \(got 'tensorboard' .*; give output"),
        (["tensorboard", "notebook"], r"that are installed \(got 'notebook'\)"),
    ):
        with pytest.raises(ChainLoRAError, match=rule):
            train(tree | {"train": tree["train"] | {"trackers": names}})


def test_epochs_split_steps_at_the_knots(tiny_folder, sentiment):
    config = make_config(
        settings(tiny_folder, sentiment, chain={"steps": None, "epochs": [1, 0.5, 0.5]})
    )
    plan = make_batches(
        config, training_examples(config, AutoTokenizer.from_pretrained(tiny_folder))
    )
    assert plan.lengths == (4, 2, 2)
    rows = [row for step in range(4) for batch in plan.batches(step) for row in batch]
    assert sorted(rows) == list(range(32))  # an epoch sees every row once
    with pytest.raises(ConfigError, match="at least one step"):
        make_batches(
            make_config(
                settings(tiny_folder, sentiment, chain={"steps": None, "epochs": [1, 0.01, 1]})
            ),
            training_examples(config, AutoTokenizer.from_pretrained(tiny_folder)),
        )


def test_a_link_after_a_pruned_reset_starts_with_steps_of_bounded_size(
    tiny_folder, sentiment, tmp_path
):
    """B is 0 there, so the gradient of A is: a first moment kept without its second would be
    divided by eps alone."""
    tree = settings(
        tiny_folder,
        sentiment,
        output=str(tmp_path / "run"),
        chain={"steps": [8, 3], "ranks": [4, 4]},
        train={"optimizer_reset": "prune", "prune_fraction": 0.5, "lr": 1e-2},
    )
    train(tree)
    _, link = open_run(tmp_path / "run").links()
    for factors in link.factors.values():
        # drawn within 1/√32, then three steps of at most lr · 0.1/√0.001 (AdamW's largest, after
        # zero gradients) each
        assert factors.a.abs().max() <= 32**-0.5 + 3 * 1e-2 * 0.1 / 0.001**0.5


def test_a_run_with_soft_knots(tiny_folder, sentiment, tmp_path):
    soft = {"time_constant": 14}  # a twelfth of it is a knot every step but the last of a link
    run, keys = tmp_path / "run", {"chain": {"knots": soft, "ranks": [4, 2], "steps": [8, 6]}}
    result = train(settings(tiny_folder, sentiment, run, **keys))
    records = records_of(run)
    knots = [record for record in records if record["event"] == "soft_knot"]
    assert [record["step"] for record in knots] == [*range(1, 8), *range(9, 14)]
    assert len({record["share"] for record in knots if record["link"] == 0}) == 1
    changes = [record["function_change"] for record in records if record["event"] == "knot"]
    assert max(changes) < 1e-3  # stored to 3e-3 of the update, which is small beside the weights
    assert [link["rank"] for link in result["links"]] > [4, 2]
    assert all(0 < link["error"] <= 3e-3 for link in result["links"])
    model, _ = load_run(run)
    adapter = export_adapter(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 30, 7]])
    torch.testing.assert_close(adapted(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert adapter["rank"] == sum(link["rank"] for link in result["links"])
