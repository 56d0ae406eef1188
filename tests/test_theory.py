"""The theory scripts: each runs, and what its docstring and docs/theory.md claim holds."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from chainlora.chain.soft_knot import balance

ROOT = Path(__file__).resolve().parents[1]
THEORY = ROOT / "examples" / "theory"
SCRIPTS = ("frank_wolfe", "rac_counter_example", "residual", "soft_knots")
MOST_BYTES = 150_000  # of a committed picture


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(THEORY))


def script(name: str):
    return importlib.import_module(name)


# --- as a user runs them


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_a_table_and_writes_one_small_picture(name, tmp_path):
    command = [sys.executable, THEORY / f"{name}.py", "figure.png", "--small"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert (tmp_path / "figure.png").stat().st_size < MOST_BYTES
    height, width, _ = matplotlib.image.imread(tmp_path / "figure.png").shape
    assert min(height, width) > 400


# --- Frank–Wolfe


@pytest.mark.parametrize("kind", ["least squares", "bounded"])
@pytest.mark.parametrize("power_steps", [None, 2])
def test_the_mean_gap_is_below_the_bound_of_theorem_4_1(kind, power_steps):
    fw = script("frank_wolfe")
    problem = fw.make_problem(kind)
    for steps in (1, 4, 16, 64):
        row = fw.measure(problem, steps, power_steps)
        assert 0 < row.gap <= row.from_the_run <= row.derived <= row.theorem
        assert (row.epsilon < 1e-9) == (power_steps is None)  # rounding of sums near 1e3
        assert row.theorem - row.epsilon == pytest.approx(
            2 * math.sqrt(problem.bound * problem.smoothness) * problem.diameter / math.sqrt(steps)
        )


# --- RAC-LoRA's counter-example


def test_rank_one_fails_from_afar_where_rac_lora_does_not():
    rac = script("rac_counter_example")
    near = {method: rac.tune(method, 1.0) for method in rac.METHODS}
    far = {method: rac.tune(method, 5.0) for method in rac.METHODS}
    best = (1 + 1) / (10 + 1 + 1)  # M = diag(10, 1, 1) without its steepest direction
    assert rac.best_of_rank_one() == pytest.approx(best)
    assert near["lora"][-1] == pytest.approx(best, rel=1e-3)  # every draw is stuck at rank one
    assert near["chain"][-1].max() < 1e-3
    assert np.isinf(far["lora"][-1]).all()
    assert np.isinf(far["chain"][-1]).all()
    # linear in the distance: the same share of the loss is left; rounding grows over 600 steps
    np.testing.assert_allclose(near["rac"], far["rac"], rtol=1e-9)
    assert near["rac"][-1].max() < 1e-3
    assert np.diff(near["rac"], axis=0).max() <= 1e-15  # f never rises, up to rounding below 1


# --- what M links leave


def test_no_chain_beats_eckart_and_young_and_long_or_well_started_links_reach_it():
    case = script("residual")
    matrix = case.target()
    bound = case.eckart_young(matrix, 6, 2)
    squares = [0.8 ** (2 * k) for k in range(16)]  # four links of rank 2 take eight of them
    assert bound[4] == pytest.approx((sum(squares[8:]) / sum(squares)) ** 0.5)
    exact = case.residuals(matrix, "exact", num_links=6)
    assert exact == pytest.approx(bound, abs=1e-9)  # float64: a few roundings
    short = {kind: case.residuals(matrix, kind, 15, num_links=6) for kind in case.KINDS}
    for values in short.values():
        assert all(value >= best - 1e-9 for value, best in zip(values, bound, strict=True))
    # fifteen steps from the gradient's directions leave 1 % of each of them
    assert short["tuned FW"][4] == pytest.approx(bound[4], rel=1e-2)
    assert short["tuned"][4] > 2 * bound[4]
    long = {kind: case.residuals(matrix, kind, 400, num_links=4) for kind in case.KINDS[1:]}
    assert long["tuned"][4] == pytest.approx(bound[4], rel=1e-2)  # 0.1657 against 0.1655
    # B only: a share of what is left however long a link is; its steps have converged by 15
    assert long["B only"][4] == pytest.approx(short["B only"][4], rel=1e-3)
    assert long["B only"][4] > 4 * bound[4]


# --- soft knots


def a_pair(rank: int = 1, rates: int = 2, seeds: int = 3):
    knots = script("quadratic")
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rates, seeds, *shape, generator=draw, dtype=torch.float64)

    a, b = normal(rank, 8), 0.1 * normal(6, rank)
    moments = [normal(rank, 8), normal(rank, 8) ** 2, normal(6, rank), normal(6, rank) ** 2]
    scale = torch.full((rates, seeds, 1, 1), 2.0, dtype=torch.float64)
    return knots.Pair(normal(6, 8), a, b, scale, moments, count=7)


def test_the_scales_of_a_soft_knot_are_those_of_the_package():
    knots, pair = script("quadratic"), a_pair(rank=3, rates=1, seeds=1)
    pair.b[..., 1] = 0  # a component to be left alone
    alpha, beta = knots.shrink_factors(pair, 0.7)
    scales = balance(pair.a[0, 0].float(), pair.b[0, 0].float(), share=0.3)
    torch.testing.assert_close(alpha.flatten().float(), scales.a, rtol=1e-6, atol=0)  # float32
    torch.testing.assert_close(beta.flatten().float(), scales.b, rtol=1e-6, atol=0)


SPEC = {"condition": 1e3, "size": 0.01}


@pytest.fixture
def problem():
    return script("quadratic").make_problem((0, 1), 300, **SPEC)


@pytest.mark.parametrize("arm", ["folding only", "soft knots", "soft knots, new moments"])
def test_what_folds_falls_far_below_the_floor_of_rank_one(arm, problem):
    knots = script("quadratic")
    trace = knots.tune(problem, knots.ARMS[arm], [1e-3, 2e-3], 15.0)
    best = trace.loss[-1].min(0).values
    assert (best < 0.6 * knots.floor(problem, 1)).all()  # 0.25 to 0.45 of it
