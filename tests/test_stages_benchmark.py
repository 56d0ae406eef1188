"""The closed form of benchmarks/stages against an independent least-squares solution, and rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from chainlora import LinkConfig
from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "stages"
RIDGE = 0.01


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    names = ("combine", "links", "run")  # other folders have files of such names, too
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = [importlib.import_module(name) for name in names]
    yield modules[0], modules[2]
    for name in names:
        del sys.modules[name]


def link(seed: int) -> Link:
    draw = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(2, 12, generator=draw), torch.randn(7, 2, generator=draw))
    return Link(0, LinkConfig(rank=2, alpha=4.0), {"m": factors})


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)).double()


def test_a_combination_is_the_nearest_to_each_state_on_its_own_inputs(lab):
    combine, _ = lab
    first, second, third = map(link, range(3))
    states = [[first], [second], [first, third]]  # the third one is on top of the first
    x = [inputs(10 + place) for place in range(3)]
    found = combine.combine(states, [{"m": each.T @ each / len(each)} for each in x], RIDGE)
    left, right = [], []
    for state, each in zip(states, x, strict=True):
        update = sum(one.delta_weight("m").double() for one in state)
        gram = each.T @ each / len(each)
        ridge = (RIDGE * gram.trace() / 12).sqrt() * torch.eye(12).double()
        rows = torch.cat([each / len(each) ** 0.5, ridge])
        left.append(rows)
        right.append(rows @ update.T)
    wanted = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    torch.testing.assert_close(found.delta_weight("m").double(), wanted, rtol=1e-4, atol=1e-4)


def test_rows_are_dealt_balanced_and_mixed(lab):
    _, run = lab
    assert sorted(run.dealt("abc", 6, "k")) == list("aabbcc")
    assert run.dealt("abcdef", 6, "k") != run.dealt("abcdef", 6, "other")
    turns = run.balanced(["aaa", "bbb"], 8, "k")
    assert turns == list("abababab")
    assert "".join(run.mixed("nnnnnnnn", "oo")) == "nnonnnnonn"
