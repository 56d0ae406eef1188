"""Scores: the mean log-probability of every sequence, in packs that share what they can.

Examples are put in the order of their tokens before they are packed, so that rows on one passage
(MultiRC, BoolQ) and the candidates of one row meet in the same pack, where what they share is
computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from chainlora.data.examples import Example
from chainlora.engine.head import candidate_scores, logit_transform
from chainlora.engine.hidden_states import Path, choose_path, hidden_states
from chainlora.engine.packing import fresh_tokens, input_sequences, pack
from chainlora.engine.threads import Lanes, count_lanes
from chainlora.errors import ModelError

Progress = Callable[[int, int], None]
# Attention inside a tree of sequences is square in its size. At this many tokens it costs as much
# as all the rest: a 135M Llama in float32 on one core takes 2.3 + 1.2·n/1000 ms a token in trees of
# n = 570 to 3990.
_EVEN_TREE = 1900
_PACKS_A_LANE = 6
_SMALL_TREE = 512  # where attention adds a quarter at most, and a pack is worth its overhead


def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    path: Path | None = None,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Return, per example, the mean log-probability per token of each of its sequences.

    Packs run in lanes where the model may (`lanes`); `max_tokens` bounds what they compute
    together. Raises ModelError when a score is not a number.
    """
    path = choose_path(model) if path is None else path
    device = next(model.parameters()).device
    scores: list[list[float]] = [[] for _ in examples]
    done = 0
    logit_transform(model)  # found by a probe once, and not by two lanes at a time

    @torch.inference_mode()
    def score(indices: list[int]) -> tuple[list[int], list[float]]:
        batch = pack([examples[i] for i in indices]).to(device)
        return indices, candidate_scores(
            model, hidden_states(model, batch, path=path), batch
        ).tolist()

    with evaluating(model), Lanes(count_lanes(model, path, training=False)) as lanes:
        size = _pack_size(examples, max_tokens, lanes.count)
        for indices, flat in lanes.map(
            score, evaluation_batches(examples, max_tokens=size, path=path)
        ):
            for index in indices:
                count = len(examples[index].sequences)
                scores[index], flat = flat[:count], flat[count:]
                if any(math.isnan(score) for score in scores[index]):
                    raise ModelError(
                        f"scores must be numbers (got nan at row {examples[index].row}); the "
                        "model's "
                        "weights or its dtype are at fault, try float32"
                    )
            done += len(indices)
            if progress is not None:
                progress(done, len(examples))
    return scores


def _pack_size(examples: Sequence[Example], max_tokens: int, lanes: int) -> int:
    """Return the tokens of one pack: a lane's share, and small enough that lanes end at about the
    same time."""
    if lanes == 1:
        return max_tokens
    tokens = sum(
        len(sequence) for example in examples for sequence in set(input_sequences(example))
    )
    return min(max_tokens // lanes, max(tokens // (_PACKS_A_LANE * lanes), _SMALL_TREE))


def evaluation_batches(
    examples: Sequence[Example], *, max_tokens: int, path: Path = Path.PACKED
) -> Iterator[list[int]]:
    """Yield lists of example indices, each a pack that computes at most `max_tokens` (or a single
    example).

    Packed: in the order of tokens, so that neighbours share all they can; a run of sequences with a
    common beginning is cut off at a length where its attention would cost more than reading the
    beginning again. Padded: longest first, counting the padding.
    """
    return (
        _packed_batches(examples, max_tokens)
        if path is Path.PACKED
        else _padded_batches(examples, max_tokens)
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in inference and eval mode, and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _packed_batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    inputs = [sorted(set(input_sequences(example))) for example in examples]
    batch: list[int] = []
    tokens = tree = trunk = (
        0  # of the pack, of its last tree, and of the beginning that this tree shares
    )
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
    """Return the size of a tree, in tokens, past which it is cheaper to read its trunk again in
    another pack.

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
