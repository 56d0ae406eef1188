"""Law 19: the rows of a mixture are a function of (seed, step); no row is on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chainlora.data.examples import Example
from chainlora.data.mixture import Mixture, example_hashes, held_out_bound, prompt_hashes
from chainlora.data.rows import MemoryRows

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
WEIGHTS = st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 2.2, 3])


@given(counts=COUNTS, seed=st.integers(0, 3), data=st.data())
def test_a_weight_is_copies_per_epoch(counts, seed, data):
    weights = [data.draw(WEIGHTS) for _ in counts]
    mixture = Mixture(tuple(counts), tuple(weights))
    epochs = [mixture.epoch(seed, epoch) for epoch in range(20)]
    edges = np.cumsum([0, *counts])
    for weight, first, end in zip(weights, edges[:-1], edges[1:], strict=True):
        size = max(1, round(Fraction(str(weight)) * int(end - first))) if end > first else 0
        for rows in epochs:
            assert sum(first <= row < end for row in rows.tolist()) == size
        for num_epochs in (1, 3, 20):  # all rows once before one comes again
            seen = Counter(np.concatenate(epochs[:num_epochs]).tolist())
            times = [seen[row] for row in range(first, end)]
            assert not times or max(times) - min(times) <= 1
        if weight == 1:
            assert all(
                (rows[(rows >= first) & (rows < end)] == range(first, end)).all() for rows in epochs
            )
    for epoch in data.draw(st.permutations(range(20)))[:3]:  # in any order
        assert (mixture.epoch(seed, epoch) == epochs[epoch]).all()


@given(
    num_rows=st.integers(1, 30),
    share=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_replay_takes_its_share_and_every_row_in_turn(num_rows, share, batch_size, seed):
    mixture = Mixture((7,), (1.0,), num_rows, share)
    steps = [mixture.added(batch_size, seed, step) for step in range(100)]
    assert sum(map(len, steps)) == round(100 * share * batch_size)
    assert max(map(len, steps)) - min(map(len, steps)) <= 1
    counts = Counter(np.concatenate(steps).tolist())
    assert max(counts.values()) - min(counts[7 + row] for row in range(num_rows)) <= 1
    assert mixture.added(batch_size, seed, 70) == steps[70]


WORDS = st.lists(st.integers(3, 9), min_size=0, max_size=3).map(tuple)


def row(number: int, prompt: tuple[int, ...], *answers: tuple[int, ...]) -> Example:
    """A row whose sequences begin with <s> and a prompt."""
    sequences = tuple((1, *prompt, *answer) for answer in answers)
    return Example(number, sequences, tuple(((1 + len(prompt), len(s)),) for s in sequences))


@given(
    prompts=st.lists(WORDS, min_size=1, max_size=60),
    later=st.lists(WORDS, max_size=60),
    validation=st.one_of(st.integers(1, 20), st.sampled_from([0.05, 0.5])),
)
def test_no_row_changes_sides_when_rows_are_added(prompts, later, validation):
    hashes = prompt_hashes([row(k, prompt, (2,)) for k, prompt in enumerate(prompts)], 1)
    bound = held_out_bound(hashes, validation)
    if isinstance(validation, int):
        assert sum(np.unique(hashes) < bound) == min(validation, len(set(prompts)))
    moved = [row(k, prompt, (5,), (7, 8)) for k, prompt in enumerate([*later, *prompts]) if prompt]
    again = dict(zip([e.sequences[0][1:-1] for e in moved], prompt_hashes(moved, 1), strict=True))
    for prompt, found in zip(prompts, hashes, strict=True):  # whatever is answered, in any order
        assert not prompt or again[prompt] == found


def test_rows_without_a_prompt_are_told_apart_by_all_they_say_and_blocks_go_together():
    texts = [row(0, (), (5, 6)), row(1, (), (5, 7)), row(1, (), (5, 6)), row(2, (), (5, 6))]
    first, second, block, third = prompt_hashes(texts, 1).tolist()
    assert first == third != second == block
    assert len(set(prompt_hashes([row(0, (4,), (5,)), row(1, (4,), (6,))], 2).tolist())) == 2
    labelled = replace(texts[0], label=0)
    assert len(set(example_hashes(MemoryRows([*texts, labelled])).tolist())) == 3
