"""Pages in a real browser: nothing is loaded, nothing fails, figures are there and legible."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_cases import change, with_curve
from helpers_browser import chromium, look

from chainlora.cli.main import run as command
from chainlora.experiments import report_experiment

PHONE, DESKTOP = 390, 1280
LEAST_TEXT = 10.0  # CSS pixels: 9 points in a chart of 4 inches, shown at 340 pixels


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory) -> dict[str, Path]:
    """A page about one run, with answers; about two runs; about an experiment."""
    chromium()
    folder = tmp_path_factory.mktemp("pages")
    one, two = folder / "one.html", folder / "two.html"
    assert command(["report", str(finished), "--prompts", "2", "--output", str(one)]) == 0
    assert command(["report", str(finished), str(finished), "--output", str(two)]) == 0
    figures = ["scores", "differences", "curves"]
    report_experiment(change(folder / "results.jsonl", with_curve, figures=figures))
    return {"run": one, "runs": two, "experiment": folder / "report.html"}


@pytest.mark.parametrize("name", ["run", "runs", "experiment"])
@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_a_page_in_a_browser(pages, tmp_path, name, width, dark):
    assert pages[name].stat().st_size < 3e6
    seen = look(pages[name], tmp_path, width=width, dark=dark)
    found = seen.found
    assert seen.console == []
    assert found["loaded"] == 0
    assert (found["width"], found["dark"], found["lang"]) == (width, dark, "en")
    assert found["scroll"] <= width, "the page is wider than its window"
    assert found["twice"] == []
    assert found["anchors"] == 0  # links of the navigation that lead nowhere
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in found["colours"])
    assert (ink > paper) == dark
    assert len(found["figures"]) >= {"run": 8, "runs": 18, "experiment": 9}[name]
    for figure in found["figures"]:
        title = figure["title"]
        assert figure["width"] > 300, title
        assert figure["height"] > 120, title  # differences of a single pair are a flat figure
        assert title in figure["label"]
        assert figure["focused"], title  # by the keyboard
        assert figure["open"], title
        assert figure["text"] >= LEAST_TEXT, (title, figure["text"])
