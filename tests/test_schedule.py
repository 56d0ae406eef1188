"""Learning-rate schedules: those of transformers for one link, and what a chain makes of them."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from chainlora.config.schema import TrainConfig
from chainlora.training.step import rate_factor

KINDS = ("linear", "cosine", "constant")


def reference(kind: str, num_steps: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = {} if kind == "constant" else {"num_training_steps": num_steps}
    build = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    schedule = build(optimizer, num_warmup_steps=warmup, **arguments)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_steps", "warmup"), [(1, 0), (10, 0), (10, 1), (10, 3), (10, 10), (5, 8)]
)
def test_one_schedule_is_that_of_transformers(kind, num_steps, warmup):
    config = TrainConfig(schedule=kind, warmup_steps=warmup)
    found = [rate_factor(config, [num_steps], step) for step in range(num_steps)]
    assert found == pytest.approx(
        reference(kind, num_steps, warmup), abs=1e-12
    )  # the same float64 formula


@pytest.mark.parametrize("kind", KINDS)
def test_restarting_gives_each_link_its_own(kind):
    keys = {"schedule": kind, "restart_schedule": True, "restart_warmup_steps": 1}
    config = TrainConfig(warmup_steps=2, **keys)
    links = [
        [rate_factor(TrainConfig(schedule=kind, warmup_steps=w), [n], k) for k in range(n)]
        for n, w in ((5, 2), (4, 1), (3, 1))
    ]
    assert [rate_factor(config, [5, 4, 3], step) for step in range(12)] == [
        *links[0],
        *links[1],
        *links[2],
    ]


def test_jagged_cosine_rises_from_zero_to_the_cosine_of_the_whole_run():
    num_steps, warmup, rise = 60, 4, 5
    cosine = reference("cosine", num_steps, warmup)
    config = TrainConfig(schedule="cosine", warmup_steps=warmup, restart_warmup_steps=rise)
    found = [rate_factor(config, [20] * 3, step) for step in range(num_steps)]
    for step in range(num_steps):
        within = step % 20
        if step < 20 or within >= rise:
            assert found[step] == pytest.approx(cosine[step], abs=1e-12)
        else:
            assert found[step] == pytest.approx(
                within / rise * cosine[step - within + rise], abs=1e-12
            )
    assert found[20] == found[40] == 0
    assert found[45] == pytest.approx(0.5 * (1 + math.cos(math.pi * 41 / 56)))
