"""The theory scripts: each runs, and what its docstring and docs/theory.md claim holds."""

from __future__ import annotations

import importlib
import math
import re
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


def test_the_page_shows_every_script_and_its_committed_picture():
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"python examples/theory/{name}.py docs/figures/{name}.png" in page
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", page)
    assert pictures == [f"figures/{name}.png" for name in SCRIPTS]
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < MOST_BYTES


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


@pytest.mark.parametrize("kind", ["least squares", "bounded"])
def test_the_constants_of_the_problem_are_those_of_its_loss(kind):
    fw = script("frank_wolfe")
    problem, draw = fw.make_problem(kind), np.random.default_rng(3)
    for _ in range(20):
        weight = random_vertex(problem, draw)
        assert 0 <= problem.loss(weight) <= problem.bound
        other = random_vertex(problem, draw)
        distance = np.linalg.norm(weight - other)
        assert distance <= problem.diameter
        change = np.linalg.norm(problem.gradient(weight) - problem.gradient(other))
        assert change <= problem.smoothness * distance
        # central difference: an error of 1e-12 · |L'''| beside rounding of 1e-16 · L / 1e-6
        nudge = 1e-6 * draw.normal(size=weight.shape)
        slope = (problem.loss(weight + nudge) - problem.loss(weight - nudge)) / 2
        assert slope == pytest.approx(float(np.sum(problem.gradient(weight) * nudge)), abs=1e-8)
    apart = np.linalg.norm(2 * weight)  # W and −W lie in K, and W is a vertex
    assert apart == pytest.approx(problem.diameter)


def random_vertex(problem, draw) -> np.ndarray:
    u, v = draw.normal(size=(2, len(problem.truth)))
    return problem.radius * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))


def test_a_link_is_the_best_rank_one_vertex_and_the_gap_is_zero_where_nothing_is_left():
    fw = script("frank_wolfe")
    problem, draw = fw.make_problem("least squares"), np.random.default_rng(4)
    gradient = problem.gradient(np.zeros_like(problem.truth))
    vertex, error, sigma = fw.rank_one_vertex(gradient, problem.radius, None, draw)
    assert np.linalg.matrix_rank(vertex) == 1
    assert error == pytest.approx(0, abs=1e-9)  # rounding of sums near 1e3
    assert np.sum(vertex * gradient) == pytest.approx(-problem.radius * sigma)
    for _ in range(20):
        assert np.sum(random_vertex(problem, draw) * gradient) > np.sum(vertex * gradient)
    rough, missed, _ = fw.rank_one_vertex(gradient, problem.radius, 1, draw)
    assert missed == pytest.approx(np.sum(rough * gradient) - np.sum(vertex * gradient))
    at_truth = problem.gradient(problem.truth)
    assert np.abs(at_truth).max() == 0  # so ⟨∇, W⟩ + R·σ₁ = 0


def test_the_convex_step_stays_in_the_ball_and_below_its_own_bound():
    fw = script("frank_wolfe")
    problem = fw.make_problem("least squares")
    run = fw.frank_wolfe(problem, 64, fw.convex_step)
    norm = np.linalg.svd(run.weight, compute_uv=False).sum()
    assert norm <= problem.radius * (1 + 1e-12)  # rounding of a sum of 40 singular values
    later = np.arange(1, 65)
    bounds = 2 * problem.smoothness * problem.diameter**2 / (later + 2)
    assert (run.losses[1:] <= bounds).all()
    assert (run.gaps >= run.losses[:-1]).all()  # convex, min L = 0: the gap bounds what is left


def test_the_sum_in_the_proof_is_an_equality_with_the_true_distances():
    fw = script("frank_wolfe")
    problem, draw, steps = fw.make_problem("least squares"), np.random.default_rng(1), 16
    eta = fw.theorem_step(problem, steps)(0)
    run = fw.frank_wolfe(problem, steps, lambda _: eta, power_steps=2)
    weight, squares = np.zeros_like(problem.truth), []
    for _ in range(steps):
        gradient = problem.gradient(weight)
        vertex, _, _ = fw.rank_one_vertex(gradient, problem.radius, 2, draw)
        squares.append(np.sum((problem.mask * (vertex - weight)) ** 2))
        weight = weight + eta * (vertex - weight)
    fallen = run.losses[0] - run.losses[-1]
    expected = fallen / (eta * steps) + eta * np.mean(squares) / 2 + run.errors.mean()
    assert run.gaps.mean() == pytest.approx(expected)
    assert np.mean(squares) < 0.2 * problem.diameter**2


def test_the_mean_gap_falls_as_the_square_root_of_the_horizon():
    fw = script("frank_wolfe")
    problem, steps = fw.make_problem("least squares"), [4, 16, 64, 256]
    gaps = [fw.measure(problem, horizon, None).gap for horizon in steps]
    assert fw.slope(steps, gaps) == pytest.approx(-0.5, abs=0.05)  # −0.51 over 4 … 1024


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


def test_the_safe_rate_depends_on_the_distance_only_where_both_factors_are_trained():
    rac = script("rac_counter_example")
    safe = {
        method: [rac.largest_safe_rate(method, c, steps=200, draws=10) for c in (5.0, 20.0)]
        for method in rac.METHODS
    }
    assert safe["rac"] == [0.199, 0.199]
    for method in ("lora", "chain"):
        near, far = safe[method]
        assert 2 <= near / far <= 8  # near 1/c, on a grid of √2, four times as far
        assert near < 0.05


def test_adam_hides_the_divergence_but_not_the_rank():
    rac = script("rac_counter_example")
    last = {method: rac.tune(method, 5.0, rac.ADAM_RATE, adam=True)[-1] for method in rac.METHODS}
    assert last["lora"] == pytest.approx(rac.best_of_rank_one(), rel=1e-2)
    assert last["chain"].max() < 1e-3
    assert last["rac"].max() < 1e-3


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


def grads_at(pair) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the factors for a fixed function of the weight, by autograd."""
    a, b = pair.a.clone().requires_grad_(), pair.b.clone().requires_grad_()
    torch.sin(pair.base + pair.scale * (b @ a)).sum().backward()
    return a.grad, b.grad


EXACT = {"rtol": 1e-12, "atol": 1e-14}  # float64, a handful of roundings of numbers near 1


@pytest.mark.parametrize("rank", [1, 3])
def test_a_soft_knot_preserves_the_weight_and_balances_the_factors(rank):
    knots, pair = script("quadratic"), a_pair(rank)
    before, product = pair.weight(), pair.b @ pair.a
    knots.soft_knot(pair, 0.7, knots.ARMS["soft knots"])
    torch.testing.assert_close(pair.weight(), before, **EXACT)
    torch.testing.assert_close(pair.b @ pair.a, 0.7 * product, **EXACT)
    x, y = knots.norms(pair)
    torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("arm", ["soft knots", "folding only", "balancing only"])
def test_moments_after_a_knot_are_those_of_the_gradients_after_it(arm):
    knots, pair = script("quadratic"), a_pair(rank=2)
    before, moments = grads_at(pair), pair.moments
    if arm == "balancing only":
        knots.rescale(pair, None)
    else:
        knots.soft_knot(pair, 0.7, knots.ARMS[arm])
    after = grads_at(pair)
    for factor in (0, 1):
        change = after[factor] / before[factor]  # the same for a whole component
        first, second = moments[2 * factor : 2 * factor + 2]
        torch.testing.assert_close(pair.moments[2 * factor], change * first, rtol=1e-9, atol=1e-12)
        carried = pair.moments[2 * factor + 1]
        torch.testing.assert_close(carried, change**2 * second, rtol=1e-9, atol=1e-12)
    assert pair.count == 7


def test_a_hundred_soft_knots_sum_to_the_same_weight():
    knots, pair = script("quadratic"), a_pair()
    before = pair.weight()
    for _ in range(100):
        knots.soft_knot(pair, 0.95, knots.ARMS["soft knots"])
    torch.testing.assert_close(pair.weight(), before, **EXACT)


def test_a_pair_whose_b_is_zero_is_left_alone():
    knots, pair = script("quadratic"), a_pair()
    pair.b = torch.zeros_like(pair.b)
    a = pair.a.clone()
    knots.soft_knot(pair, 0.7, knots.ARMS["soft knots"])
    assert torch.equal(pair.a, a)
    assert all(torch.isfinite(moment).all() for moment in pair.moments)


def test_following_other_norms_changes_neither_weight_nor_what_adam_knows():
    knots, pair = script("quadratic"), a_pair()
    before, grads, (m_a, *_) = pair.weight(), grads_at(pair), pair.moments
    knots.rescale(pair, torch.full((2, 3, 1, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close(pair.weight(), before, **EXACT)
    assert knots.norms(pair)[0].flatten().tolist() == pytest.approx([0.3] * 6)
    change = grads_at(pair)[0] / grads[0]
    torch.testing.assert_close(pair.moments[0], change * m_a, rtol=1e-9, atol=1e-12)


def test_decay_shrinks_the_product_and_ties_nothing():
    knots, pair = script("quadratic"), a_pair()
    base, product = pair.base.clone(), pair.b @ pair.a
    knots.soft_knot(pair, 0.7, knots.ARMS["decay, not tied"])
    assert torch.equal(pair.base, base)
    torch.testing.assert_close(pair.b @ pair.a, 0.7 * product, **EXACT)


def test_balancing_is_a_ratio_of_rates():
    """Adam on balanced factors moves W as Adam with rates √(x/y)·η and √(y/x)·η does on others."""
    knots, plain = script("quadratic"), a_pair()
    plain.forget()
    balanced = a_pair()
    balanced.forget()
    knots.rescale(balanced, None)
    x, y = knots.norms(plain)
    ratio, rate = (x / y).sqrt(), torch.tensor(1e-3, dtype=torch.float64)
    for _ in range(5):
        knots.adam_step(plain, grads_at(plain), rate * ratio, rate / ratio)
        knots.adam_step(balanced, grads_at(balanced), rate, rate)
        # exact but for EPSILON, 1e-12 beside gradients near 0.1
        torch.testing.assert_close(plain.weight(), balanced.weight(), rtol=1e-9, atol=1e-9)


def test_the_scales_of_a_soft_knot_are_those_of_the_package():
    knots, pair = script("quadratic"), a_pair(rank=3, rates=1, seeds=1)
    pair.b[..., 1] = 0  # a component to be left alone
    alpha, beta = knots.shrink_factors(pair, 0.7)
    scales = balance(pair.a[0, 0].float(), pair.b[0, 0].float(), share=0.3)
    torch.testing.assert_close(alpha.flatten().float(), scales.a, rtol=1e-6, atol=0)  # float32
    torch.testing.assert_close(beta.flatten().float(), scales.b, rtol=1e-6, atol=0)


def test_the_step_is_that_of_torch_adam():
    knots, pair = script("quadratic"), a_pair()
    pair.forget()
    a, b = pair.a.clone().requires_grad_(), pair.b.clone().requires_grad_()
    rate = torch.tensor(1e-2, dtype=torch.float64)
    torch_adam = torch.optim.Adam([a, b], lr=1e-2, eps=knots.EPSILON)
    for _ in range(5):
        a.grad, b.grad = grads = grads_at(pair)
        torch_adam.step()
        knots.adam_step(pair, grads, rate, rate)
        # both round where the other does not: a few units in the sixteenth digit a step
        torch.testing.assert_close(pair.a, a.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(pair.b, b.detach(), rtol=1e-9, atol=1e-11)


def test_the_gradients_are_those_of_the_batch_loss():
    knots, pair = script("quadratic"), a_pair()
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, knots.BATCH, generator=draw, dtype=torch.float64)
    outputs = torch.randn(6, knots.BATCH, generator=draw, dtype=torch.float64)
    a, b = pair.a.clone().requires_grad_(), pair.b.clone().requires_grad_()
    error = (pair.base + pair.scale * (b @ a)) @ inputs - outputs
    (error.square().sum() / (2 * knots.BATCH)).backward()
    found = knots.gradients(pair, error.detach(), inputs)
    torch.testing.assert_close(found, (a.grad, b.grad), **EXACT)


SPEC = {"condition": 1e3, "size": 0.01}


@pytest.fixture
def problem():
    return script("quadratic").make_problem((0, 1), 300, **SPEC)


@pytest.mark.parametrize(
    "arm",
    [
        "LoRA",
        "LoRA at balance's ratio",
        "LoRA turning as soft knots do",
        "balancing only",
        "decay, not tied",
    ],
)
def test_what_folds_nothing_stays_above_the_floor_of_rank_one(arm, problem):
    knots = script("quadratic")
    trace = knots.tune(problem, knots.ARMS[arm], [1e-3, 4e-3, 1.6e-2], 60.0)
    assert (trace.loss >= knots.floor(problem, 1) - 1e-12).all()  # Eckart and Young; rounding


@pytest.mark.parametrize("arm", ["folding only", "soft knots", "soft knots, new moments"])
def test_what_folds_falls_far_below_the_floor_of_rank_one(arm, problem):
    knots = script("quadratic")
    trace = knots.tune(problem, knots.ARMS[arm], [1e-3, 2e-3], 15.0)
    best = trace.loss[-1].min(0).values
    assert (best < 0.6 * knots.floor(problem, 1)).all()  # 0.25 to 0.45 of it


def test_where_rank_does_not_bind_folding_brings_nothing_over_balancing():
    knots = script("quadratic")
    problem = knots.make_problem((0, 1, 2, 3), 300, rank=1, **SPEC)
    rates = [2.0**-k for k in range(7, 13)]
    best = {
        arm: float(knots.tune(problem, knots.ARMS[arm], rates, 30.0).loss[-1].mean(1).min())
        for arm in ("LoRA", "balancing only", "soft knots", "classic chain")
    }
    assert best["balancing only"] < 0.5 * best["LoRA"]
    assert best["balancing only"] < best["soft knots"] < best["classic chain"]


def test_the_same_seeds_give_the_same_numbers(problem):
    knots = script("quadratic")
    again = knots.make_problem((0, 1), 300, **SPEC)
    first, second = (
        knots.tune(each, knots.ARMS["classic chain"], [1e-3], 50.0).loss
        for each in (problem, again)
    )
    assert torch.equal(first, second)
