"""Packing: every sequence can be read back; common prefixes are stored once; errors are early."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chainlora.data.examples import Example
from chainlora.engine.packing import PackedBatch, input_sequences, pack


def visible(batch: PackedBatch, position: int) -> list[int]:
    """Return the packed positions a position sees, by the definition of segments, in sequence
    order."""
    index = next(i for i, (start, end, _) in enumerate(batch.segments) if start <= position < end)
    seen = list(range(batch.segments[index].start, position + 1))
    while (index := batch.segments[index].parent) >= 0:
        seen = list(range(batch.segments[index].start, batch.segments[index].end)) + seen
    return seen


def check_reads_back(batch: PackedBatch, examples: list[Example]) -> None:
    sequences = [s for e in examples for s in e.sequences]
    spans = [s for e in examples for s in e.scored]
    expected = [
        (i, p) for i, span in enumerate(spans) for start, end in span for p in range(start, end)
    ]
    assert batch.token_sequence.tolist() == [i for i, _ in expected]
    assert batch.token_target.tolist() == [sequences[i][p] for i, p in expected]
    for n, (i, p) in enumerate(expected):
        seen = visible(batch, int(batch.rows[batch.token_row[n]]))
        assert tuple(batch.input_ids[seen].tolist()) == sequences[i][:p]
        assert batch.position_ids[seen].tolist() == list(range(p))
    assert batch.sequence_length.tolist() == [
        sum(end - start for start, end in span) for span in spans
    ]
    assert len(set(batch.rows.tolist())) == len(batch.rows)


tokens = st.lists(st.integers(0, 2), min_size=2, max_size=7).map(tuple)


@st.composite
def some_examples(draw: st.DrawFn) -> list[Example]:
    examples = []
    for row in range(draw(st.integers(1, 4))):
        sequences = draw(st.lists(tokens, min_size=1, max_size=3).map(tuple))
        scored = []
        for sequence in sequences:
            start = draw(st.integers(1, len(sequence) - 1))
            scored.append(((start, draw(st.integers(start + 1, len(sequence)))),))
        examples.append(Example(row, sequences, tuple(scored), draw(st.sampled_from([None, 0]))))
    return examples


@settings(max_examples=150, deadline=None)
@given(some_examples(), st.booleans(), st.integers(1, 4))
def test_every_sequence_reads_back(examples: list[Example], share: bool, min_shared: int) -> None:
    batch = pack(examples, share_prefixes=share, min_shared=min_shared)
    check_reads_back(batch, examples)
    one_by_one = sum(len(tokens) for each in examples for tokens in input_sequences(each))
    assert batch.num_tokens <= one_by_one
    if not share:
        assert batch.num_tokens == one_by_one
