"""Pack token sequences into one row, without padding and with each common prefix stored once.

A batch of sequences is a prefix tree. Its nodes are *segments* of one row, in depth-first order. A
token attends causally inside its own segment and to all tokens of its ancestor segments, so each
sequence sees exactly its own tokens. This saves three kinds of work, for any task: padding; a
common passage of several prompts, which is computed once; and candidates of one token, which have
identical inputs, so that one pass scores them all.

The last target of a sequence is never an input, so it is cut off.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from chainlora.data.examples import Example
from chainlora.errors import DataError
from chainlora.models.text_config import base_model, text_config

# Shortest common prefix that becomes a segment, which costs one attention call.
MIN_SHARED = 8

_Tokens = tuple[int, ...]
_Chain = list[tuple[int, int]]  # (first position, packed start) of each segment of a sequence


class Segment(NamedTuple):
    """Tokens ``[start, end)`` of the packed row, which continue the segment `parent`, or -1."""

    start: int
    end: int
    parent: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several examples as one row of T tokens without padding; common prefixes are stored once.

    Segments are in depth-first order: a parent comes before its children, and each tree is
    contiguous. E examples have S sequences with N scored tokens, which are predicted from R
    distinct positions.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, position of each token in its own sequence
    segments: tuple[Segment, ...]
    rows: Tensor  # [R] packed positions whose next-token logits are needed, unique, ascending
    token_row: Tensor  # [N] index into `rows` of each scored token
    token_target: Tensor  # [N] token to predict
    token_sequence: Tensor  # [N] index of its sequence
    sequence_example: Tensor  # [S] index of its example
    sequence_slot: Tensor  # [S] index among the sequences of its example
    sequence_length: Tensor  # [S] number of scored tokens, float32
    labels: Tensor  # [E] index of the right candidate, or -1
    reference: Tensor  # [S] score of each sequence at the start of the run, float32; else [0]
    max_sequences: int  # largest number of sequences per example
    one_position: bool  # whether candidates are single tokens, predicted from one position

    @property
    def num_tokens(self) -> int:
        """T, the number of computed tokens."""
        return self.input_ids.shape[0]

    @property
    def num_examples(self) -> int:
        """E, the number of examples."""
        return self.labels.shape[0]

    @property
    def num_scored_tokens(self) -> int:
        """N, the number of scored tokens."""
        return self.token_row.shape[0]

    @property
    def longest(self) -> int:
        """Length of the longest input sequence."""
        depths: list[int] = []
        for start, end, parent in self.segments:
            depths.append(end - start + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: Any = {name: t.to(device) for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def paths(segments: Sequence[Segment]) -> list[list[int]]:
    """Return, for each segment, the packed positions of its sequence from the start to its end."""
    positions: list[list[int]] = []
    for start, end, parent in segments:
        positions.append((positions[parent] if parent >= 0 else []) + list(range(start, end)))
    return positions


def pack(
    examples: Sequence[Example], *, share_prefixes: bool = True, min_shared: int = MIN_SHARED
) -> PackedBatch:
    """Pack the sequences of at least one example into one row, keeping their order in its tensors.

    Args:
        share_prefixes: store common prefixes once; otherwise every sequence is one segment.
        min_shared: shortest common prefix that becomes a segment. A sequence that is a prefix of
            another one is always stored inside it, at no cost.

    Raises:
        DataError: a sequence has no scored token, or a span outside of it.
    """
    flatten = itertools.chain.from_iterable
    inputs = [*flatten(map(input_sequences, examples))]
    tree = _Tree(inputs, share_prefixes, min_shared)
    positions, targets = _scored_tokens(examples, tree.chains)
    rows = sorted({*flatten(positions)})
    row_of = {position: row for row, position in enumerate(rows)}
    counts = [len(example.sequences) for example in examples]
    lengths = list(map(len, positions))
    return PackedBatch(
        input_ids=torch.tensor(tree.tokens),
        position_ids=torch.tensor(tree.positions),
        segments=tuple(tree.segments),
        rows=torch.tensor(rows),
        token_row=torch.tensor([row_of[p] for p in flatten(positions)]),
        token_target=torch.tensor([*flatten(targets)]),
        token_sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        sequence_example=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        sequence_slot=torch.tensor([slot for count in counts for slot in range(count)]),
        sequence_length=torch.tensor(lengths, dtype=torch.float32),
        labels=torch.tensor([-1 if e.label is None else e.label for e in examples]),
        reference=torch.tensor([*flatten(e.reference for e in examples)], dtype=torch.float32),
        max_sequences=max(counts),
        one_position=_one_position(counts, positions),
    )


def _scored_tokens(
    examples: Sequence[Example], chains: Sequence[_Chain]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return, per sequence, the packed position that predicts each scored token, and the token."""
    positions: list[list[int]] = []
    targets: list[list[int]] = []
    remaining = iter(chains)
    for example in examples:
        for tokens, spans in zip(example.sequences, example.scored, strict=True):
            scored = [p for start, end in spans for p in range(start, end)]
            _check(example, scored, tokens)
            segments = next(remaining)
            positions.append([_packed_position(segments, p - 1) for p in scored])
            targets.append([tokens[p] for p in scored])
    return positions, targets


def input_sequences(example: Example) -> Iterator[tuple[int, ...]]:
    """Yield the input tokens of each sequence: all tokens before its last target."""
    for tokens, spans in zip(example.sequences, example.scored, strict=True):
        yield tokens[: max(max((end for _, end in spans), default=1) - 1, 0)]


def fresh_tokens(inputs: Sequence[tuple[int, ...]], last: tuple[int, ...] = ()) -> tuple[int, int]:
    """Return an upper bound of the tokens that `pack` adds for sorted inputs after `last`.

    Each sequence is compared only with the one before it. Also returns the length of the prefix
    that the first input shares with `last`, 0 if it is too short to be stored once.
    """
    fresh, first = 0, 0
    for place, sequence in enumerate(inputs):
        common = _common_prefix(last, sequence)
        stored = common if common >= min(MIN_SHARED, len(sequence)) else 0
        first = stored if place == 0 else first
        fresh += len(sequence) - stored
        last = sequence
    return fresh, first


def _check(example: Example, scored: list[int], tokens: tuple[int, ...]) -> None:
    if not scored:
        raise DataError(
            f"every sequence must have a scored token (got none in row {example.row}); drop the row"
        )
    if min(scored) < 1 or max(scored) >= len(tokens):
        raise DataError(
            f"scored spans must lie in [1, {len(tokens)}) (got {min(scored)} to {max(scored)} "
            f"in row {example.row})"
        )


def _one_position(counts: list[int], positions: list[list[int]]) -> bool:
    remaining = iter(positions)
    groups = [list(itertools.islice(remaining, count)) for count in counts]
    return all(len(p) == 1 and p == group[0] for group in groups for p in group)


def _packed_position(segments: _Chain, position: int) -> int:
    """Return the packed position of a token, from its position in the sequence."""
    first, start = segments[bisect_right(segments, position, key=lambda s: s[0]) - 1]
    return start + position - first


class _Tree:
    """The prefix tree of some sequences, in depth-first order.

    Sorting puts sequences with a common prefix side by side. The common prefix of a run is then the
    one of its first and last member, and a sequence that is a prefix of any other one is a prefix
    of the next leaf.
    """

    def __init__(self, inputs: Sequence[tuple[int, ...]], share: bool, min_shared: int) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.chains: list[_Chain] = [[] for _ in inputs]
        if not share:
            for index, sequence in enumerate(inputs):
                self.chains[index] = self._add(sequence, 0, -1, [])
            return
        leaves: list[int] = []
        leaf_of: dict[int, int] = {}
        for index in sorted(range(len(inputs)), key=lambda i: inputs[i])[::-1]:
            if not leaves or inputs[leaves[-1]][: len(inputs[index])] != inputs[index]:
                leaves.append(index)
            leaf_of[index] = leaves[-1]
        leaves.reverse()
        self._branch([inputs[i] for i in leaves], leaves, max(min_shared, 1))
        for index, leaf in leaf_of.items():
            self.chains[index] = self.chains[leaf]

    def _branch(self, sequences: list[_Tokens], owners: list[int], min_shared: int) -> None:
        """Add sorted sequences to the tree; no sequence may be a prefix of another."""
        todo: list[tuple[int, int, int, int, _Chain]] = [(0, len(sequences), 0, -1, [])]
        while todo:  # a stack: depth first, without a recursion limit
            low, high, depth, parent, chain = todo.pop()
            if high - low == 1:
                self.chains[owners[low]] = self._add(sequences[low], depth, parent, chain)
                continue
            common = _common_prefix(sequences[low], sequences[high - 1], depth)
            if common - depth >= min_shared:
                chain = self._add(sequences[low][:common], depth, parent, chain)
                depth, parent = common, len(self.segments) - 1
            runs = []
            first = low
            for i in range(low + 1, high + 1):
                if i == high or sequences[i][common] != sequences[first][common]:
                    runs.append((first, i, depth, parent, chain))
                    first = i
            todo.extend(reversed(runs))

    def _add(self, sequence: _Tokens, depth: int, parent: int, chain: _Chain) -> _Chain:
        start = len(self.tokens)
        self.tokens.extend(sequence[depth:])
        self.positions.extend(range(depth, len(sequence)))
        self.segments.append(Segment(start, len(self.tokens), parent))
        return [*chain, (depth, start)]


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...], known: int = 0) -> int:
    """Return the length of the common prefix, at least `known`.

    Bisects over slices, which Python compares faster than single items.
    """
    low, high = known, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# --- the plain forward, the reference for every fast path ---


def padded_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return hidden states [R, d] at `batch.rows`, with one padded row per leaf of the tree."""
    index, mask, place = unpacked(batch)
    # Some models find padding by its token. Some configs have -1 for no pad token.
    pad = max(getattr(text_config(model), "pad_token_id", None) or 0, 0)
    ids = torch.where(mask.bool(), batch.input_ids[index], pad)
    output = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, place)


def unpacked(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the padded form of a batch.

    That is packed positions by leaf [L, longest], their mask, and the place of each of `batch.rows`
    in the flattened array [R].
    """
    parents = {segment.parent for segment in batch.segments}
    leaves = [path for i, path in enumerate(paths(batch.segments)) if i not in parents]
    index = pad_sequence([torch.tensor(leaf) for leaf in leaves], batch_first=True)
    mask = pad_sequence([torch.ones(len(leaf), dtype=index.dtype) for leaf in leaves], True)
    where = {
        position: row * index.shape[1] + i
        for row, leaf in enumerate(leaves)
        for i, position in enumerate(leaf)
    }
    place = torch.tensor([where[row] for row in batch.rows.tolist()])
    device = batch.input_ids.device
    return index.to(device), mask.to(device), place.to(device)
