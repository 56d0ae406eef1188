"""Stages combined in closed form: the solution, exports, other runs, and what pruning leaves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_folder, write_rows
from helpers import sign, train_all, train_on
from helpers_stages import begin, config_of, section, train_beside
from peft import PeftModel
from transformers import AutoModelForCausalLM

import chainlora as public
from chainlora import export_adapter, load_run, train
from chainlora.chain.combining import Part
from chainlora.chain.link import stack_links
from chainlora.chain.solving import combine as solve
from chainlora.cli.main import run as cli
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation import combination
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log, undo
from chainlora.runs.inspection import inspect_run
from chainlora.runs.pruning import plan_pruning
from chainlora.training.stages import combine, prune
from chainlora_pages.run_report import run_page
from chainlora_pages.runs import read_state


def test_a_combination_is_that_of_its_parts(abc):
    """What a run keeps is what the solver gives for the stages' links and the rows they kept."""
    parts = []
    for name in sorted("abc", key=lambda name: open_run(f"{abc}@{name}").state.digest):
        found = open_run(f"{abc}@{name}")
        rows = [[*row.sequences[row.label or 0]] for row in found.kept()[name].train]
        parts.append(Part(name, rows, stack_links(found.links())))
    solved = solve(load_run(f"{abc}@base")[0], parts, 16)
    (link,) = open_run(abc).links()
    assert (link.rank, link.error) == (16, solved.error)
    for module, factors in solved.factors.items():
        assert torch.equal(link.delta_weight(module), factors.b @ factors.a)
    assert open_run(abc).entry.distances == pytest.approx(solved.distances)
    assert all(0 < away < 1 for away in solved.distances.values())


def test_its_rank_is_the_sum_of_the_ranks_in_it(tiny_folder, sentiment, tmp_path):
    """A link below two of its parts counts once."""
    run = begin(tiny_folder, sentiment, tmp_path / "run")
    for name, ranks in (("b", [9]), ("c", [4, 5])):
        keys = {"ranks": ranks, "steps": [1] * len(ranks)}
        train_on(f"{run}@a", section(sentiment, name, **keys))
    assert combine(run, ["b", "c"]).facts[0].rank == 2 + 9 + 4 + 5


def test_a_rank_and_an_importance_are_chosen(abc, chainlora):
    """They stay when a stage is added or pruned, and are gone when it is combined anew."""
    found = chainlora(f"combine {abc} b a=3 c --rank 2 --no-scores --verbose")
    assert re.search(r"rank 2, error of the rank 0\.\d\d; distance to . 0\.\d\d", found.err)
    weighed = open_run(abc)
    assert weighed.facts[0].rank == 2
    assert weighed.entry.how.importance == {"a": 3}
    even = combine(abc, rank=2)
    assert weighed.entry.distances["a"] < even.entry.distances["a"]
    undo(abc)
    prune(abc, "b")
    assert open_run(abc).entry.how == weighed.entry.how
    assert open_run(abc).facts[0].rank == 2
    assert not combine(abc).entry.how.importance
    with pytest.raises(RunError, match="importance is given to parts, a, c "):
        combine(abc, importance={"b": 2})
    with pytest.raises(RunError, match="got 'start'"):  # no rows of the origin are combined
        combine(abc, importance={"start": 2})
    chainlora(f"combine {abc} a=-1 c").refused("an importance is a number above 0 (got -1 for a)")


def test_an_importance_is_that_of_the_part_which_is_named(abc, tiny_folder, sentiment, tmp_path):
    """Another run may have stages of the same names; its own name weights all of them."""
    other = str(tmp_path / "other")
    config = config_of(tiny_folder, sentiment, tmp_path / "other", section(sentiment, "d"))
    config["stages"][0]["chain"]["steps"] = [2]
    train_all(config)
    for given, found in (
        ({"a": 5}, {"a": 5}),
        ({other: 3, "a": 5}, {"a": 5, "other": 3, "d": 3}),
        ({"d": 2}, {"d": 2}),
        ({other: 4}, {"other": 4, "d": 4}),  # also if its stages are known already
    ):
        state = combine(abc, ["a", "b", other], importance=given)
        assert state.entry.parents == ("a", "b", "other", "d")
        assert state.entry.how.importance == found


def test_stages_are_shown_and_counted_in_the_order_in_which_they_were_added(
    abc, ac, sentiment, chainlora, tmp_path
):
    """A combination has the same sums whatever that order is; b came last here."""
    train_beside(sentiment, ac, "b")
    assert open_run(ac).state.digest == open_run(abc).state.digest
    order = ["a", "c", "b"]
    assert open_run(ac).stages == order
    assert [row["stage"] for row in inspect_run(ac)["links"]] == ["combined"]
    assert stage_matrix(ac, compute=False).stages == order
    assert stage_matrix(ac, compute=False).states[1:4] == order
    assert log(ac)[0]["parents"] == order
    assert "now after-b, of a, c, b; nothing" in chainlora(f"undo {ac} --to after-b").out
    export_adapter(ac, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8").partition("## Lineage")[2]
    assert re.findall(r"^\| `(\w)` \|", card, flags=re.MULTILINE) == order


def test_a_combined_run_is_one_adapter(abc, tiny_folder, tmp_path):
    """Loaded, merged, and by plain PEFT: to rounding of float32."""
    model, tokenizer = load_run(abc)
    own = logits(model, tokenizer)
    export_adapter(abc, tmp_path / "out")
    assert "were trained" not in (tmp_path / "out/README.md").read_text()  # of no links of its own
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = logits(base, tokenizer)
    peft = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(peft, tokenizer), own, rtol=1e-4, atol=1e-5)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokenizer), own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, own, rtol=1e-2, atol=1e-3)
    states = stage_matrix(abc, compute=False).states
    assert states == ["base", "a", "b", "c", open_run(abc).entry.key]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model(**tokenizer("a fine film", return_tensors="pt")).logits.detach()


def test_a_report_says_what_was_trained_apart(abc):
    """It said that one model was trained on one data set after the other."""
    leads = [run_page([read_state(open_run(run), "run")], {}).lead for run in (abc, f"{abc}@a")]
    assert re.findall(r"\w+,? it was trained on \w+|The results were combined", leads[0]) == [
        "Separately, it was trained on b",
        "Separately, it was trained on c",
        "The results were combined",
    ]
    assert leads[1].count("trained on") == 1


# --- other runs ---


def test_runs_of_one_base_are_combined(tiny_folder, sentiment, ac, tmp_path):
    other = begin(tiny_folder, sentiment, tmp_path / "other")  # its stage is called a, too
    before = checksums(ac)
    found = combine(ac, [other], output=tmp_path / "both")
    assert {**checksums(ac), ".lock": 0} == {**before, ".lock": 0}
    assert found.entry.parents == ("a", "c")  # the same stage, trained twice, is there once
    assert found.state == open_run(ac).state
    train_on(other, section(sentiment, "d"))
    found = combine(ac, [other])
    assert found.entry.parents == ("c", "d")  # not a, which is in d
    assert open_run(f"{ac}@d").lineage[0].key == "a"


def test_a_run_of_an_exported_adapter_has_the_tokenizer_of_its_base(sentiment, ac, tmp_path):
    export_adapter(f"{ac}@a", tmp_path / "adapter")
    keys = {"name": "b", "model": open_run(ac).base.model}
    public.add(tmp_path / "law", tmp_path / "adapter", section(sentiment, "b")["data"], **keys)
    assert combine(ac, [tmp_path / "law"]).entry.parents == ("a", "c", "b")


def test_a_stage_of_another_run_gets_its_folder_as_a_name(tiny_folder, sentiment, ac, tmp_path):
    tree = config_of(tiny_folder, sentiment, tmp_path / "law")
    train_all(tree | {"stages": [section(sentiment, "a", steps=[2])]})
    found = combine(ac, str(tmp_path / "law"))  # one name alone
    assert found.entry.parents == ("a", "c", "law")
    assert found.stages == ["a", "c", "law"]
    assert open_run(f"{ac}@law").config().output == str(tmp_path / "law")


def test_a_run_that_is_taken_in_changes_nothing_that_is_there(tiny_folder, sentiment, ac, tmp_path):
    """Not the files of rows that both have."""
    other = begin(tiny_folder, sentiment, tmp_path / "2024-other")
    train_on(other, section(sentiment, "d", steps=[2]))
    train_on(ac, section(sentiment, "d", steps=[4]))
    rows = {path: path.stat().st_ino for path in (ac / "rows").iterdir()}
    own = checksums(ac / "stages/d")
    found = combine(ac, [other])
    assert found.entry.parents == ("d", "d-2")  # its folder's name is none that a stage can have
    assert {path: path.stat().st_ino for path in rows} == rows
    assert checksums(ac / "stages/d") == own


def test_general_rows_of_another_run_are_none_of_its_stages(sentiment, ac, tiny_folder, tmp_path):
    """They are those of the base: a stage's own model was fitted to them, too."""
    for name, rows in (("with", {"train": str(sentiment / "train.jsonl")}), ("without", "none")):
        tree = config_of(tiny_folder, sentiment, tmp_path / name)
        rows = rows if rows == "none" else rows | {"task": str(sentiment / "task.yaml")}
        train_all(tree | {"start_data": rows, "stages": [section(sentiment, "d", steps=[1])]})
    digests = [
        combine(ac, ["a", tmp_path / name], output=tmp_path / f"of-{name}").state.digest
        for name in ("with", "without")
    ]
    assert digests[0] == digests[1]


def test_rows_of_what_another_run_began_on_stay_its_own(tiny_folder, sentiment, ac, tmp_path):
    tree = config_of(tiny_folder, sentiment, tmp_path / "law")
    rows = {"task": str(sentiment / "task.yaml"), "validation": str(sentiment / "validation.jsonl")}
    train_all(tree | {"start_data": rows, "stages": [section(sentiment, "d", steps=[1])]})
    combine(ac, [tmp_path / "law"])
    assert open_run(ac).history.find("start") is None
    assert "start" not in open_run(ac).columns


# --- a pruned stage is as if it had never been there ---


def test_a_pruned_stage_leaves_no_trace(abc, ac, capsys):
    """Combine, score; prune; again: all is as in a run that never had it."""
    (file,) = open_run(f"{abc}@b").config().data.train_files
    for run in (abc, ac):
        stage_matrix(run)
    names = set(plan_pruning(abc, "b").with_it)
    assert cli(["prune", str(abc), "b"]) == 1
    said = capsys.readouterr().out
    assert "would combine the others again: a, c" in said
    assert {"after-b", "after-c"} <= names  # of a b, and a b c
    gone = open_run(f"{abc}@b")
    assert cli(["prune", str(abc), "b", "--yes"]) == 0
    for run in (abc, ac):
        combine(run)
        stage_matrix(run)
    one, two = open_run(abc), open_run(ac)
    assert one.state == two.state
    folders = ("links", "rows")
    files = [
        {n: d for n, d in checksums(run).items() if n.startswith(folders)} for run in (abc, ac)
    ]
    assert files[0] == files[1]
    assert scores(abc) == scores(ac)
    assert [e["name"] for e in log(abc)] == [e["name"] for e in log(ac)]
    words = ["b", gone.state.digest, *gone.state.links, gone.entry.kept]
    for path in abc.rglob("*"):
        assert path.name not in words
        data = path.read_bytes() if path.suffix in (".json", ".jsonl", ".yaml") else b""
        assert not [word for word in words if f'"{word}"'.encode() in data], path
        assert path.is_dir() or Path(file.path).name.encode() not in path.read_bytes(), path


def scores(run: Path) -> dict[tuple[str, str], str]:
    lines = map(json.loads, (run / "matrix.jsonl").read_text().splitlines())
    return {(cell["state"], cell["stage"]): cell["value"] for cell in lines}


def test_a_combination_goes_with_any_stage_that_it_was_computed_from(abc, sentiment):
    """With one whose rows were not kept, and links under another stage, too."""
    stage = section(sentiment, "bare")
    stage["data"]["keep_rows"] = False
    train_on(f"{abc}@start", stage)
    on_top = section(sentiment, "d")
    on_top["data"]["keep_rows"] = True
    train_on(f"{abc}@bare", on_top)
    found = combine(abc, ["a", "d"]).entry.key
    with pytest.raises(RunError, match=f"Cannot prune {found}: .*the current state"):
        prune(abc, found)
    assert found in plan_pruning(abc, "bare").with_it
    with pytest.raises(RunError, match=r"Cannot prune: .* reads kept rows .got none of bare"):
        plan_pruning(abc, "d")  # a and bare would be combined again
    (link,) = open_run(abc).state.links
    prune(abc, "bare")
    assert not (abc / "links" / link).exists()


def test_a_fork_becomes_the_stage_that_was_beside_a_pruned_one(abc, sentiment, tmp_path):
    """Combined with what the fork began with."""
    fork = tmp_path / "fork"
    train_on(f"{abc}@a", section(sentiment, "d") | {"output": str(fork)})
    train_beside(sentiment, fork, "b")
    plan = prune(fork, "d")
    assert (plan.left, open_run(fork).stages) == (["a", "b"], ["a", "b"])


# --- what is refused ---


def test_what_cannot_be_combined(abc, tiny_folder, sentiment, tmp_path):
    stage = section(sentiment, "d")
    stage["data"]["keep_rows"] = False
    train_on(f"{abc}@start", stage)
    train_on(f"{abc}@a", section(sentiment, "c2"))
    base = make_tiny_folder(tmp_path / "base", num_hidden_layers=1)
    others = {name: tmp_path / name for name in ("other", "chats", "halves", "nf4")}
    config = config_of(tiny_folder, sentiment, others["chats"])
    train_all(config | {"model": str(base), "output": str(others["other"])})
    train_all(config | {"data": {"chat_template": "zephyr"}})
    half = {"train": config["train"] | {"dtype": "bfloat16"}}
    train_all(config | half | {"output": str(others["halves"])})
    shutil.copytree(others["halves"], others["nf4"])
    as_nf4 = {"dtype": "float32", "quantize": "nf4"}
    sign(others["nf4"], lambda tree: tree["base"].update(as_nf4))
    rule = "must share their base, its precision and the chat template (got another"
    for names, said in (
        (["a"], "a combination needs two parts or more"),
        (["a", "a"], "a combination needs two parts or more"),
        (["a", "nothing"], "a stage of RUN, or another run"),
        (["a", "d"], "reads kept rows of its parts"),
        (["a", "c2"], "with one that was trained on it (got"),
        ([others["other"]], f"{rule} base"),
        ([others["chats"]], f"{rule} data.chat_template in"),
        ([others["halves"]], f"{rule} train.dtype in"),
        ([others["nf4"]], f"{rule} quantize in"),
    ):
        with pytest.raises(RunError, match=re.escape(said)):
            combine(abc, names, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"rank of a combination must be above 0 \(got 0\)"):
        combine(abc, ["a", "b"], rank=0)
    with pytest.raises(ConfigError, match="must lie outside other runs"):
        combine(abc, output=abc / "out")
    assert open_run(abc).entry.parents == ("b", "c", "d", "c2")


def test_a_combination_reads_64_of_the_kept_rows_of_few_tokens(tiny_folder, tmp_path, monkeypatch):
    rows = [{"prompt": f"the {n}", "completion": " yes"} for n in range(100)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    tree = {"model": str(tiny_folder), "output": str(tmp_path / "run"), "data": data}
    tree |= {"chain": {"ranks": [1], "steps": [1]}, "start_data": "none"}
    train(tree, progress=False)
    (kept,) = open_run(tmp_path / "run").kept().values()
    read = list(combination._sample(kept, is_start=False))
    assert len({*map(tuple, read)}) == 64
    monkeypatch.setattr(combination, "TOKENS", sum(map(len, read[:5])) + 1)
    assert list(combination._sample(kept, is_start=False)) == read[:5]
