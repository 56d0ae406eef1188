"""Presets: each runs, differs from the next by a few keys, and spends the budget that all share."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import write_rows
from helpers import as_row, records_of, settings, training_examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from chainlora.chain.initialization import generator_for, random_factors
from chainlora.errors import ConfigError
from chainlora.runs.addresses import open_run
from chainlora.training.batches import make_batches
from chainlora.training.stages import train_run as train
from chainlora_lab.loops import CellConfig, fine_tune
from chainlora_lab.methods import apply_recipe, list_methods, load_method, merge_trees, split_total

BASE = {"model": "m", "data": {"task": "rte"}, "recipe": {"rank": 8, "epochs": 5}}


def small_config(method: str, *settings_of, **chain) -> CellConfig:
    """Links of rank 2 for six steps, in a run of `helpers.settings`."""
    chain |= dict.fromkeys(("ranks", "alpha", "steps"))
    base = settings(*settings_of, chain=chain, train={"lr": 1e-3})
    recipe = {"recipe": {"rank": 2, "steps": 6, "scaling": 2}}
    return CellConfig(**apply_recipe(merge_trees(base, recipe, load_method(method).keys)))


def config_of(method: str, shared=None, **recipe):
    keys = load_method(method).keys
    return CellConfig(**apply_recipe(merge_trees(BASE, shared, keys, {"recipe": recipe})))


def test_every_method_is_a_config():
    assert len(list_methods()) >= 15
    for name in list_methods():
        method = load_method(name)
        assert method.description.endswith(".")
        assert method.source
        config = config_of(name)
        assert sum(config.chain.epochs or ()) == (5 if config.chain.ranks else 0)
    assert config_of("lora_plus").train.lora_plus_ratio == 16


def test_the_paper_s_splits_and_the_rival_of_equal_rank():
    assert split_total(5, 2) == [3, 2]  # the paper: link 1 is epochs 1 to 3, link 2 epochs 4 and 5
    assert split_total(5, 3) == [2, 2, 1]
    assert split_total(2, 4) == [0.5] * 4
    assert split_total(100, 2, shares=(3, 1)) == [75, 25]
    for preset in ("lora", "rslora"):  # what the config of the comparison says of scaling
        keys = load_method(preset).keys
        wide, chain = (config_of(name, keys).chain for name in ("lora_sum_rank", "chain3"))
        assert sum(wide.ranks) == sum(chain.ranks) == 24
        assert wide.links()[0].scaling == pytest.approx(chain.links()[0].scaling)
    assert config_of("chain", ranks=[8, 4]).chain.ranks == (8, 4)


@given(total=st.integers(1, 500), links=st.integers(1, 12))
def test_a_split_spends_the_whole_budget(total, links):
    parts = split_total(total, links)
    assert len(parts) == links
    assert sum(parts) == pytest.approx(total, rel=1e-12)  # fractions of a unit add up to rounding
    assert all(early >= late > 0 for early, late in itertools.pairwise(parts))


def test_what_cannot_work_is_refused_in_one_line():
    for tree, words in (
        ({"rank": 8}, "epochs or steps"),
        ({"epochs": 5, "steps": 5}, "got both"),
        ({"epochs": 5, "link": 2}, "did you mean 'links'"),
        ({"epochs": 5, "links": 2, "shares": [1]}, "one positive number a link"),
        ({"epochs": 5, "rank": 0}, "recipe.rank"),
        ({"steps": 2, "links": 3}, r"at least one step a link \(got 2 for 3 links\)"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            apply_recipe({"recipe": tree})
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"chain\.ranks beside it"):
        apply_recipe({"recipe": {"epochs": 5}, "chain": {"ranks": [8]}})
    with pytest.raises(ConfigError, match="did you mean 'rslora'"):
        load_method("rslorra")


@pytest.mark.parametrize("name", list_methods())
def test_each_method_runs(name, tiny_folder, sentiment):
    config = small_config(name, tiny_folder, sentiment)
    assert (config.loop is not None) == (name == "full")  # the test below
    result = train(config.plain)
    assert result["steps"] == (6 if config.chain.ranks else 0)
    assert 0 <= result["metrics"]["validation"]["accuracy"] <= 1
    assert len(result["links"]) == len(config.chain.ranks)


def test_full_fine_tuning_is_the_loop_of_plain_torch(configure, tokenizer, tmp_path):
    rows = [{"prompt": "the cat", "completion": " sat" * n} for n in (1, 40, 2, 7)]
    data = {"task": None, "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    data |= {"validation": data["train"]}
    keys = {"lr": 1e-3, "batch_size": 1, "eval_every": 2, "schedule": "constant"}
    config = configure(data=data, chain={"ranks": [2, 2], "steps": [3, 2]}, train=keys)
    result, records = fine_tune(config), records_of(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    examples, losses = training_examples(config, tokenizer), []
    plan = make_batches(config, examples)
    for step in range(5):
        ((row,),) = plan.batches(step)
        row = {key: torch.tensor([ids]) for key, ids in as_row(examples[row]).items()}
        loss = model(**row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = [record["loss"] for record in records if record["event"] == "step"]
    assert found == pytest.approx(losses, abs=2e-5)
    scored = {r["step"]: r["loss"] for r in records if r["event"] == "eval"}
    assert [*scored] == [0, 2, 4, 5]
    assert scored[5] == result["metrics"]["validation"]["loss"] < scored[0]
    assert result["trainable_parameters"] == sum(p.numel() for p in model.parameters())


def test_full_fine_tuning_starts_over_and_keeps_no_weights(configure, tmp_path):
    config = configure(chain={"ranks": [2], "steps": [1]})
    first = fine_tune(config)
    assert fine_tune(config)["metrics"] == first["metrics"]
    assert not [*(tmp_path / "run").rglob("model.safetensors")]
    keys = config.model_dump() | {"loop": "full", "train": {"keep_best": True}}
    with pytest.raises(ConfigError, match=r"keeps no best point \(got train.keep_best: true\)"):
        CellConfig(**keys)


@pytest.mark.parametrize("init", ["kaiming", "gradient"])
def test_rac_lora_trains_b_alone(tiny_folder, sentiment, tmp_path, init):
    train(small_config("rac_lora", tiny_folder, sentiment, tmp_path / "run", init=init).plain)
    links = open_run(tmp_path / "run").links()
    assert len(links) == 3
    for place, link in enumerate(links):
        for name, pair in link.factors.items():
            sides, draw = (pair.a.shape[1], pair.b.shape[0]), generator_for(0, place, name)
            is_as_drawn = torch.equal(pair.a, random_factors(link.config, *sides, draw).a)
            assert is_as_drawn == (init == "kaiming")
            assert pair.b.any()
