"""Every number of docs/evidence.md, and what other pages take from it, is recomputed from the
committed results. After new results, `PYTHONPATH=tests python -m benchmarks.test_evidence` rewrites
the tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest

from benchmarks import helpers_evidence as E
from benchmarks import helpers_evidence_field as F
from benchmarks import helpers_evidence_stages as S
from benchmarks.helpers_evidence import ROOT, Rows

SENTENCES: dict[str, list[tuple[str, Callable[[], Iterable[str]]]]] = {  # texts of a page, numbers
    "docs/evidence.md": [
        (
            "with SmolLM2 by {} points after [14 tasks])",
            lambda: [F.ahead("replay")],
        ),
        (
            "by {} after [six months]) of 20 made-up facts (three seeds), and after "
            "[twelve months]) (one seed) it answers {} of {} facts, the combination {}.",
            lambda: [S.replay_of_facts()[0], *S.after_a_year()],
        ),
        ("with SmolLM2 by {} points over the same 4 of", lambda: [F.ahead("all at once")]),
        (
            "of rank 8 by {} points over these 4 tasks (three seeds), by {} over [five tasks]) of "
            "640 rows (rank 16, six seeds), and by {} with the facts",
            lambda: [F.ahead("alone"), *S.alone_ahead_of_combined()],
        ),
        (
            "over the base's by {} % after the five tasks (six seeds) and by {} % after the 14 "
            "(three seeds; replay there: {} %, all at once: {} %), and that of general rows by {} "
            "% after six months (three seeds; replay: {} %).",
            lambda: [
                E.estimate(S.worse(), 1, "-"),
                *(S.three_seeds(F.worse(arm), 1) for arm in ("ours", "replay", "all at once")),
                *map(S.worse_on_general_rows, ("wide", "replay")),
            ],
        ),
        ("rows as new ones, but ran with {} as many", lambda: S.replay_of_facts()[1:]),
        (
            "two links minus LoRA r: {} points, p {}; three links minus LoRA r: {}, p {}; minus "
            "LoRA Σr: {}, p {}. Over two tasks (10 pairs), soft knots minus LoRA r: {}, p {}. Over "
            "three tasks (15 pairs), two links minus LoRA r: {}, p {};",
            E.classification,
        ),
        ("no mean is more than {} points above", lambda: E.little_learned()[:1]),
        ("and {} of {} chosen rates are at an end", lambda: E.little_learned()[1:]),
        (
            "among them amazon ({}), imdb ({}) and cb ({}).",
            lambda: F.below_the_gate("amazon", "imdb", "cb"),
        ),
        (
            "layer by layer has learned {} tasks, replay {}, all at once {}.",
            lambda: F.learned_at_the_end("ours", "replay", "all at once"),
        ),
        ("chosen over 1e-3 by {} of {} answers", F.rate_of_replay),
        (
            "in {} of {} studies the interval of the difference to LoRA is below 0 (means {} to "
            "{}), in {} it includes 0 ({} to {})",
            E.soft_lab,
        ),
        ("Rank 64 takes {} times the time of rank 8", lambda: [E.rank_cost()]),
        (
            "adds {} % (float32) or {} % (bfloat16)",
            lambda: [E.shared("float32"), E.shared("bfloat16")],
        ),
        ("has rank {} after {} knots", E.soft_rank),
        ("ahead in all {} comparisons, on every seed, by {} to {}.", E.all_behind),
        (
            "rank 16 is {} ahead ({} steps, tuning seed)",
            lambda: [E.rank16_ahead(), E.num_steps("scripts_scout")],
        ),
        ("rows; {} of them are kept", lambda: S.planned("kept")),
        ("A task has {} steps; kept rows add {} in all.", lambda: S.planned("steps", "rehearsal")),
        ("Up to {} steps both methods", lambda: [E.num_steps("translations")]),
        ("(goal: {} times)", lambda: [2]),
        (
            "gain {0} points on these six tasks. With 80 % power, {2} pairs detect {1} points",
            lambda: [E.paper_gain(), *E.detectable()],
        ),
        (
            "(primary): {} points; minus each stage alone: {} points; ratio of perplexity: {}.",
            S.registered,
        ),
        (
            "as the only targets: primary {} points; minus each stage alone {} points; ratio {}; "
            "the earlier default's is {}.",
            S.second_try,
        ),
        (
            "ranks, {}, which is [now the default]), seeds 6 and 7 have {} % right answers and a "
            "ratio of {}; at rank {}, {} % and {}.",
            S.ranks_compared,
        ),
        ("facts, {} steps each", lambda: [S.of_month("alone")[0]["steps"] // 6]),
        (
            "primary, rank 48 minus rank 16: {} points; second, rank 16 minus replay: {}; third, "
            "rank 48 minus replay: {}.",
            S.months_compared,
        ),
        ("A stage alone learns {} of {} tasks", F.learned_of_all),
        ("{} points above the most frequent answer", lambda: [F.gate()]),
        ("with {} rows and {} steps each (CB: {} and {})", F.planned),
        (
            "minus replay, in points: {}; over tasks and rows {}; by seed {}. Over all {} tasks, "
            "without weight: {}.",
            lambda: [*F.compared("replay"), *F.over_all("replay")],
        ),
        (
            "minus the router, in points: {}; over tasks and rows {}; by seed {}. Over all {} "
            "tasks, without weight: {}.",
            lambda: [*F.compared("router"), *F.over_all("router")],
        ),
        ("**Not run**: {}; layer by layer without the base.", lambda: [F.not_run()]),
        (
            "the {} rates that were tried are within {} points on the tuning seed: the {} % may be",
            lambda: S.rates_tried("one LoRA"),
        ),
        (
            "replay of 1,280 old rows has {} %, the combination, rehearsed on as many, {} %: "
            "replay is ahead on {} of {}. All at once has {} %.",
            S.all_kept_in_short,
        ),
        ("per processor second, it is {} times as fast", E.longest),
        (
            "is {} to {} times as fast as `transformers.Trainer` with PEFT, in {} to {} of its "
            "memory; with rows of 1,024 tokens or more, at most {} times ([{} comparisons]",
            E.against_trainer,
        ),
        (
            "ran without `gradient_checkpointing`. With it, chainlora takes {} to {} of its "
            "memory at {} to {} times its speed",
            E.checkpointing,
        ),
        (
            "{:.1f} after 16 whole knots (merging in place: {:.1f}), {:.1f} after 400 soft ones "
            "(float32 weights, in their smaller roundings: {:.1f})",
            E.errors,
        ),
        (
            "Of {} commands with a [fault]) (a kill, a full disk or a flipped bit), {} ended with "
            "a lost or wrong result, and {} with an unclear error.",
            E.faults,
        ),
        ("a schedule for each ({})", lambda: [E.restarted()]),
    ],
    "README.md": [
        (
            "over the {} that a stage alone learns, {} | {} % | {} % | {} % |",
            lambda: F.in_short("all at once", "replay", "ours"),
        ),
        (
            "facts, all rows kept, three seeds | not run | {} % | {} % |",
            lambda: [S.facts_kept(name) for name in ("replay", "wide")],
        ),
        (
            "each column has other seeds | {} % | {} % | {} % |",
            lambda: [*S.kept_32("all at once", "replay"), S.layerwise_in_short()[1]],
        ),
        (
            "in the first row by {} and {} points",
            lambda: [F.ahead("all at once"), F.ahead("replay")],
        ),
        (
            "ends {} % above the base's in the first row, {} % in the third",
            lambda: S.percent(F.worse(), S.worse()),
        ),
        ("takes {} to {} minutes of one processor for two to twelve data sets", E.to_combine),
    ],
    "docs/install.md": [("| 0.5B | {1} | 57 | {0} GB |", E.half_a_billion)],
    "docs/tutorials/second-data-set.md": [
        ("{} % right after five tasks with", lambda: S.kept_32("on top")),
    ],
    "benchmarks/stages/results.md": [
        ("of each stage, here {} steps", lambda: [max(S.LENGTHS)]),
        ("on top minus one LoRA: {} points", lambda: [S.orders_less_one_lora()]),
        (
            'in one pass, rehearsed" minus "on top, rehearsed": {} points',
            lambda: [S.ahead("combined rehearsed", "on top rehearsed")],
        ),
        (
            "(two seeds), they have {} and {} %",
            lambda: S.own_question("combined rehearsed", "on top rehearsed"),
        ),
        (
            'on top, rehearsed" minus replay: {} points',
            lambda: [S.ahead("on top rehearsed", "replay")],
        ),
        (
            "both rehearsed: {} points; without rehearsal: {}; two passes, rehearsed, minus "
            "replay: {}.",
            lambda: [
                S.ahead("combined twice rehearsed", "combined rehearsed"),
                S.ahead("combined twice", "combined"),
                S.ahead("combined twice rehearsed", "replay"),
            ],
        ),
        (
            "on the same seeds: {} points at rank 8 (equal memory), {} at rank 40",
            lambda: [S.lead(f"one {size}LoRA replay", "replay") for size in ("", "wide ")],
        ),
        (
            "minus one LoRA, rehearsed: {} points at rank 8, {} at rank 40",
            lambda: [
                S.lead("combined twice rehearsed", f"one {size}LoRA rehearsed")
                for size in ("", "wide ")
            ],
        ),
        (
            "all at once is {} points ahead",
            lambda: [S.lead("all at once", "combined twice rehearsed", "-")],
        ),
        ("old rows has {} %; by seed {}, {} and {}, the combination {}, {} and {}: ", S.replayed),
        (": replay is ahead on {} of {}.", S.replay_is_ahead),
        ("than all at once has ({}).", lambda: [S.arm("all at once", "all at once")[0]["steps"]]),
        ("alone** is {} points ahead of the default", lambda: [S.alone_ahead()]),
        (
            "the {} rates that were tried are within {} points on the tuning seed: the {} % may be",
            lambda: S.rates_tried("one LoRA"),
        ),
    ],
    "benchmarks/stages/README.md": [
        ("two passes {}, rehearsed {} (1e-3) and {} % (3e-4)", S.tuned_twice),
        ("the means are {}, {}, {} and {} %:", lambda: [row[2] for row in S.rehearsals()[1:]]),
    ],
}
NOT_MEASURED = {
    "0.26M": "the size of stories260k",
    "95": "intervals",
    **dict.fromkeys(("1.1", "−1"), "bounds of a rule"),
    **dict.fromkeys(("2401.04151", "2310.14152"), "arXiv"),
}
TABLES: dict[str, tuple[Callable[[], Rows], ...]] = {  # of a page
    "docs/evidence.md": (
        S.combining,
        S.months,
        F.field,
        S.stages_in_short,
        E.speed,
        E.whole,
        E.soft_smollm2,
    ),
    "benchmarks/stages/results.md": (S.stages, S.rehearsals),
}
NUMBER = re.compile(  # signed, a decimal fraction, or a count of what is measured
    r"(?<![\w.-])(?:[+−]?\d[\d,]*\.\d+(?:e-\d+)?M?|[+−]\d+"
    r"|\d[\d,]*(?= (?:%|points|steps|times|comparisons)))"
)


def markdown(rows: Rows) -> str:
    shown = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([shown[0], f"|{'---|' * len(rows[0])}\n", *shown[1:]])


def flat(text: str) -> str:
    """Text without line ends and link targets."""
    return " ".join(re.sub(r"\]\([^)]*\)", "])", text).split())


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_a_page_are_those_of_the_results(name):
    page = read(name)
    assert [table.__name__ for table in TABLES[name] if markdown(table()) not in page] == []


@pytest.mark.parametrize("name", SENTENCES)
def test_the_numbers_of_a_page_are_those_of_the_results(name):
    page = flat(read(name))
    told = [text.format(*numbers()) for text, numbers in SENTENCES[name]]
    assert [text for text in told if text not in page] == []


def unchecked(name: str, text: str) -> set[str]:
    """Return the numbers of a text that no sentence of the page has."""
    rest = flat(text)
    for sentence, numbers in SENTENCES[name]:
        rest = rest.replace(sentence.format(*numbers()), "")
    return {*NUMBER.findall(rest)} - NOT_MEASURED.keys()


@pytest.mark.parametrize("name", TABLES)
def test_no_number_of_a_page_is_unchecked(name):
    page = read(name)
    assert unchecked(name, re.sub(r"^\|.*\n", "", page, flags=re.MULTILINE)) == set()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(table()) + 1 for table in TABLES[name])


def test_no_number_of_the_readme_is_unchecked():
    """In each paragraph, with its table, or list that links to results."""
    text = read("README.md")
    text = re.sub(r"\n\n(?=\|)", "\n", text)  # a table belongs to the paragraph before it
    blocks = [
        b
        for b in text.split("\n\n")
        if re.search(r"\]\((?:benchmarks/|docs/evidence|docs/figures/stages)", b)
    ]
    assert [block for block in blocks if unchecked("README.md", block)] == []


def write_tables() -> None:
    """Put today's tables where a page has one with the same heads."""
    for name, tables in TABLES.items():
        page = read(name)
        for table in tables:
            rows = table()
            old = re.escape(markdown(rows[:1])) + r"(?:\|.*\n)*"
            page, count = re.subn(old, markdown(rows), page)
            assert count == 1, rows[0]
        (ROOT / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
