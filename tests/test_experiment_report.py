"""Reports: what tables, verdicts, labels and figures say of results."""

from __future__ import annotations

import csv
import json

import pytest
from experiment_cases import change, lines, sealed_line, write_lines

from chainlora.experiments import report_experiment


def test_a_report_comes_from_the_results_file_alone(tmp_path):
    path = write_lines(tmp_path / "results.jsonl")
    report = report_experiment(path)
    assert "chain3 is better than lora over all tasks: +2.05" in report.markdown
    assert "by task: 2 too few pairs; ahead on 2 of 2" in report.markdown
    wins = {comparison.task: comparison.difference.verdict for comparison in report.comparisons}
    few = "too few pairs"  # 2 / 2^6, twice: 0.0625
    assert wins == {"wsc": few, "cb": few, "all tasks": "wins"}
    assert "| majority class | 63.50 | 63.50 |" in report.markdown
    assert "| paper: chain3 (OPT-1.3B) | 60.19 | 76.42 |" in report.markdown
    assert "| lora | 62.50 ± 1.87 (6) |" in report.markdown
    names = {file.name for file in report.files}
    assert {"report.md", "scores.csv", "differences.csv", "scores.tex", "differences.tex"} <= names
    figures = {
        f"{name}.{suffix}"
        for name in ("scores", "differences", "chain_length", "rank_step_down")
        for suffix in ("png", "svg")
    }
    assert figures <= names
    assert all(file.stat().st_size > 0 for file in report.files)
    assert r"$\pm$" in (tmp_path / "scores.tex").read_text()
    before = {file: file.read_bytes() for file in report.files}
    again = report_experiment(path)
    assert {file: file.read_bytes() for file in again.files} == before  # same results, same bytes


def test_operations_saved_stand_beside_the_paper_s(tmp_path):
    methods = {"lora": "One.", "chain_8_8": "Two.", "chain_8_4": "Down."}
    head, *cells = lines(paper="table3", tasks=["cb"], methods=methods, pairs=[], figures=[])
    cells = [cell for cell in cells if cell["task"] == "cb" and cell["method"] == "lora"]
    named = [
        cell | {"method": m, "flops_6nd": cost}
        for m, cost in (("chain_8_8", 3e12), ("chain_8_4", 2e12))
        for cell in cells
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(sealed_line(line)) + "\n" for line in [head, *named]))
    assert (
        "| cb chain_8_4 | 1.00e+12 | 7.20e+11 | 0.000% |"
        in report_experiment(path, figures=False).markdown
    )


def test_losses_are_told_apart_to_four_digits(tmp_path):
    def as_loss(cell):
        score = 0.72 + 0.001 * cell["seed"] - (0.0048 if cell["method"] == "chain3" else 0)
        return cell | {
            "metric": "loss",
            "score": score,
            "test": {"loss": score},
            "validation": {"loss": score},
        }

    path = change(
        tmp_path / "results.jsonl", as_loss, paper=None, figures=["scores", "differences"]
    )
    text = report_experiment(path).markdown
    assert (
        "chain3 is better than lora over all tasks: +0.0048 (95 % interval +0.0048 to +0.0048"
        in text
    )
    assert "| wsc | chain3 − lora | 6 | +0.0048 | 0.0000 | +0.0048 to +0.0048 |" in text
    assert "| lora | 0.7225 ± 0.0019 (6) |" in text


def test_a_choice_at_an_end_of_its_grid_is_marked(tmp_path):
    def choice(method, chosen, **point):
        tried = [
            {"point": {"train.lr": rate} | point, "mean": 0.5, "runs": 1}
            for rate in (1e-3, 2e-3, 4e-3)
        ]
        return {
            "format": 1,
            "kind": "choice",
            "task": "wsc",
            "method": method,
            "metric": "loss",
            "chosen": {"train.lr": chosen} | point,
            "tried": tried,
        }

    path = write_lines(tmp_path / "results.jsonl")
    note = "the chosen value is an end of its grid"
    assert note not in report_experiment(path, figures=False).markdown
    with path.open("a", encoding="utf-8") as file:
        for made in (
            choice("lora", 2e-3),
            choice("chain3", 1e-3, **{"chain.init": "gradient", "chain.seed": 7}),
        ):
            print(json.dumps(made), file=file)
    text = report_experiment(path, figures=False).markdown
    assert "| wsc lora | lr 0.002 | loss |" in text
    assert "| wsc chain3 | lr 0.001, init gradient, seed 7 (lowest tried) | loss |" in text
    assert note in text


def test_two_methods_that_train_nothing_are_one_pair(tmp_path):
    """One run each, whatever the number of seeds: nothing to test."""
    path = change(
        tmp_path / "results.jsonl",
        lambda cell: (
            cell | {"ranks": []} if cell["method"] != "chain3" and not cell["seed"] else None
        ),
        pairs=[["lora", "zero_shot"]],
        tasks=["wsc"],
    )
    (found,) = report_experiment(path, figures=False).comparisons
    assert (found.difference.num_pairs, found.difference.verdict) == (1, "too few pairs")


def test_where_seeds_draw_rows_one_run_stands_for_itself(tmp_path):
    path = write_lines(tmp_path / "results.jsonl", seed_keys=["train.seed", "data.data_seed"])
    text = report_experiment(path, figures=False).markdown
    assert "wsc zero_shot: seeds 1, 2, 3, 4, 5" in text
    assert "A seed sets train.seed and data.data_seed." in text
    assert (
        "Seeds vary the training alone"
        in report_experiment(write_lines(path), figures=False).markdown
    )


def test_a_task_without_losses_is_not_counted_among_them(tmp_path):
    def written(cell):
        return (
            cell | {"metric": "em", "test": {"em": cell["score"]}} if cell["task"] == "cb" else cell
        )

    report_experiment(change(tmp_path / "results.jsonl", written), figures=False)
    with (tmp_path / "differences.csv").open() as file:
        (loss,) = [row for row in csv.DictReader(file) if row["value"] == "held-out loss"]
    assert loss["task"] == "wsc"
    assert float(loss["p_holm"]) == float(loss["p"])


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


def test_a_verdict_does_not_hang_on_how_much_of_the_plan_is_done(tmp_path):
    head = {"methods": {"lora": "One.", "chain3": "Three.", "chain2": "Two."}}
    pairs = [["chain3", "lora"], ["chain2", "lora"]]
    path = write_lines(tmp_path / "results.jsonl", **head, tasks=["wsc"], pairs=pairs)
    only = report_experiment(path, figures=False).comparisons[0].difference
    assert only.p_holm == 2 * only.p  # chain2 has no cell yet


def test_a_report_of_what_is_there_so_far(tmp_path):
    """A killed experiment may have, for one task, nothing but zero_shot: every figure is drawn all
    the same."""
    path = change(
        tmp_path / "results.jsonl",
        lambda cell: None if cell["task"] == "cb" and cell["method"] != "zero_shot" else cell,
    )
    report = report_experiment(path)
    assert (tmp_path / "chain_length.png").stat().st_size > 0
    assert "cb lora: seeds 0, 1, 2, 3, 4, 5; cb chain3: seeds" in report.markdown


def test_exact_match_stands_beside_f1_and_the_paper_s_deviation_beside_its_mean(tmp_path):
    def as_words(cell):
        return cell | {"metric": "token_f1", "test": {"token_f1": cell["score"], "em": 0.25}}

    path = change(tmp_path / "results.jsonl", as_words, paper="table4")
    text = report_experiment(path, figures=False).markdown
    assert "| wsc lora | em | 25.00 | 6 |" in text
    assert "| paper: lora (OPT-1.3B) | 56.53 ± 7.67 | 75.35 ± 4.84 |" in text


def test_the_report_of_a_real_run(done):
    _, out, _ = done
    report = report_experiment(out, out / "report")
    assert [summary.method for summary in report.summaries] == ["lora", "chain3"]
    assert "Chosen on validation rows for each task and method apart" in report.markdown
    # two seeds decide nothing
    assert "too few pairs to compare chain3 with lora on mood" in report.markdown
    assert "2 pairs: no interval and no verdict from so few" in report.markdown
