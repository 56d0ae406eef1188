"""Law 19: the rows of a mixture are a function of (seed, step); no row is on both sides."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chainlora.data.mixture import held_out_bound, is_held_out, mixed_rows, replayed_rows

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
WEIGHTS = st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 2.2, 3])


@given(counts=COUNTS, seed=st.integers(0, 3), data=st.data())
def test_a_weight_is_copies_per_epoch(counts, seed, data):
    weights = [data.draw(WEIGHTS) for _ in counts]
    epochs = [mixed_rows(counts, weights, seed, epoch) for epoch in range(20)]
    seen = Counter(np.concatenate(epochs).tolist())
    edges = np.cumsum([0, *counts])
    for weight, first, end in zip(weights, edges[:-1], edges[1:], strict=True):
        assert all(seen[row] == round(20 * weight) for row in range(first, end))
        for rows in epochs:  # every one has its share, to a row
            inside = sum(first <= row < end for row in rows.tolist())
            assert abs(inside - weight * (end - first)) < 1
    for epoch in data.draw(st.permutations(range(20)))[:3]:  # in any order
        assert (mixed_rows(counts, weights, seed, epoch) == epochs[epoch]).all()


@given(
    num_rows=st.integers(1, 30),
    share=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_replay_takes_its_share_and_every_row_in_turn(num_rows, share, batch_size, seed):
    steps = [replayed_rows(num_rows, share, batch_size, seed, step) for step in range(100)]
    assert sum(map(len, steps)) == round(100 * share * batch_size)
    assert max(map(len, steps)) - min(map(len, steps)) <= 1
    counts = Counter(np.concatenate(steps).tolist())
    assert max(counts.values()) - min(counts[row] for row in range(num_rows)) <= 1
    assert (replayed_rows(num_rows, share, batch_size, seed, 70) == steps[70]).all()


@given(
    prompts=st.lists(st.text(max_size=5), min_size=1, max_size=60),
    later=st.lists(st.text(max_size=5), max_size=60),
    validation=st.one_of(st.integers(1, 20), st.sampled_from([0.05, 0.5, 1.0])),
)
def test_no_row_changes_sides_when_rows_are_added(prompts, later, validation):
    bound = held_out_bound(prompts, validation)
    side = {prompt: is_held_out(prompt, bound) for prompt in prompts}
    if isinstance(validation, int):
        assert sum(side.values()) == min(validation, len(side))
    else:
        assert held_out_bound([*prompts, *later], validation) == bound
