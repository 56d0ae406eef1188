"""The tables of docs/evidence.md, and what other pages take from them, are recomputed from the
committed results. After new results, `PYTHONPATH=tests python -m benchmarks.test_evidence` rewrites
the page's tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest

from benchmarks import helpers_evidence as E
from benchmarks import helpers_evidence_field as F
from benchmarks import helpers_evidence_stages as S
from benchmarks.helpers_evidence import ROOT, Rows

EVIDENCE = ROOT / "docs/evidence.md"
SENTENCES: dict[str, list[tuple[str, Callable[[], Iterable[str]]]]] = {  # texts of a page, numbers
    "README.md": [
        (
            "32 of them kept, {} seeds, combined at rank 16 | {} % | {} % (other seeds, no general "
            "rows) | {} % |",
            lambda: [*S.layerwise_in_short()[:2], *S.kept_32("replay"), S.layerwise_in_short()[2]],
        ),
        (
            "facts, all rows kept, three seeds ([facts])) | {} % (at rank 16: {} %) | {} % (half "
            "as many old rows as new ones) | {} % |",
            lambda: [S.facts_kept(name) for name in ("wide", "combine", "replay", "alone")],
        ),
        (
            "over the {} that a stage alone learns, {} | {} % | {} % | {} % |",
            lambda: F.in_short("ours", "replay", "alone"),
        ),
        ("the difference to replay is {} points", lambda: F.compared("replay")[:1]),
        ("leads `extend` there by {} points", lambda: [F.ahead("all at once")]),
        (
            "ends {} % above the base's in the first row and {} % in the last",
            lambda: S.percent(S.worse(), F.worse()),
        ),
        (
            "on three other seeds ([tables])), {} %, at rank 40",
            lambda: S.kept_32("all at once"),
        ),
        (
            "is {} to {} times as fast as `transformers.Trainer` with PEFT, in {} to {} of its "
            "memory; with rows of 1,024 tokens or more, at most {} times ([{} comparisons]",
            E.against_trainer,
        ),
        ("0.5B parameters take [{} GB]) and {} seconds for a row", E.half_a_billion),
        (
            "With its own `gradient_checkpointing`, against a Trainer without it, chainlora takes "
            "{} to {} of its memory at {} to {} times its speed",
            E.checkpointing,
        ),
        ("takes {} to {} minutes of one processor for two to twelve data sets", E.to_combine),
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
TABLES: dict[str, Callable[[], Rows]] = {
    table.__name__: table
    for table in (
        S.combining,
        S.months,
        F.field,
        E.soft_lab,
        E.soft_smollm2,
        E.whole,
        E.classification,
        S.stages,
        S.rehearsals,
        E.speed,
    )
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


def evidence() -> str:
    return EVIDENCE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_results(name):
    assert markdown(TABLES[name]()) in evidence()


@pytest.mark.parametrize("name", SENTENCES)
def test_the_numbers_of_a_page_are_those_of_the_results(name):
    page = flat((ROOT / name).read_text(encoding="utf-8"))
    told = [text.format(*numbers()) for text, numbers in SENTENCES[name]]
    assert [text for text in told if text not in page] == []


def unchecked(name: str, text: str) -> set[str]:
    """Return the numbers of a text that no sentence of the page has."""
    rest = flat(text)
    for sentence, numbers in SENTENCES[name]:
        rest = rest.replace(sentence.format(*numbers()), "")
    return {*NUMBER.findall(rest)} - NOT_MEASURED.keys()


def test_no_table_of_the_page_is_unchecked():
    tables = [line for line in evidence().splitlines() if line.startswith("|")]
    assert len(tables) == sum(len(table()) + 1 for table in TABLES.values())


def test_no_number_of_the_readme_is_unchecked():
    """In each paragraph, with its table, or list that links to results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\n\n(?=\|)", "\n", text)  # a table belongs to the paragraph before it
    blocks = [
        b
        for b in text.split("\n\n")
        if re.search(r"\]\((?:benchmarks/|docs/evidence|docs/figures/stages)", b)
    ]
    assert [block for block in blocks if unchecked("README.md", block)] == []


def test_the_tutorial_compares_ways_by_the_same_results():
    page = (ROOT / "docs/tutorials/second-data-set.md").read_text(encoding="utf-8")
    assert re.findall(r"\| (\d+) % \|", page) == [
        *S.kept_32("on top", "replay"),
        *S.percent(S.right(S.arm("all at once", "all at once")), S.alone()),
    ]


def write_tables() -> None:
    """Put today's tables where the page has one with the same heads."""
    page = evidence()
    for table in TABLES.values():
        rows = table()
        old = re.escape(markdown(rows[:1])) + r"(?:\|.*\n)*"
        page, count = re.subn(old, markdown(rows), page)
        assert count == 1, rows[0]
    EVIDENCE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
