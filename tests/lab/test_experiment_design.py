"""What an experiment asks: its file, its cells, the choice of hyper-parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chainlora.errors import ConfigError
from chainlora_lab import expand, load_experiment, make_experiment
from chainlora_lab.choice import Trial, choose
from chainlora_lab.expansion import Expansion
from chainlora_lab.results import results_by_id
from lab.cases import tree

ROOT = Path(__file__).resolve().parents[2]


def test_cells_are_task_by_method_by_grid_by_seed_with_stable_ids(small):
    experiment = small(methods=["lora", "chain3", "zero_shot"])
    # two methods that train, two rates, one seed
    assert len(Expansion(experiment).tuning()) == 2 * 2
    everything = expand(experiment)
    # what trains nothing needs neither rate nor second seed
    assert len(everything) == 2 * 2 * 2 + 1
    assert [cell.id for cell in everything] == [cell.id for cell in expand(experiment)]
    assert len({cell.id for cell in everything}) == len(everything)
    chain = next(cell for cell in everything if cell.method == "chain3").config.chain
    assert (chain.ranks, chain.steps, chain.alpha) == ((2, 2, 2), (2, 2, 2), 4)


WRONG = [
    ({"method": []}, "unknown key `method`; did you mean 'methods'"),
    ({"methods": ["lorra"]}, "did you mean 'lora'"),
    ({"methods": {"lora": {"recipes": {}}}}, "key `methods.lora.recipes`; did you mean 'recipe'"),
    ({"baseline": "rslora"}, "`baseline` must name methods of this file"),
    ({"seeds": [1, 1]}, "must differ"),
    ({"seeds": []}, r"`seeds` must not be empty \(got \[\]\)"),
    ({"seeds": 3}, r"`seeds` must be a list \(got 3\)"),
    ({"methods": "lora,chain3"}, r"`methods` must be a list or a section of keys \(got 'lora,"),
    ({"tune": {"grid": {"lr": [1]}}}, "config keys such as train.lr"),
    ({"tune": {"grid": {"train.lr": []}}}, "at least one value"),
    ({"figures": ["pie"]}, "figures"),
    ({"tune": {"grid": {"train.lr": [1, 2]}, "extend": {"train.lr": -1}}}, "or equal to 0"),
    ({"tune": {"grid": {"train.lr": [1, 2]}, "extend": {"chain.x": 1}}}, "keys of `tune.grid`"),
    ({"tune": {"grid": {"chain.init": ["a", "b"]}, "extend": {"chain.init": 1}}}, "positive"),
    ({"tune": {"seeds": []}}, "different seeds"),
    ({"primary": ["lora", "chain3"]}, "one of the pairs compared"),
    ({"curve_points": -1}, "must be greater than or equal to 0"),
    ({"methods": {"lora": None, "mine": {"preset": 5}}}, "unknown method '5'"),
    (
        {"methods": {"lora": None, "a\nb": {"preset": "lora"}}},
        "`methods` must have names of one line",
    ),
    ({"tasks": ["t" * 201]}, "`tasks` must have names of one line and 1 to 200 characters"),
    ({"tasks": ["rte", "all tasks"]}, "differ from what a report calls them together"),
    ({"tasks": ["rtee"]}, "did you mean 'rte'"),
    ({"base": {"train": {"lrr": 1}}}, "did you mean 'lr'"),
]


@pytest.mark.parametrize(("keys", "words"), WRONG)
def test_what_an_experiment_file_cannot_say(tiny_folder, sentiment, keys, words):
    good = tree(tiny_folder, sentiment)
    if "base" in keys:
        keys = {"base": good["base"] | keys["base"]}
    with pytest.raises(ConfigError, match=words) as error:
        expand(make_experiment(good | keys))
    assert "\n" not in str(error.value)


@pytest.mark.slow  # some have hundreds of cells
@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("examples/experiments/*.yaml"), *ROOT.glob("benchmarks/[ps][am]*/*.yaml")],
    ids=lambda path: path.stem,
)
def test_every_shipped_experiment_expands_without_data_or_model(path, tmp_path, cache):
    experiment = load_experiment(path)
    cells = expand(experiment)
    assert {cell.task for cell in cells} == set(experiment.tasks)
    budgets = {cell.task: set() for cell in cells}
    for cell in cells:
        chain = cell.config.chain
        budgets[cell.task].add(sum(chain.epochs or chain.steps or ()))
    for spent in budgets.values():  # equal epochs or steps for all that train
        assert len(spent - {0}) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_choice_is_by_validation_then_loss_then_order():
    def trial(rate, accuracy, loss):
        metrics = None if accuracy is None else {"accuracy": accuracy, "loss": loss}
        return Trial("t", "lora", (("train.lr", rate),), metrics, "accuracy")

    (record,) = choose(
        [trial(1, 0.5, 1.0), trial(2, 0.7, 0.9), trial(3, 0.7, 0.8), trial(4, 0.7, 0.8)]
    )
    assert record["chosen"] == {"train.lr": 3}
    (record,) = choose(
        [trial(1, 0.9, 1.0), trial(1, None, 0.0), trial(2, 0.1, 1.0), trial(2, 0.1, 1.0)]
    )
    assert record["chosen"] == {"train.lr": 2}  # a rate that diverges under one seed is not chosen
    (record,) = choose([trial(1, 0.9, 1.0), trial(2, 0.1, 0.5)], metric="loss")
    assert record["chosen"] == {"train.lr": 2}
    # means over seeds are equal whatever their order: the loss decides, and not a rounding
    few = [trial(1, score, 0.9) for score in (0.1, 0.2, 0.3)]
    (record,) = choose(few + [trial(2, score, 0.1) for score in (0.3, 0.2, 0.1)])
    assert record["chosen"] == {"train.lr": 2}
    (record,) = choose([trial(1, None, 0.0)])
    assert record["chosen"] is None
    other = Trial("t", "lora", (("train.lr", 9),), None, "loss")  # of a sequence that diverged
    (record,) = choose([other, trial(1, 0.1, 1.0), trial(2, 0.7, 2.0)])
    assert (record["metric"], record["chosen"]) == ("accuracy", {"train.lr": 2})


def test_a_list_of_names_keeps_what_the_file_says_of_them(written):
    own = {"lora": {"train": {"lr": 3e-4}}, "three": {"preset": "chain3"}, "rslora": None}
    pairs = [["three", "lora"], ["rslora", "lora"]]
    path = written(methods=own, comparisons=pairs)
    few = load_experiment(path, [("methods", "[lora, three]")])
    assert few.methods == {"lora": {"train": {"lr": 3e-4}}, "three": {"preset": "chain3"}}
    assert few.pairs == (("three", "lora"),)
    other = load_experiment(
        path, [("methods", "[lora, relora]"), ("comparisons", "[[relora, lora]]")]
    )
    assert (list(other.methods), other.pairs) == (["lora", "relora"], (("relora", "lora"),))
    said = r"must keep a pair that the file compares \(got three, rslora\)"
    with pytest.raises(ConfigError, match=said):
        load_experiment(path, [("methods", "[three, rslora]")])
    with pytest.raises(ConfigError, match=r"unknown method 'chian3'.*'chain3'"):
        load_experiment(path, [("methods", "[lora, three, chian3]")])


def test_what_is_in_a_file_decides_what_is_done_and_not_where_it_lies(small, sentiment, tmp_path):
    def ids(folder):
        tasks = {"mood": {"data": {"task": str(folder / "task.yaml")}}}
        cells = expand(small(tasks=tasks))
        return [cell.id for cell in cells]

    for name in ("moved", "edited"):
        shutil.copytree(sentiment, tmp_path / name)
    text = (sentiment / "task.yaml").read_text()
    (tmp_path / "edited" / "task.yaml").write_text(text.replace('prompt: "', 'prompt: "Well: '))
    assert (tmp_path / "edited" / "task.yaml").read_text() != text
    assert ids(tmp_path / "moved") == ids(sentiment)
    assert not set(ids(tmp_path / "edited")) & set(ids(sentiment))


@pytest.mark.parametrize("name", ["table1", "step_down", "rank1", "rank2"])
def test_cells_that_were_committed_keep_their_names(name):
    """Else `--reuse` would train them again."""
    folder = ROOT / "benchmarks/paper"
    committed = results_by_id([folder / name / "results.jsonl"])
    assert committed
    assert committed.keys() <= {
        cell.id for cell in expand(load_experiment(folder / f"{name}.yaml"))
    }
