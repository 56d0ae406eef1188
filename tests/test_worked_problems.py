"""The functions of the worked problems in examples/, against what theory says of them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_counter_example_of_rac_lora():
    rac = example("rac_counter_example")
    for seed in range(5):
        near = {method: rac.tune(method, seed, start=1.0) for method in rac.METHODS}
        far = {method: rac.tune(method, seed, start=5.0)[-1] for method in rac.METHODS}
        assert near["lora"][-1] == pytest.approx(
            rac.best_of_rank_one(), rel=1e-3
        )  # stuck at rank one
        assert near["chain"][-1] < 1e-3
        assert math.isinf(far["lora"])
        assert math.isinf(far["chain"])
        assert far["rac"] < 1e-3
        falls = near["rac"][1:] - near["rac"][:-1]
        assert (
            falls.max() <= 1e-15
        )  # below the safe rate f never rises, up to rounding of numbers under 1


def test_the_matrix_case_against_eckart_and_young():
    case = example("matrix_residual")
    matrix = case.target()
    bound = case.eckart_young(matrix, 6, 2)
    assert case.residuals(matrix, "exact", num_links=6) == pytest.approx(
        bound, abs=1e-9
    )  # float64: a few roundings
    for kind in case.KINDS:
        found = case.residuals(matrix, kind, 15, num_links=6)
        assert all(
            value >= best - 1e-9 for value, best in zip(found, bound, strict=True)
        )  # nothing beats it
    start, random = (
        case.residuals(matrix, kind, 15, num_links=4)[-1] for kind in ("tuned FW", "tuned")
    )
    assert start == pytest.approx(
        bound[4], rel=1e-2
    )  # fifteen steps shrink what is left of a direction to 1 %
    assert random > 2 * bound[4]
