"""Which examples are scored together: packs that share what they can, of a size that pays.

Examples are put in the order of their tokens before they are packed, so that rows on one passage
(MultiRC, BoolQ) and the candidates of one row meet in the same pack, where what they share is
computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from chainlora.data.examples import Example
from chainlora.engine.packing import fresh_tokens, input_sequences

# Attention inside a tree of sequences is square in its size. At this many tokens it costs as much
# as all the rest: a 135M Llama in float32 on one core takes 2.3 + 1.2·n/1000 ms a token in trees of
# n = 570 to 3990.
_EVEN_TREE = 1900
_PACKS_A_THREAD = 6
_SMALL_TREE = 512  # where attention adds a quarter at most, and a pack is worth its overhead


def pack_size(examples: Sequence[Example], max_tokens: int, num_threads: int) -> int:
    """Return the tokens of one pack: so few that threads end at about the same time."""
    if num_threads == 1:
        return max_tokens
    tokens = sum(len(tokens) for example in examples for tokens in set(input_sequences(example)))
    even = tokens // (_PACKS_A_THREAD * num_threads)
    return min(max_tokens // num_threads, max(even, _SMALL_TREE))


def evaluation_batches(
    examples: Sequence[Example], *, max_tokens: int, packed: bool
) -> Iterator[list[int]]:
    """Yield lists of example indices, each a pack of at most `max_tokens`, or a single example.

    Packed: in the order of tokens, so that neighbours share all they can; a run of sequences with a
    common beginning is cut off at a length where its attention would cost more than reading the
    beginning again. Padded: longest first, counting the padding.
    """
    return (_packed_batches if packed else _padded_batches)(examples, max_tokens)


def _packed_batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    inputs = [sorted(set(input_sequences(example))) for example in examples]
    batch: list[int] = []
    # of the pack, of its last tree, and of the beginning that this tree shares
    tokens = tree = trunk = 0
    last: tuple[int, ...] = ()
    for index in sorted(range(len(examples)), key=lambda i: (inputs[i][0], i)):
        fresh, common = fresh_tokens(inputs[index], last)
        trunk = min(trunk, common) if common else len(inputs[index][0])
        tree = tree + fresh if common else fresh
        if batch and (tokens + fresh > max_tokens or (common and tree > _largest_tree(trunk))):
            yield batch
            batch, tokens = [], 0
            tree = fresh = fresh_tokens(inputs[index], ())[0]
            trunk = len(inputs[index][0])
        batch.append(index)
        tokens, last = tokens + fresh, inputs[index][-1]
    if batch:
        yield batch


def _largest_tree(trunk: int) -> int:
    """Return the tokens of a tree past which reading its trunk again in another pack is cheaper.

    With n tokens to a tree of trunk p, and attention as dear as the rest at e tokens, one beside
    the trunk costs (n + n²/e) / (n − p): least at n = p + √(p² + p·e).
    """
    return max(_SMALL_TREE, int(trunk + math.sqrt(trunk**2 + trunk * _EVEN_TREE)))


def _padded_batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    inputs = [set(input_sequences(example)) for example in examples]
    longest = [max(map(len, sequences)) for sequences in inputs]
    batch: list[int] = []
    rows = width = 0
    for index in sorted(range(len(examples)), key=lambda i: (-longest[i], i)):
        if batch and (rows + len(inputs[index])) * width > max_tokens:
            yield batch
            batch, rows = [], 0
        width = width if batch else longest[index]
        batch.append(index)
        rows += len(inputs[index])
    if batch:
        yield batch
