"""Choose the examples to score together: packs that share prefixes, of an efficient size.

Examples are sorted by their tokens before they are packed. So rows on one passage (MultiRC, BoolQ)
and candidates of one row come into the same pack, which computes their common prefix once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from chainlora.data.examples import Example
from chainlora.engine.packing import fresh_tokens, input_sequences

# Attention costs the square of the size of a prefix tree. At this size, in tokens, it costs as much
# as all other operations: a 135M Llama in float32 on one core takes 2.3 + 1.2·n/1000 ms per token
# for trees of n = 570 to 3990 tokens.
_EVEN_TREE = 1900
_PACKS_A_THREAD = 6
# Tokens; attention then adds at most a quarter, and a pack is worth its overhead.
_SMALL_TREE = 512


def pack_size(examples: Sequence[Example], max_tokens: int, num_threads: int) -> int:
    """Return the tokens per pack: so few that all threads end at about the same time."""
    if num_threads == 1:
        return max_tokens
    tokens = sum(len(tokens) for example in examples for tokens in set(input_sequences(example)))
    even = tokens // (_PACKS_A_THREAD * num_threads)
    return min(max_tokens // num_threads, max(even, _SMALL_TREE))


def evaluation_batches(
    examples: Sequence[Example], *, max_tokens: int, packed: bool
) -> Iterator[list[int]]:
    """Yield lists of example indices: batches of at most `max_tokens`, or single examples.

    Computed tokens count, so padding too. Packed, examples are sorted by tokens, so that neighbours
    share prefixes, and a run with a common prefix is cut when its attention costs more than
    computing the prefix again. Otherwise, they are sorted by length, longest first.
    """
    return (_packed_batches if packed else _padded_batches)(examples, max_tokens)


def _packed_batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    inputs = [sorted(set(input_sequences(example))) for example in examples]
    batch: list[int] = []
    # tokens of the pack, of its last tree, and of the common prefix of this tree
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
    """Return the size of a tree beyond which computing its trunk again in another pack is cheaper.

    With n tokens in a tree, p tokens in its trunk, and attention as expensive as the rest at e
    tokens, the cost per token beside the trunk is (n + n²/e) / (n − p). It is lowest at
    n = p + √(p² + p·e).
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
