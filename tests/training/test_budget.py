"""How long links are, and at which rate: tokens, soft knots, schedules."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures.tiny import tiny_model
from conftest import write_rows
from helpers import assert_same_links
from torch.utils._python_dispatch import TorchDispatchMode

from chainlora import Chain, LinkConfig, train
from chainlora.config.schema import TrainConfig
from chainlora.training.step import rate_factor


def test_tokens_are_read_by_whole_steps(configure, tmp_path):
    """A link ends with the step that reaches its tokens, also an epoch later."""
    rows = [{"prompt": f"{'good ' * (k % 7)}bad", "completion": " film"} for k in range(20)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"task": None, "train": str(file), "validation": None}
    seen = []

    def steps(name: str, **length) -> list[int]:
        config = configure(name, data=data, chain={"ranks": [2, 2], "steps": None} | length)
        return [link["num_steps"] for link in train(config, listener=seen.append)["links"]]

    assert steps("steps", steps=[4, 5]) == [4, 5]  # three steps an epoch
    epoch = next(event for event in seen if event.name == "plan").data["train"]["tokens"]
    assert steps("whole", tokens=[epoch, epoch]) == [3, 3]
    assert steps("more", tokens=[epoch + 1, 2 * epoch - 1]) == [4, 5]
    assert_same_links(tmp_path / "more", tmp_path / "steps")


def test_the_norm_is_taken_on_the_host():
    """MPS has no float64: what is cast to it is a copy on the CPU, not the link's own factor."""
    cast = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (kwargs or {}).get("dtype") is torch.float64:
                cast.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    chain = Chain(tiny_model("llama"))
    adapter = chain.extend(LinkConfig(rank=2, alpha=6, target_modules=("q_proj", "down_proj")))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.normal_()
    with Casts():
        norm = chain.live_norm()
    assert cast
    assert not {parameter.data_ptr() for parameter in chain.parameters()} & {*cast}
    deltas = [layer.get_delta_weight("default").detach() for layer in adapter.layers.values()]
    assert norm == pytest.approx(float(sum(d.square().sum() for d in deltas)) ** 0.5, rel=1e-5)


# --- schedules ---


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
    # the same float64 formula
    assert found == pytest.approx(reference(kind, num_steps, warmup), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_restarting_gives_each_link_its_own(kind):
    keys = {"schedule": kind, "restart_schedule": True, "restart_warmup_steps": 1}
    config = TrainConfig(warmup_steps=2, **keys)
    expected = [
        rate_factor(TrainConfig(schedule=kind, warmup_steps=warmup), [length], step)
        for length, warmup in ((5, 2), (4, 1), (3, 1))
        for step in range(length)
    ]
    assert [rate_factor(config, [5, 4, 3], step) for step in range(12)] == expected
