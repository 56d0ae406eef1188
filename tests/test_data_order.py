"""The order of an epoch: every row once, a pure function of (seed, epoch), as in version 0.1."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chainlora import make_config
from chainlora.data.examples import Example
from chainlora.data.rows import MemoryRows
from chainlora.training.batches import make_batches


def batches_of_version_0_1(lengths, batch_size, seed, epoch, group_by_length=False):
    """The function of version 0.1, word for word: committed results and resumed runs hang on it."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if group_by_length:
        window = 32 * batch_size
        order = [
            row
            for start in range(0, len(order), window)
            for row in sorted(order[start : start + window], key=lambda row: lengths[row])
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if group_by_length:
        batches = [
            batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()
        ]
    return batches


def make_rows(num_rows: int) -> MemoryRows:
    return MemoryRows(
        [Example(i, (tuple(range((7 * i) % 31 + 2)),), (((1, 2),),)) for i in range(num_rows)]
    )


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 400),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 5),
    group=st.booleans(),
    data=st.data(),
)
def test_steps_see_the_rows_they_saw_in_version_0_1(
    num_rows, batch_size, accumulation, seed, group, data
):
    train = {
        "batch_size": batch_size,
        "gradient_accumulation": accumulation,
        "seed": seed,
        "group_by_length": group,
    }
    chain = {"ranks": [1], "steps": [1]}
    config = make_config(
        {"model": "none", "data": {"train": "none.jsonl"}, "chain": chain, "train": train}
    )
    rows = make_rows(num_rows)
    plan, lengths = make_batches(config, rows), [len(e.sequences[0]) for e in rows]
    # Steps in any order, as a resumed run and steps packed ahead ask for them.
    for step in data.draw(st.lists(st.integers(0, 5 * plan.steps_per_epoch), max_size=12)):
        epoch, within = divmod(step, plan.steps_per_epoch)
        old = batches_of_version_0_1(lengths, batch_size, seed, epoch, group)
        assert plan.batches(step) == old[within * accumulation : (within + 1) * accumulation]
