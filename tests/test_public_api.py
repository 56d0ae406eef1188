"""The public names; their list is the table of docs/python.md, to which test_docs.py holds them."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml
from conftest import make_tiny_folder
from helpers import settings

import chainlora
from chainlora import errors
from chainlora.showing import Shown
from chainlora_pages import report_runs


def test_no_other_names_are_shown():
    assert sorted(dir(chainlora)) == sorted(chainlora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        chainlora.trian  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(chainlora.__all__) - {"__version__"}))
def test_every_name_is_there_and_says_what_it_is(name):
    thing = getattr(chainlora, name)
    assert inspect.getdoc(thing)
    assert thing.__module__.startswith(("chainlora.", "chainlora_trainer."))


def test_every_error_on_purpose_is_of_one_tree():
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    kinds = [kind for kind in classes if issubclass(kind, Exception)]
    assert all(issubclass(kind, chainlora.ChainLoRAError) for kind in kinds)
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__))  # the tree, in its docstring
    assert {kind.__name__ for kind in kinds} == drawn


def test_a_tilde_is_home_in_every_path(tiny_folder, sentiment, tmp_path, monkeypatch):
    """What a shell would have read as such: nothing is looked for, or written, beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(sentiment, tmp_path / "rows")
    tree = settings(tiny_folder, sentiment, "~/run", chain={"ranks": [2], "steps": [1]})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    chainlora.train("~/run.yaml", progress=False)
    asked = {"data": "~/rows/validation.jsonl", "predictions": "~/said.jsonl", "limit": 2}
    assert chainlora.evaluate_task("~/run", "~/rows/task.yaml", **asked)["rows"] == 2
    report_runs("~/run", "~/page.html")
    chainlora.export_merged(chainlora.open_run("~/run"), "~/merged")
    chain = chainlora.load_chain("~/run", chainlora.load_model(tiny_folder)[0], checkpoint="~")
    chainlora.export_adapter(chain, "~/adapter")
    chainlora.save_chain(chain, "~/saved")
    assert len(chainlora.load_chain("~/saved", chainlora.load_model(tiny_folder)[0])) == 1
    assert not [*(tmp_path / "here").iterdir()]
    for wrong in (chainlora.load_run, chainlora.inspect_run, chainlora.evaluate_task):
        with pytest.raises(chainlora.ChainLoRAError, match=r"named by its path \(got a Chain\)"):
            wrong(chain)


# --- what a notebook shows ---

LINES, COLUMNS = 24, 80  # a screen


@pytest.fixture(scope="module")
def shown(sentiment, tmp_path_factory):
    """A value of every public class, and of what public functions return, of a model of many
    modules. The run's name would be a tag if somebody forgot to escape it."""
    folder = tmp_path_factory.mktemp("shown")
    model, run = make_tiny_folder(folder / "model", num_hidden_layers=6), folder / "<script>"
    tree = settings(model, sentiment, run, chain={"target_modules": None, "steps": [1, 1, 1]})
    task = chainlora.load_task(sentiment / "task.yaml")
    values = {
        "RunConfig": chainlora.make_config(tree),
        "TrainResult": chainlora.train(tree, progress=False),
        "open_run": chainlora.open_run(run),
        "inspect_run": chainlora.inspect_run(run),
        "stage_matrix": chainlora.stage_matrix(run),
        "MatrixSummary": chainlora.stage_matrix(run).summaries()[0],
        "evaluate_task": chainlora.evaluate_task(run, task, data=str(sentiment)),
        "load_task": task,
        "export_adapter": chainlora.export_adapter(run, folder / "adapter"),
        "export_merged": chainlora.export_merged(run, folder / "merged"),
        "report_runs": report_runs([run], folder / "page.html"),
        "ChainCallback": chainlora.ChainCallback(ranks=[8, 8]),
        "ChainLoRAError": chainlora.ChainLoRAError("a rule", "a value", "a remedy"),
        "LinkConfig": chainlora.LinkConfig(rank=4),
        "Naming": chainlora.Naming("me/mine", base="you/yours", licence="mit"),
    }
    values["Chain"] = chain = chainlora.load_chain(
        run, chainlora.load_model(str(model), torch.float32)[0]
    )
    values["Link"] = chain.links[0]
    values["Link.factors"] = chain.links[0].factors
    values["stack_links"] = chainlora.stack_links(chain.links)
    values["Chain.extend"] = chain.extend(values["LinkConfig"])
    values["Chain.live_state"] = chain.live_state()
    values["Chain.tie_share"] = chain.tie_share(0.3)
    return values


def test_every_public_class_is_shown_on_a_screen_and_loads_nothing(shown):
    classes = {name for name in chainlora.__all__ if inspect.isclass(getattr(chainlora, name))}
    assert classes <= shown.keys()
    for name, value in shown.items():
        text = repr(value)
        assert len(text) <= LINES * COLUMNS, (name, len(text))
        assert " object at 0x" not in text, name
    pages = {
        name: value._repr_html_() for name, value in shown.items() if hasattr(value, "_repr_html_")
    }
    tables = {"Chain", "TrainResult", "open_run", "stage_matrix", "inspect_run", "evaluate_task"}
    assert tables <= pages.keys()
    for name, page in pages.items():
        found: list[tuple[str, list]] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes, found=found: found.append(
            (tag, attributes)
        )
        parser.feed(page)
        assert {tag for tag, _ in found} <= {"table", "caption", "tr", "th", "td", "p", "b"}, name
        assert {key for _, attributes in found for key, _ in attributes} <= {"style"}, name
        assert "url(" not in page
        assert len(found) <= 8 * LINES, (name, len(found))
    assert "&lt;script&gt;" in pages["open_run"]
    assert "accuracy" in pages["TrainResult"]


def test_results_are_still_dictionaries(shown):
    """Shown in short, whole to whoever reads, writes or copies them."""
    for name in ("TrainResult", "inspect_run", "evaluate_task"):
        value = shown[name]
        assert json.loads(json.dumps(value)) == value
        assert isinstance(value, dict)
    assert len(shown["Link.factors"]) == 6 * 7
    assert len(Shown({"text": "x" * 10**6})._repr_html_()) < 1000
