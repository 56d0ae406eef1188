"""Plots: every shape of run gives a picture, the same run the same bytes, and nothing global is
touched."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from chainlora_pages.chain_charts import chain_pictures, plot_chain
from chainlora_pages.run_charts import _draw_loss, plot_training, training_pictures
from chainlora_pages.runs import read_runs


def records(lengths=(6, 4), metrics=("accuracy",)) -> list[dict]:
    """Of a run whose schedule restarts at each link, evaluated every third step and at knots."""

    def evaluation(step, link, where):
        found = {"event": "eval", "step": step, "link": link, "where": where}
        return found | {"loss": 1 - 0.05 * step} | dict.fromkeys(metrics, 0.5 + 0.03 * step)

    rows, step = [evaluation(0, 0, "start")], 0
    for link, length in enumerate(lengths):
        for within in range(length):
            step += 1
            found = {"event": "step", "step": step, "link": link, "loss": 1 / step}
            found |= {"learning_rate": 1e-3 * (1 - within / length), "tokens": 9, "seconds": 0.1}
            rows += [found, *([evaluation(step, link, "step")] if step % 3 == 0 else [])]
        rows += [{"event": "knot", "step": step, "link": link}, evaluation(step, link, "knot")]
    return rows


def inspection(count: int, **extra) -> dict:
    ranks = {"rank": 8, "effective_rank": 5.0, "stable_rank": 2.0}
    links = [
        {"link": k, "delta_norm": 2 / (k + 1), "overlap": [0.1] * k} | ranks | extra
        for k in range(count)
    ]
    return {"run": "runs/x", "links": links, "chain": {"links": count}}


def size(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    "rows",
    [
        records(lengths=(2,) * 20),  # more links than labels fit
        records()[:5],  # a run cut off inside its first link
        [row for row in records() if row["event"] != "eval"],
        [row | ({"loss": math.nan} if row.get("step") == 3 else {}) for row in records()],
    ],
)
def test_every_run_has_a_picture(rows, tmp_path):
    plot_training(rows, tmp_path / "training.png")
    assert min(size(tmp_path / "training.png")) > 200


def test_every_chain_has_a_picture(tmp_path):
    for found in (inspection(30), inspection(2, delta_norm=0.0, effective_rank=0.0)):
        plot_chain(found, tmp_path / "chain.png")
        assert min(size(tmp_path / "chain.png")) > 200


def test_a_validation_loss_is_never_cut_off_like_a_spike_of_training():
    """The last one of nine, among four hundred steps about one, was above the picture."""
    steps = [
        {"event": "step", "step": k, "link": 0, "loss": 1 + 0.01 * (k % 9)} for k in range(400)
    ]
    evals = [{"event": "eval", "step": k, "loss": loss} for k, loss in ((0, 1.1), (400, 9.0))]
    axes = Figure().subplots()
    _draw_loss(axes, [*steps, {"step": 400, "loss": 50.0}], evals, "each step")
    assert 9.0 < axes.get_ylim()[1] < 50.0


@pytest.mark.filterwarnings("error")
def test_a_run_whose_answers_are_written_has_no_loss_before_its_first_step():
    start = {"event": "eval", "step": 0, "link": 0, "where": "start", "em": 0.1, "token_f1": 0.2}
    (picture,) = training_pictures([start])
    assert picture.title == "Validation scores over the steps"


def test_a_margin_is_no_share():
    evals = [row for row in records(metrics=("accuracy", "margin")) if row["event"] == "eval"]
    (scores,) = [each for each in training_pictures(evals) if "scores" in each.title]
    assert "%</text>" not in scores.svg
    (scores,) = [each for each in training_pictures(records()) if "scores" in each.title]
    assert "%</text>" in scores.svg


def test_a_page_s_charts_are_legible_on_a_phone(finished):
    """Text was 8.5 pixels high, and ticks stood at step 2.5."""
    (run,) = read_runs([finished])
    made = [*training_pictures(run.records), *chain_pictures(run)]
    for each in made:
        (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', each.svg)
        sizes = [float(size) for size in re.findall(r"font:?(?:-size:)? ([\d.]+)px", each.svg)]
        assert min(sizes) * 340 / float(width) >= 10, each.title  # of a phone's 390 pixels
        if "over the steps" in each.title:
            assert not re.search(r">\d+\.5</text>", each.svg.partition("matplotlib.axis_2")[0])
