"""`chainlora report`: every kind of run has a page, its numbers are those of the run's files, its
answers are those of `generate`, and it needs nothing but itself."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_folder, write_rows
from helpers import entry_of, records_of, settings, sign, stage_dir, stop_after, train_all
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import (
    Chain,
    LinkConfig,
    add,
    combine,
    export_adapter,
    make_config,
    save_chain,
    train,
)
from chainlora.config.staging import make_stages
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.training.stages import train_stages
from chainlora_pages import report_runs
from chainlora_pages.board.desk import Desk
from chainlora_pages.chain_charts import chain_pictures, stage_pictures
from chainlora_pages.charts import short
from chainlora_pages.page import render
from chainlora_pages.run_charts import training_pictures
from chainlora_pages.run_report import run_page
from chainlora_pages.runs import duration, read_runs, score_text


def table(page: str, title: str) -> list[list[str]]:
    """The rows of a page's table, heads first."""
    body = page.split(f'<caption class="hidden">{title}</caption>')[1].split("</table>")[0]
    rows = body.split("</tr>")[:-1]
    cells = [re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[html.unescape(cell) for cell in row] for row in cells]


def page_of(*runs: Path | str, output: Path | None = None, **keys) -> str:
    """Make the page of runs, by default without answers."""
    written = report_runs(runs, output, **{"prompts": 0} | keys)["output"]
    return Path(written).read_text(encoding="utf-8")


BRIEF = {"ranks": [2], "steps": [1]}


def said(page: str) -> list[list[str]]:
    """The answers to each prompt, in order, without what was expected."""
    articles = re.findall(r'<article class="answer">(.*?)</article>', page, flags=re.DOTALL)
    found = [re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", each, re.DOTALL) for each in articles]
    return [[html.unescape(t) for name, t in each if name != "expected"] for each in found]


def test_one_file_that_needs_nothing_else_with_the_numbers_of_the_files(
    chainlora, finished, tmp_path
):
    done = chainlora("report", finished, "--json", "--prompts", 0).json
    page = Path(done["output"])
    assert page == finished / "report.html"
    assert done["bytes"] == page.stat().st_size < 3e6
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'\b(?:src|href)="(?!#|data:)[^"]*"', text) == []
    assert "@import" not in text
    assert "default-src 'none'" in text
    for section in ("Overview", "Training", "Links", "Cost", "Config", "Versions"):
        assert f">{section}</h2>" in text
    assert "Answers" not in text
    assert (text.count("<figure"), text.count("<details><summary>Table: ")) == (9, 7)
    again = tmp_path / "again.html"
    words = ("report", finished, "--output", again, "--prompts", 0)
    assert chainlora(*words).out.startswith(f"{again} (")
    assert again.read_bytes() == page.read_bytes()  # the same run, the same bytes
    records = records_of(finished)
    heads, *rows = table(text, "Loss over the steps")
    assert heads == ["step", "each step", "smoothed", "validation"]
    steps = {str(r["step"]): r["loss"] for r in records if r["event"] == "step"}
    evals = {str(r["step"]): r["loss"] for r in records if r["event"] == "eval"}
    assert [row[0] for row in rows] == [str(step) for step in range(len(steps) + 1)]
    for step, loss, _, held_out in rows:  # four digits are shown
        assert loss == "–" if step == "0" else float(loss) == pytest.approx(steps[step], rel=1e-3)
        assert (held_out != "–") == (step in evals)
        assert held_out == "–" or float(held_out) == pytest.approx(evals[step], rel=1e-3)
    _, *layers = table(text, "Updates by layer")
    for link in range(3):
        folder = finished / "links" / entry_of(finished)["tied"][link]
        tensors = load_file(folder / "adapter_model.safetensors")
        keys = json.loads((folder / "adapter_config.json").read_text())
        scaling = keys["lora_alpha"] / keys["r"]
        for layer in range(2):
            total = 0.0
            for name in ("q_proj", "v_proj"):
                (key,) = [k for k in tensors if f"layers.{layer}." in k and f"{name}.lora_A" in k]
                b = tensors[key.replace("lora_A", "lora_B")]
                total += float(((scaling * b @ tensors[key]) ** 2).sum())
            assert float(layers[layer][1 + link]) == pytest.approx(np.sqrt(total), rel=1e-3)


def test_a_report_leads_with_the_table_that_the_board_shows_after_training(
    chainlora, finished, tmp_path
):
    shutil.copytree(finished, run := tmp_path / "run")
    done = chainlora("report", run)
    assert (done.status, done.err) == (0, "run: answers to trained rows (--prompts 0: none)\n")
    text = (run / "report.html").read_text(encoding="utf-8")
    heads, *rows = table(text, "Answers to rows of the data")
    assert heads == ["question", "expected", "got", "before"]
    desk = Desk(run)
    asked = desk.replies([desk.now.key, desk.before])
    assert [row[:2] for row in rows] == [[each.prompt, each.expected] for each in asked]
    right = sum(bool(each.answers[0].is_right) for each in asked)
    assert f"{right} of {len(asked)} right; before " in text
    assert text.index("Answers to rows") < text.index(">Overview</h2>")
    sign(run, lambda tree: tree["base"].update(model="nowhere"))
    done = chainlora("report", run)  # without the base it shows the rest
    assert done.status == 0
    assert "run: no answers to trained rows: " in done.err


def test_answers_after_each_link_are_those_of_generate(chainlora, finished, tmp_path):
    prompts = ["the cat sat", "<b>two</b> & red\u2028birds"]
    (tmp_path / "asked.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8-sig")
    write_rows(tmp_path / "asked.jsonl", [{"prompt": prompt} for prompt in prompts])
    pages = []
    for name in ("asked.txt", "asked.jsonl"):
        keys = ("--prompts", tmp_path / name, "--max-new-tokens", "5")
        outcome = chainlora("report", finished, "--output", tmp_path / "page.html", *keys)
        assert outcome.status == 0, outcome.err
        assert outcome.err.splitlines()[0] == "run: answers before training"
        pages.append((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert "&lt;b&gt;two&lt;/b&gt; &amp; red\u2028birds" in pages[0]
    assert "<b>two" not in pages[0]
    found = said(pages[0])
    for prompt, texts in zip(prompts, found, strict=True):
        for count, text in enumerate(texts):
            keys = ("--prompt", prompt, "--links", count, "--max-new-tokens", "5", "--json")
            whole = chainlora("generate", finished, *keys).json["text"]
            assert (text if text != "(nothing)" else "") == whole.partition("\n")[0].strip()
    assert [len(texts) for texts in found] == [4, 4]


def test_answers_to_a_run_s_own_rows(finished, sentiment, tmp_path):
    page = page_of(finished, output=tmp_path / "page.html", prompts=3, max_new_tokens=2)
    rows = [json.loads(line) for line in (sentiment / "validation.jsonl").read_text().splitlines()]
    asked = re.findall(r"Prompt: </span>(.*?)</p>", page)
    assert asked == [f"{row['text']} it was" for row in rows[:3]]
    expected = re.findall(r"<dt>expected</dt><dd>(.*?)</dd>", page)
    assert expected == [["bad", "good"][row["label"]] for row in rows[:3]]
    assert "link 2 changed " in page


def test_answers_to_the_rows_of_a_stage(tiny_folder, sentiment, tmp_path):
    """The one after it held out fewer of the same file."""
    rows = [{"prompt": f"cat {n} sat", "completion": " on a mat"} for n in range(12)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    counts = {"facts": 6, "style": 2}
    stages = [{"name": name, "data": {"validation": count}} for name, count in counts.items()]
    run = tmp_path / "run"
    train_all(settings(tiny_folder, sentiment, run, chain=BRIEF) | {"data": data, "stages": stages})
    page = page_of(f"{run}@facts", prompts="12", max_new_tokens=1)
    assert page.count("Prompt: </span>") == 6


def test_a_live_link_answers_too(tiny_folder, tmp_path):
    save_chain(own_chain(tiny_folder, with_live=True), tmp_path / "saved")
    (tmp_path / "asked.txt").write_text("the cat sat\n")
    page = page_of(tmp_path / "saved", prompts=tmp_path / "asked.txt", max_new_tokens=2)
    assert "<dt>after link 2</dt>" in page


def test_an_answer_of_a_chat_ends_with_its_turn(tmp_path):
    """The chat template's end of turn is not the end of sequence of a base model."""
    folder = make_tiny_folder(tmp_path / "model", initializer_range=0.5)
    asked = tmp_path / "asked.txt"
    asked.write_text("the cat sat\n")

    def answer(name):
        save_chain(own_chain(folder), tmp_path / name)
        return said(page_of(tmp_path / name, prompts=asked))[0][0]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = answer("saved")
    word = tokenizer.tokenize(whole)[3]
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = "{{ messages[-1].content }}" + word
    tokenizer.save_pretrained(folder)
    ended = answer("chat")
    assert 0 < len(ended) < len(whole)
    assert whole.startswith(ended)


def test_answers_end_as_the_task_of_a_run_says(tiny_folder, answers, tmp_path):
    task = Path(shutil.copytree(answers, tmp_path / "task")) / "task.yaml"
    train(settings(tiny_folder, task.parent, tmp_path / "run", chain=BRIEF))

    def answered():
        text = said(page_of(tmp_path / "run", prompts="1", max_new_tokens=5))[0][0]
        return text.partition("<")[0].strip()  # without whether it is right

    whole = answered()
    stop = whole[len(whole) // 2]
    task.write_text(f"{task.read_text()}stop: {json.dumps(stop)}\n")
    assert answered() == (whole.split(stop)[0].strip() or "(nothing)")


def own_chain(folder, *, with_live: bool = False) -> Chain:
    """A chain of two links, and of a live one."""
    chain = Chain(AutoModelForCausalLM.from_pretrained(folder), checkpoint=folder)
    for number in range(2 + with_live):
        chain.extend(LinkConfig(rank=2, alpha=4, target_modules=("q_proj",)))
        with torch.no_grad():
            for parameter in chain.parameters():
                parameter.add_(0.01)
        if number < 2:
            chain.tie()
    return chain


def test_every_kind_of_run_has_a_page(chainlora, tiny_folder, sentiment, tmp_path):
    kinds = {
        "none": {"ranks": [], "steps": []},
        "one": {"ranks": [2], "steps": [2], "target_modules": ["q_proj"]},
        "<i>named": {"ranks": [2, 2], "steps": [2, 2], "knots": {"every": 1, "share": 0.5}},
    }
    runs = []
    for name, chain in kinds.items():
        runs.append(tmp_path / name)
        train(settings(tiny_folder, sentiment, runs[-1], chain=chain))
    save_chain(own_chain(tiny_folder), tmp_path / "saved")
    runs.append(tmp_path / "saved")
    chainlora("report", runs[-1], "--prompts", "1").refused("no rows of its own")
    pages = {run.name: page_of(run) for run in runs[2:]}
    assert "<i>named" not in pages["<i>named"]
    assert "Overlap of the links" not in pages["saved"]  # one number, which the table has
    heads, *links = table(pages["saved"], "Each link")
    none, overlap = (row[heads.index("overlap with earlier links")] for row in links)
    assert none == "–"
    assert 0 <= float(overlap) <= 1
    assert ">Training</h2>" not in pages["saved"]
    together = page_of(*runs, output=tmp_path / "all.html")
    assert table(together, "The runs")[0] == ["", *kinds, "saved"]
    keys = [row[0] for row in table(together, "Keys that differ")]
    assert "chain.ranks" in keys
    assert "train.lr" not in keys


def test_a_run_of_stages_shows_what_each_did_to_every_other(tiny_folder, sentiment, tmp_path):
    run = tmp_path / "run"
    config = settings(tiny_folder, sentiment, run, chain=BRIEF)
    config["stages"] = [{"name": "facts"}, {"name": "style", "beside": False}]
    train_stages(make_stages(config))
    matrix = stage_matrix(run)
    page = page_of(run)
    heads, *rows = table(page, "Accuracy of every stage after each stage")
    assert heads == ["after", "facts", "style"]
    scores = [[short(cell.value) for cell in row] for row in matrix.grid]
    assert [row[1:] for row in rows] == scores
    assert [row[0] for row in rows] == ["base", "facts", "style"]
    assert "accuracy, higher is better" in page
    assert f"{matrix.summaries()[0]}." in html.unescape(page)
    links = table(page, "Each link")
    assert [row[1] for row in links] == ["stage", "facts", "style"]
    assert table(page, "Costs")[0][1:] == ["facts", "style"]
    (facts,) = read_runs([run])
    loss = training_pictures(facts.records)[0].svg
    assert re.findall(r">(link \d)<", loss) == ["link 0"]  # records count within the stage


def test_right_answers_come_first_and_a_colour_means_one_thing(finished):
    """The loss came first, validation was green or orange, and so were stages and links."""
    (run,) = read_runs([finished])
    scores, loss, rate = training_pictures(run.records)
    assert (scores.title, loss.title) == ("Validation scores over the steps", "Loss over the steps")

    def lines(picture) -> set[str]:
        return {*re.findall(r"stroke: var\(--(\w+)\)", picture.svg)} - {"soft", "grey", "grid"}

    validation, training = "vermilion", "blue"
    expected = [{validation}, {validation, training}, {training}]
    assert [lines(each) - {"ink"} for each in (scores, loss, rate)] == expected
    for picture in chain_pictures(run):
        used = {*re.findall(r"var\(--(\w+)\)", picture.svg)}
        assert not used & {validation, training}, picture.title
    page = page_of(finished)
    heads = table(page, "Each link")[0]
    assert heads.index("validation accuracy") < heads.index("training loss")
    folded = re.findall(r'<section id="(\w+)"[^>]*>\s*<h2[^>]*>\w+</h2>\s*<details>', page)
    assert folded == ["links", "config", "versions"]
    assert "‖ΔW‖" not in page.split('<section id="links"')[0]


def test_answers_of_a_chat_stand_below_what_was_said(tiny_folder, sentiment, tmp_path):
    """Not below the markup of the chat template, which the prompt has."""
    user, answer = {"role": "user", "content": "<cat>"}, {"role": "assistant", "content": "mat"}
    system = {"role": "system", "content": "be good"}
    prompts = [[user], [system, user], [user, answer, user], [system, user, answer, user]]
    rows = [{"prompt": prompt, "completion": [answer]} for prompt in prompts]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "task": None}
    run = tmp_path / "run"
    train(settings(tiny_folder, sentiment, run, chain=BRIEF, data=data | {"validation": None}))
    page = page_of(run, prompts="4", max_new_tokens=1)
    shown = re.findall(r"Prompt: </span>(.*?)</p>", page, flags=re.DOTALL)
    more = "user: <cat>\nassistant: mat\nuser: <cat>"
    expected = ["<cat>", "system: be good\nuser: <cat>", more, f"system: be good\n{more}"]
    assert sorted(map(html.unescape, shown)) == sorted(expected)


def test_a_run_that_was_stopped_says_so(tiny_folder, sentiment, tmp_path):
    run = tmp_path / "__run__ *1*"
    stop_after(make_config(settings(tiny_folder, sentiment, run, train={"save_every": 1})), 6)
    page = page_of(run)
    assert "/__run__ *1* is not finished" in page
    assert "1 of 3 links are tied" in page


def test_long_runs_stay_small(finished, tmp_path):
    """Two runs of 30 links and 60,000 steps: curves are drawn as means, which the table says."""
    (run,) = read_runs([finished])
    count, length = 30, 2_000
    records = [
        {"event": "step", "step": k + 1, "link": k // length, "loss": 3 - k / 30_000}
        | {"learning_rate": 1e-3, "tokens": 100, "seconds": 0.1}
        for k in range(count * length)
    ]
    ends = range(length, count * length + 1, length)
    records += [{"event": "knot", "step": end, "link": k} for k, end in enumerate(ends)]
    link = run.links[0] | {"modules": {f"model.layers.{k}.q_proj": 0.1 * k for k in range(48)}}
    links = [link | {"link": k, "overlap": [0.1] * k} for k in range(count)]
    inspection = dict(run.inspection) | {"links": links}
    long = [
        dataclasses.replace(run, name=name, records=records, inspection=inspection) for name in "ab"
    ]
    page = render(run_page(long, {}))
    assert len(page.encode()) < 3e6
    heads, *rows = table(page, "Loss over the steps")
    assert heads[1] == "mean of 150 steps"
    assert len(rows) <= 15 * count
    assert float(rows[0][1]) == pytest.approx(3 - 74.5 / 30_000, rel=1e-3)  # of the first 150


def test_names_are_text_whatever_is_in_them(finished, tmp_path):
    """matplotlib took `$…$` for mathematics and failed, and has no legend of `_…`; `#222222` was a
    colour."""
    runs = [tmp_path / "a$\\frac$", tmp_path / "#222222", tmp_path / "_c"]
    for run in runs:
        shutil.copytree(finished, run)
    page = page_of(*runs, output=tmp_path / "page.html")
    names = [f"{tmp_path.name}/{run.name}" for run in runs]
    assert table(page, "Training loss of each run")[0] == ["step", *names]
    assert all(page.count(f">{name}</text>") == 3 for name in names)


def test_several_runs_show_every_stage_of_a_combination(tiny_folder, sentiment, tmp_path):
    """It had 0 steps, 0 s, no scores and no curves beside other runs."""
    runs = [tmp_path / name for name in ("pair", "single", "alone")]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"the cat {n} sat"} for n in range(9)])
    for run, names in zip(runs, (["facts", "style"], ["facts"], ["main"]), strict=True):
        config = settings(tiny_folder, sentiment, run, chain={"ranks": [2], "steps": [3]})
        start = {"train": str(rows), "validation": 3} if run.name == "single" else "none"
        train_all(config | {"start_data": start, "stages": [{"name": name} for name in names]})
    combine(runs[1], ["facts"])
    page = page_of(runs[1], prompts=1, max_new_tokens=1)
    assert said(page)
    assert "is not scored yet" in page
    found = stage_matrix(runs[1])
    first, last = (
        score_text("accuracy", row[found.stages.index("facts")].value)
        for row in (found.grid[0], found.grid[-1])
    )
    alone = page_of(runs[1])
    assert f"The results were combined (facts: accuracy {last})." in alone
    assert f"{first} → {last}" in alone
    assert "is not scored yet" not in alone
    assert "torch" in dict(row[:2] for row in table(alone, "Versions"))
    page = page_of(*runs, output=tmp_path / "page.html")
    heads, *rows = table(page, "The runs")
    shown = {row[0]: row[1:] for row in rows}
    assert heads == ["", "pair", "single", "alone"]
    assert shown["steps"] == ["6", "3", "3"]
    stages = [stage_dir(runs[0], name) for name in ("facts", "style")]
    results = [json.loads((stage / "result.json").read_text()) for stage in stages]
    assert shown["time"][0] == duration(sum(result["wall_s"] for result in results))
    for name, result in zip(("facts", "style"), results, strict=True):
        score = score_text("accuracy", result["metrics"]["validation"]["accuracy"])
        assert shown[f"{name}: accuracy after"] == [score, "–", "–"]
        assert f"{name}: {shown[f'{name}: accuracy before'][0]} before, {score} after" in page
    parts = ["pair: facts", "pair: style", "single", "alone"]
    for title in ("Training loss of each run", "Validation accuracy of each run"):
        assert table(page, title)[0] == ["step", *parts]
    assert table(page, "Costs")[0] == ["", *parts]
    assert table(page, "Keys that differ")[0] == ["key", *parts]
    assert "only those of stage" not in page


def test_a_combination_says_which_scores_are_of_training_rows(tiny_folder, sentiment, tmp_path):
    """A stage without validation rows is scored on rows that it was trained on."""
    run = tmp_path / "run"
    config = settings(tiny_folder, sentiment, run, data={"validation": None}, chain=BRIEF)
    train_all(config | {"stages": [{"name": "facts"}, {"name": "style"}]})
    combine(run, ["facts", "style"])
    stage_matrix(run)
    page = page_of(run)
    assert "facts: accuracy on training rows" in page
    assert "style: accuracy on training rows" in page


def test_an_import_has_no_steps_and_no_time(tiny_folder, sentiment, tmp_path):
    runs = [tmp_path / "run", tmp_path / "other"]
    config = settings(tiny_folder, sentiment, runs[0], chain=BRIEF)
    train(config)
    export_adapter(runs[0], tmp_path / "adapter")
    for run in runs:
        keys = {} if run.exists() else {"model": str(tiny_folder)}
        add(run, tmp_path / "adapter", config["data"], name="law", **keys)
    page = page_of(*runs, output=tmp_path / "page.html")
    costs = {row[0]: row[1:] for row in table(page, "Costs")}
    assert costs[""] == ["run: main", "run: law", "other"]
    assert costs["steps"] == ["1", "–", "–"]
    assert costs["time"][1:] == ["–", "–"]
    assert {row[0]: row[1:] for row in table(page, "The runs")}["steps"] == ["1", "–"]
    assert table(page, "Training loss of each run")[0] == ["step", "run: main"]


def test_pairs_are_preferred_and_a_column_without_scores_is_not_drawn(tiny_folder, tmp_path):
    """The page called preferred pairs answers that are right, and had an empty column."""
    pairs = [{"prompt": f"the {n}", "chosen": " yes", "rejected": " no"} for n in range(6)]
    rows = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    general = [{"prompt": f"say {n}", "completion": " yes"} for n in range(4)]
    tree = {"model": str(tiny_folder), "output": str(tmp_path / "run"), "chain": BRIEF}
    tree |= {"data": {"train": rows, "validation": rows}, "train": {"loss": "dpo"}}
    start = {"train": str(write_rows(tmp_path / "general.jsonl", general))}
    train(tree | {"start_data": start}, progress=False)
    page = page_of(tmp_path / "run")
    assert "preferred the chosen answer on examples that it had not seen" in page
    assert "answered right" not in page
    (run,) = read_runs([tmp_path / "run"])
    (*_, picture) = stage_pictures(run)
    assert picture.svg.count(">main</text>") == 1  # a row, and no column


def test_the_best_point_that_a_run_loads_answers_too(configure, tmp_path):
    keys = {"keep_best": True, "eval_every": 1, "lr": 10.0}  # each step is worse
    config = configure("run", chain={"ranks": [2], "steps": [3]}, train=keys)
    train(config)
    (tmp_path / "asked.txt").write_text("the cat sat\n")
    page = page_of(config.output, prompts=tmp_path / "asked.txt", max_new_tokens=2)
    assert "<dt>after link 0</dt>" in page
    assert "<dt>now (the best point)</dt>" in page
