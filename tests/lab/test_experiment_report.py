"""Reports: what tables, verdicts, labels and figures say of results."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from pages.test_report import table

from chainlora_lab import read_results, report_experiment
from chainlora_lab.report.values import difference_curves
from lab.cases import change, with_curve, write_lines


def told(folder, change_line, **head) -> str:
    """What a report says of made results after a change of each line."""
    path = change(folder / "results.jsonl", change_line, **head)
    return report_experiment(path, figures=False).markdown


def test_a_report_comes_from_the_results_file_alone(tmp_path):
    path = write_lines(tmp_path / "results.jsonl")
    report = report_experiment(path)
    lead = "chain3 is better than lora over all tasks: score +2.05 (above 0 is better; "
    assert lead in report.markdown
    assert "by task: 2 too few pairs; ahead on 2 of 2" in report.markdown
    wins = {comparison.task: comparison.difference.verdict for comparison in report.comparisons}
    few = "too few pairs"  # 2 / 2^6, twice: 0.0625
    assert wins == {"wsc": few, "cb": few, "all tasks": "wins"}
    assert "| majority class | 63.50 | 63.50 |" in report.markdown
    assert "| lora | 62.50 ± 1.87 (6) |" in report.markdown
    names = {file.name for file in report.files}
    assert {"report.md", "scores.csv", "differences.csv", "scores.tex", "differences.tex"} <= names
    assert {
        f"{name}.{kind}" for name in ("scores", "differences") for kind in ("png", "svg")
    } < names
    assert all(file.stat().st_size > 0 for file in report.files)
    assert r"$\pm$" in (tmp_path / "scores.tex").read_text()
    before = {file: file.read_bytes() for file in report.files}
    again = report_experiment(path)
    assert {file: file.read_bytes() for file in again.files} == before  # same results, same bytes


def test_a_model_may_lie_in_a_long_path(tmp_path):
    """Of a path above 200 characters, no results could be read: neither reported nor resumed."""
    model = "/models" * 40
    lines = told(tmp_path, lambda c: c | {"config": c["config"] | {"model": model}}, model=model)
    assert f"Model: {model}." in lines


def test_over_all_tasks_each_task_weighs_alike(tmp_path):
    """Ten seeds of a task where the chain gains 10 points and two of one where it gains none: 5,
    not 8.3."""

    def scored(cell):
        if cell["task"] == "cb" and cell["seed"] > 1:
            return None
        gain = 0.1 if cell["task"] == "wsc" and cell["method"] == "chain3" else 0.0
        return cell | {"score": 0.5 + gain}

    report = report_experiment(change(tmp_path / "results.jsonl", scored), figures=False)
    whole = next(each.difference for each in report.comparisons if each.task == "all tasks")
    assert whole.mean == pytest.approx(5.0)
    assert whole.num_pairs == 4


@pytest.mark.parametrize(("metric", "is_pooled"), [("loss", True), ("perplexity", False)])
def test_losses_are_not_pooled_with_perplexities(tmp_path, metric, is_pooled):
    def measured(cell):
        return cell | {"metric": "loss" if cell["task"] == "wsc" else metric}

    path = change(tmp_path / "results.jsonl", measured)
    report = report_experiment(path, figures=False)
    assert ("all tasks" in {each.task for each in report.comparisons}) == is_pooled


# --- methods ---


def test_methods_are_shown_by_the_keys_of_their_configs_and_not_by_their_names(tmp_path):
    """`chain4_r1_restart` was described by its preset: three links."""
    chain = {"ranks": [1] * 4, "steps": [40, 39, 38, 37], "alpha": 2.0, "knots": {"every": 3}}
    train = {"lr": 1e-3, "restart_schedule": True, "some_new_key": "1|2"}

    def restarted(cell):
        if cell["method"] != "chain3":
            return cell
        config = {"chain": chain, "train": train, "loop": "full"}
        return cell | {"ranks": [1] * 4, "config": config}

    methods = {"lora": "One.", "chain3": "preset `chain3`", "rac_lora": "preset `rac_lora`"}
    text = told(tmp_path, restarted, methods=methods)
    assert "- **rac_lora**: preset `rac_lora`.\n" in text  # it has no cell yet
    table = text.partition("### Keys of the methods\n\n")[2]
    heads = ("chain.ranks", "chain.steps", "chain.alpha", "loop", "chain.knots", "train.lr")
    heads += ("train.restart_schedule", "train.some_new_key")
    assert table.startswith(f"| method | {' | '.join(heads)} |")
    assert "| lora | 8 | 10 | – | – | – | – | – | – |\n" in table
    assert (
        "| chain3 | 4 × 1 | 40, 39, 38, 37 | 2 | full | every 3 | 0.001 | true | 1\\|2 |\n" in table
    )


def test_methods_that_ran_on_different_machines_are_named(tmp_path):
    def on_two(cell):
        kernels = "AVX2" if cell["method"] == "lora" else "AVX512"
        hardware = {"device": "cpu", "machine": "x86_64", "threads": 1, "cpu_capability": kernels}
        return cell | {"hardware": hardware, "commit": kernels, "versions": {"torch": "2.9"}}

    assert "across machines" not in told(tmp_path, lambda cell: cell, tasks=["wsc"])
    where = "chain3 on x86_64 CPU, AVX512, threads 1, lora on x86_64 CPU, AVX2, threads 1"
    text = told(tmp_path, on_two, tasks=["wsc"])
    assert f"**Compared across machines or kernels**: wsc: {where}. Their" in text
    commits = "chain3 on commit AVX512, lora on commit AVX2"
    assert f"**Compared across versions**: wsc: {commits}. One config" in text


# --- what may be concluded ---


def diverged(cell):
    return {k: v for k, v in cell.items() if k not in ("test", "score")} | {"status": "diverged"}


@pytest.mark.parametrize(
    ("made", "tasks", "said"),
    [
        (
            lambda c: diverged(c) if c["method"] == "chain3" and c["seed"] > 3 else c,
            ["wsc"],
            "4 of 6 pairs (2 diverged), exact p",
        ),
        (lambda c: c if c["seed"] < 5 else None, ["wsc"], "| wsc | chain3 − lora | 5 of 6 |"),
        (lambda c: c if c["seed"] < 5 else None, ["wsc", "cb"], ", 10 of 12 pairs, exact p"),
        (
            lambda c: c if c["task"] == "wsc" else None,
            ["wsc", "cb"],
            "- too few pairs to compare chain3 with lora on wsc",
        ),
        # an infinite loss has no mean
        (
            lambda c: c | {"test": {"loss": math.inf}} if c["seed"] == 2 else c,
            ["wsc"],
            "| wsc | chain3 − lora | 5 of 6 | −0.0200 |",
        ),
    ],
    ids=["diverged", "missing", "of all tasks", "a task is missing", "infinite"],
)
def test_pairs_that_are_missing_are_said_where_the_others_decide(tmp_path, made, tasks, said):
    """Six seeds of nine were "6 pairs", and one task of two "over all tasks"."""
    text = told(tmp_path, made, tasks=tasks)
    assert said in text
    assert ("over all tasks:" in text) == ("of 12" in said)
    assert ("| chain3 | 63.55 ± 1.32 (4 of 6) |" in text) == ("diverged" in said)


def test_a_method_that_diverged_wherever_it_was_tried_is_not_one_to_come(tmp_path):
    path = change(tmp_path / "results.jsonl", lambda c: c if c["method"] == "lora" else None)
    tried = [{"point": {"train.lr": 1.0}, "mean": None, "runs": 1}]
    choice = {"format": 2, "kind": "choice", "task": "wsc", "method": "chain3", "chosen": None}
    path.write_text(path.read_text() + json.dumps(choice | {"metric": "f1", "tried": tried}) + "\n")
    text = report_experiment(path, figures=False).markdown
    assert "**Diverged** (1): wsc chain3 wherever tried." in text
    assert "wsc chain3: seeds" not in text
    assert "cb chain3: seeds" in text


def test_the_primary_comparison_is_tested_alone(tmp_path):
    head = {"pairs": [["chain3", "lora"], ["zero_shot", "lora"]], "tasks": ["wsc"]}
    by_pair = {}
    for primary in (None, ["chain3", "lora"]):
        path = write_lines(tmp_path / "results.jsonl", primary=primary, **head)
        report = report_experiment(path, figures=False)
        by_pair[primary is None] = {c.method: c for c in report.comparisons}
    together, alone = by_pair[True]["chain3"], by_pair[False]["chain3"]
    assert (together.difference.p_holm, together.is_primary) == (2 * 2 / 2**6, False)
    assert (alone.difference.p_holm, alone.is_primary) == (2 / 2**6, True)
    assert (together.difference.verdict, alone.difference.verdict) == ("too few pairs", "wins")
    assert by_pair[False]["zero_shot"].num_comparisons == 1
    assert "- Primary comparison: chain3 is better than lora on wsc" in report.markdown
    assert report.markdown.count("chain3 − lora *") == 1  # the held-out loss is another question


@pytest.mark.parametrize(
    ("ahead", "num_seeds", "said"),
    [
        (
            0.1,
            6,
            "**Rank 1 is the bottleneck on wsc**: rank 4 is 0.100 ahead. Raise the rank if you "
            "can. If you cannot, soft knots (`chain.knots: auto`) may win about 39% of that with "
            "88.0 learned tokens per trained parameter. They break even near 11",
        ),
        (0.0, 6, "Rank 1 was not found to be the bottleneck on wsc"),
        (0.1, 3, "Too few pairs to say whether rank 1 is the bottleneck on wsc."),
    ],
)
def test_a_report_says_whether_rank_binds_and_what_soft_knots_may_then_win(
    tmp_path, ahead, num_seeds, said
):
    """88 tokens a parameter are 2³ times what breaks even: 3 · 0.13 of the gap."""

    def wider(cell):
        is_wide = cell["method"] == "chain3"
        loss = 0.5 - is_wide * (ahead + 0.001 * cell["seed"] - 0.0025)
        ranks = [4 if is_wide else 1] if cell["ranks"] else []
        return cell | {"ranks": ranks, "scored_tokens": 88 * 64, "test": {"loss": loss}}

    assert said in told(tmp_path, wider, tasks=["wsc"], seeds=list(range(num_seeds)))


def test_too_few_pairs_are_not_no_difference(tmp_path):
    def noisy(cell):
        swing = 0.05 * (-1) ** cell["seed"] * (cell["method"] == "chain3")
        return cell | {"score": 0.6 + 0.01 * cell["seed"] + swing}

    many, few = (told(tmp_path, noisy, tasks=["wsc"], seeds=[*range(n)]) for n in (6, 3))
    assert "no difference found between chain3 and lora on wsc: accuracy +0.00 (above" in many
    assert "would be found with 80 % power" in many
    assert "3 pairs: no interval and no verdict from so few" in few
    row = "| wsc | chain3 − lora | 3 | +1.67 | above 0 | 5.77 | – | 1 | 1 | 0.25 | ∞ | too few"
    assert row in few


# --- curves ---


def test_a_difference_is_this_less_that_and_says_which_sign_is_better(chainlora, tmp_path):
    """Losses of 5.7836 and 5.9915 were shown as "chain3 − lora: −0.2079"."""
    losses = {"lora": 5.7836, "chain3": 5.9915}

    def as_loss(cell):
        if cell["method"] not in losses:
            return None
        score = losses[cell["method"]]
        return cell | {"metric": "loss", "score": score, "test": {"loss": score}}

    head = {"tasks": ["wsc"], "paper": None, "figures": ["differences", "curves"]}
    path = change(
        tmp_path / "results.jsonl", lambda c: (made := as_loss(c)) and with_curve(made), **head
    )
    found = chainlora("experiment", "report", path, "--json").json["differences"]
    (difference,) = found
    assert difference["mean"] == pytest.approx(0.2079)
    assert (difference["better"], difference["verdict"]) == ("below 0 is better", "loses")
    text = (tmp_path / "report.md").read_text()
    assert "chain3 is worse than lora on wsc: loss +0.2079 (below 0 is better; " in text
    assert "| wsc | chain3 − lora | 6 | +0.2079 | below 0 |" in text
    (row,) = csv.DictReader((tmp_path / "differences.csv").open())
    assert float(row["mean"]) > 0
    page = (tmp_path / "report.html").read_text()
    assert "below 0 is better; 95 % intervals" in page
    (curve,) = difference_curves(read_results(path), "wsc")
    assert curve.points[10][0] < 0  # this curve's losses fall faster for chain3


def test_the_page_of_an_experiment(tmp_path):
    figures = ["scores", "differences", "curves"]
    report_experiment(change(tmp_path / "results.jsonl", with_curve, figures=figures))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<p class="lead">chain3 is better than lora over all tasks: score +2.05 ' in page
    _, *rows = table(page, "Scores: wsc")
    assert rows[0][:2] == ["lora", "60.00, 61.00, 62.00, 63.00, 64.00, 65.00"]
    heads, *rows = table(page, "Means, with 95 % intervals where seeds allow one")
    assert heads == ["step", "lora (n=6)", "chain3 (n=6)"]
    assert [row[0] for row in rows] == ["0", "2", "4", "6", "8", "10"]
    assert re.fullmatch(r"2\.0250 \(2\.0\d+ to 2\.0\d+\)", rows[0][1])
    for title in ("Scores", "Paired differences in score", "Cost"):
        assert table(page, title), title


def test_names_of_methods_are_text_whatever_is_in_them(tmp_path):
    """matplotlib took `$…$` for mathematics and failed."""
    methods = {"lora": "One.", "chain3": "Three.", "zero_shot": "$\\frac$", "$\\x$": "New."}
    results = change(tmp_path / "results.jsonl", with_curve, methods=methods, tasks=["wsc"])
    text = results.read_text().replace('"zero_shot"', '"$\\\\frac$"')
    results.write_text(text)
    report_experiment(results)
    assert r"\$\textbackslash{}frac\$ & 50.00 (1) \\" in (tmp_path / "scores.tex").read_text()
