"""Presets: each runs, differs from the next by a few keys, and spends the budget that all share."""

from __future__ import annotations

import itertools

import pytest
from helpers import settings
from hypothesis import given
from hypothesis import strategies as st

from chainlora.config.reading import make_config
from chainlora.errors import ConfigError
from chainlora.training.loop import train
from chainlora_lab.methods import apply_recipe, list_methods, load_method, merge_trees, split_total

BASE = {"model": "m", "data": {"task": "rte"}, "recipe": {"rank": 8, "epochs": 5}}


def config_of(method: str, shared=None, **recipe):
    keys = load_method(method).keys
    return make_config(apply_recipe(merge_trees(BASE, shared, keys, {"recipe": recipe})))


def test_every_method_is_a_config():
    assert len(list_methods()) >= 15
    for name in list_methods():
        method = load_method(name)
        assert method.description.endswith(".")
        assert method.source
        config = config_of(name)
        assert sum(config.chain.epochs or ()) == (5 if config.chain.ranks else 0)
    assert config_of("rac_lora").chain.train_factors == "B"
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
    own = {"chain": dict.fromkeys(("ranks", "alpha", "steps")), "train": {"lr": 1e-3}}
    recipe = {"recipe": {"rank": 2, "steps": 6, "scaling": 2}}
    base = settings(tiny_folder, sentiment, **own)
    config = make_config(apply_recipe(merge_trees(base, recipe, load_method(name).keys)))
    result = train(config)
    assert result["steps"] == (6 if config.chain.ranks else 0)
    assert 0 <= result["metrics"]["validation"]["accuracy"] <= 1
    assert len(result["links"]) == (0 if config.chain.tune == "full" else len(config.chain.ranks))
