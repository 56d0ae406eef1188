"""The attention layout of a packed row: which queries see which keys, in which batches.

The queries of a segment see the keys of its ancestors, and its own keys up to their position.
Segments of similar shape are batched, with padding. On a CPU, the queries of a long sequence are
cut into pieces, each with the keys up to its end: half of the score matrix is never computed, and
the scores of a piece stay in the cache.

The layout of a batch is computed once. Every layer gets it as a keyword argument of the model's
forward, so it also reaches layers that gradient checkpointing runs again in backward.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainlora.engine.packing import Segment, paths

# Fills vector registers: a bfloat16 softmax over 85 keys takes longer than over 96.
KEYS_MULTIPLE = 16
# Longest sequence whose probabilities are kept for backward; longer ones would need most of the
# memory and are computed again.
LONGEST_KEPT = 384
PIECE = 128  # queries per piece of a longer sequence
# Beyond this length SDPA is faster. Measured with one core, forward and backward, 9 heads of 64:
# bfloat16 at 4,096 tokens: pieces 0.76 s, SDPA 0.99 s; float32 at 1,024: 0.085 and 0.108 s, at
# 4,096: 1.35 and 1.05 s.
LONGEST_BY_MATMUL = {torch.bfloat16: math.inf}
LONGEST_BY_MATMUL_ELSE = 2048
# Fixed cost of one batch, about 25 small calls, in scores (queries × keys) of one head.
_CALL_COST = {"cpu": 1_000}
_CALL_COST_ELSEWHERE = 200_000


@dataclass(frozen=True, slots=True)
class Group:
    """A batch of B segments: packed positions of their queries and keys, padded.

    Key j is token j of the sequence. Query i is token ``depth[b, i]`` and sees the keys j up to it.
    Padded keys come after every real query; the results of padded queries are dropped.
    """

    queries: Tensor  # [B, Tq]
    keys: Tensor  # [B, Tk]
    depth: Tensor  # [B, Tq]
    padding: Tensor  # indices of padded queries among B · Tq
    causal: bool  # whether query i is token i in every row
    alike: bool  # whether all rows have equal depths
    first: int  # every query sees all keys before this one
    keep: bool  # whether to keep probabilities for backward
    spans: tuple[range, ...] | None  # keys of each row, if they are contiguous in the packed row

    def visible(self) -> Tensor:
        """Return which keys from `first` on each query sees: bool [B or 1, Tq, Tk − first].

        The first dimension is 1 if all rows are alike.
        """
        depth = self.depth[:1] if self.alike else self.depth
        keys = torch.arange(self.first, self.keys.shape[1], device=depth.device)
        return keys <= depth[:, :, None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some positions of the packed row, and the layout with queries only there."""

    index: Tensor  # [R]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Layout:
    """The attention layout of a packed row."""

    groups: tuple[Group, ...]
    num_queries: int
    num_tokens: int
    by_matmul: bool  # plain matmuls, otherwise SDPA
    flat: bool  # whether every token is a key in exactly one row of a group
    rows: Rows | None = None  # for a last layer that is used only at some positions
    plans: dict[Any, Any] = field(default_factory=dict)  # cache, by numbers of heads and dtype


def make_layout(
    segments: Sequence[Segment], device: torch.device, dtype: torch.dtype, rows: Tensor
) -> Layout:
    """Return the attention layout of a packed row, for the attention's device and dtype.

    If `rows` [R] are not all positions, it also has a layout with queries only there.
    """
    whole, num_tokens = paths(segments), segments[-1].end
    limit = LONGEST_BY_MATMUL.get(dtype, LONGEST_BY_MATMUL_ELSE)
    by_matmul = device.type == "cpu" and max(map(len, whole)) <= limit
    trimmed = None
    if rows.shape[0] < num_tokens:
        units = _units(segments, whole, rows.tolist())
        trimmed = Rows(rows, _layout(units, rows.shape[0], num_tokens, by_matmul, device))
    units = _units(segments, whole, range(num_tokens))
    return _layout(units, num_tokens, num_tokens, by_matmul, device, trimmed)


class _Unit(NamedTuple):
    """Some queries of one sequence, and the keys that they see."""

    queries: Sequence[int]  # index among all queries
    depths: Sequence[int]  # position in the sequence
    keys: list[int]

    def pieces(self) -> Iterator[_Unit]:
        """Yield the unit; for a long sequence, yield pieces of its queries with their keys."""
        if len(self.keys) <= LONGEST_KEPT:
            yield self
            return
        for low in range(0, len(self.queries), PIECE):
            depths = self.depths[low : low + PIECE]
            yield _Unit(self.queries[low : low + PIECE], depths, self.keys[: depths[-1] + 1])


def _units(
    segments: Sequence[Segment], whole: Sequence[list[int]], rows: Sequence[int]
) -> list[_Unit]:
    """Return, for each segment with queries at `rows`, these queries and the keys they see."""
    units = []
    for (start, end, _), path in zip(segments, whole, strict=True):
        low, high = bisect_left(rows, start), bisect_left(rows, end)
        if low < high:
            first = len(path) - end
            depths = [first + row for row in rows[low:high]]
            units.append(_Unit(range(low, high), depths, path[: depths[-1] + 1]))
    return units


def _layout(
    units: list[_Unit],
    num_queries: int,
    num_tokens: int,
    by_matmul: bool,
    device: torch.device,
    rows: Rows | None = None,
) -> Layout:
    if by_matmul:
        units = [piece for unit in units for piece in unit.pieces()]
    cost = _CALL_COST.get(device.type, _CALL_COST_ELSEWHERE)
    groups = []
    for causal in (True, False):
        of_kind = [u for u in units if (len(u.queries) == len(u.keys)) == causal]
        of_kind.sort(key=lambda u: (len(u.queries), len(u.keys)))
        for low, high in _partition([(len(u.queries), len(u.keys)) for u in of_kind], cost):
            groups.append(_group(of_kind[low:high], causal, device))
    flat = sum(len(unit.keys) for unit in units) == num_tokens
    return Layout(tuple(groups), num_queries, num_tokens, by_matmul, flat, rows)


def _partition(shapes: list[tuple[int, int]], call_cost: int) -> list[tuple[int, int]]:
    """Cut sorted sizes (queries, keys) into runs with the least cost of calls and padding.

    Dynamic programming: ``best[i]`` is the least cost of the first i sizes, and the start of their
    last run.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for high in range(1, len(shapes) + 1):
        options = []
        keys = 0
        for low in range(high - 1, -1, -1):
            keys = max(keys, shapes[low][1])
            padded = (high - low) * shapes[high - 1][0] * keys
            options.append((best[low][0] + call_cost + padded, low))
            if padded > options[0][0] - best[high - 1][0] + call_cost * (high - low):
                break  # already more expensive than one call per unit
        best.append(min(options))
    cuts, high = [], len(shapes)
    while high:
        cuts.append((best[high][1], high))
        high = best[high][1]
    return cuts[::-1]


def _group(units: list[_Unit], causal: bool, device: torch.device) -> Group:
    tq = max(len(unit.queries) for unit in units)
    tk = -(-max(len(unit.keys) for unit in units) // KEYS_MULTIPLE) * KEYS_MULTIPLE
    queries, keys, depths = [], [], []
    padding: list[int] = []
    spans = tuple(range(unit.keys[0], unit.keys[-1] + 1) for unit in units)
    for b, unit in enumerate(units):
        missing = tq - len(unit.queries)
        queries.append([*unit.queries, *[unit.queries[0]] * missing])
        depths.append([*unit.depths, *(unit.depths[-1] + 1 + i for i in range(missing))])
        keys.append([*unit.keys, *[unit.keys[-1]] * (tk - len(unit.keys))])
        padding += range(b * tq + len(unit.queries), (b + 1) * tq)
    indices = partial(torch.tensor, dtype=torch.int64, device=device)
    return Group(
        queries=indices(queries),
        keys=indices(keys),
        depth=indices(depths),
        padding=indices(padding),
        causal=causal,
        alike=all(depth == depths[0] for depth in depths),
        first=(min(map(min, depths)) + 1) // KEYS_MULTIPLE * KEYS_MULTIPLE,
        keep=tk <= LONGEST_KEPT,
        spans=spans if list(map(len, spans)) == [len(unit.keys) for unit in units] else None,
    )
