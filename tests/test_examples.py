"""The two worked problems as a user runs them: a command, a figure, and numbers that say what the
file promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed_by(name: str, folder: Path) -> list[str]:
    """The lines that an example prints, its figure drawn into `folder`."""
    command = [sys.executable, EXAMPLES / f"{name}.py", "figure.png"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["figure.png"]
    height, width, _ = matplotlib.image.imread(folder / "figure.png").shape
    assert height > 500
    assert width > 500
    return done.stdout.splitlines()


def test_rank_one_fails_from_afar_where_rac_lora_does_not(tmp_path):
    found = {}
    for line in printed_by("rac_counter_example", tmp_path):
        method, start, lost, worst = re.fullmatch(
            r"(\w+) +from (\d)·I: +(\d+)% diverge, worst last loss (\S+) of the first", line
        ).groups()
        found[method, int(start)] = int(lost), float(worst)
    best_of_rank_one = (1 + 1) / (10 + 1 + 1)  # M = diag(10, 1, 1) without its steepest direction
    assert found["lora", 1] == (
        0,
        pytest.approx(best_of_rank_one, abs=0.005),
    )  # printed to two digits
    for method, start in (("chain", 1), ("rac", 1), ("rac", 5)):
        lost, worst = found[method, start]
        assert lost == 0
        assert worst < 1e-3  # of forty draws; the figure shows them on their way to zero
    assert found["lora", 5] == found["chain", 5] == (100, float("inf"))
    assert (
        found["rac", 1] == found["rac", 5]
    )  # linear in the distance: the same share of the loss is left


def test_the_chain_follows_eckart_and_young_as_far_as_promised(tmp_path):
    lines = printed_by("matrix_residual", tmp_path)
    pattern = r"(.+?) +residual after 4 links (\S+)(?:, after 12 links (\S+))?"
    rows = [re.fullmatch(pattern, line).groups() for line in lines]
    after_4 = {name: float(value) for name, value, _ in rows}
    after_12 = {name: float(value) for name, _, value in rows if value}
    best = after_4.pop("Eckart-Young")
    squares = [
        0.8 ** (2 * k) for k in range(16)
    ]  # singular values are 0.8ᵏ; four links of rank 2 take eight
    assert best == pytest.approx(
        (sum(squares[8:]) / sum(squares)) ** 0.5, abs=5e-5
    )  # printed to four digits
    assert after_4["exact"] == best  # greedy is optimal
    assert (
        after_12["exact"] < 1e-12
    )  # sixteen directions by twelve links of rank 2: float64 rounding is left
    assert min(after_4.values()) >= best
    # long links lie on the line until little is left: within 1 % here, off it at the end
    assert after_4["tuned, 400 steps a link"] == pytest.approx(best, rel=0.01)
    assert after_12["tuned, 400 steps a link"] > 1e-3
    # short links fall far behind from random starts, and lie on the line from the gradient's
    # directions
    assert after_4["tuned, 15 steps a link"] > 2 * best
    assert after_4["tuned FW, 15 steps a link"] == pytest.approx(best, rel=0.01)
    # B only: slow, however long a link is
    assert after_4["B only, 400 steps a link"] == after_4["B only, 15 steps a link"] > 4 * best
    assert after_12["B only, 400 steps a link"] > 0.5
