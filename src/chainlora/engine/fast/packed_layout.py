"""How the attention of a packed row is computed: which queries see which keys, in which batches.

A segment's queries see the keys of its ancestors and its own up to themselves. Segments of like
shape are gathered into one padded batch of small attentions. On a CPU the queries of a long
sequence are cut into pieces, each with the keys up to its end: half of the square is never
computed, and the scores of one piece stay in the cache.

The layout of a batch is computed once and travels to every layer as a keyword argument of the
model's forward (and so survives gradient checkpointing, where layers run again during backward).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainlora.engine.packing import Segment, paths

# Whole vector registers: a bfloat16 softmax over 85 keys takes longer than over 96.
KEYS_MULTIPLE = 16
# Beyond, probabilities are made again in backward: kept, they would outweigh all else.
LONGEST_KEPT = 384
PIECE = 128  # queries of a piece of a sequence beyond that
# Beyond this length SDPA's own blocks win: measured, one core, forward and backward, 9 heads of 64.
# bfloat16 at 4,096 tokens: pieces 0.76 s, SDPA 0.99 s; float32 at 1,024: 0.085 and 0.108 s, at
# 4,096: 1.35 and 1.05 s.
LONGEST_BY_MATMUL = {torch.bfloat16: math.inf}
LONGEST_BY_MATMUL_ELSE = 2048
# Fixed cost of one batch of attentions, in scores (queries × keys) of one head: about 25 small
# calls.
_CALL_COST = {"cpu": 1_000}
_CALL_COST_ELSEWHERE = 200_000


@dataclass(frozen=True, slots=True)
class Group:
    """Segments gathered into one batch: B rows of `queries` and `keys` packed positions, padded.

    Key j is the j-th token of the sequence; query i is its token ``depth[b, i]``, and so sees keys
    j ≤ that. Padded keys lie behind every real query; padded queries are dropped on the way out.
    """

    queries: Tensor  # [B, Tq]
    keys: Tensor  # [B, Tk]
    depth: Tensor  # [B, Tq]
    padding: Tensor  # places of padded queries among B · Tq
    causal: bool  # query i is token i of every row
    alike: bool  # query i is the same token of every row
    first: int  # keys before this one are seen by every query
    keep: bool  # keep the probabilities for backward
    spans: tuple[range, ...] | None  # the keys of each row, where they lie side by side

    def visible(self) -> Tensor:
        """Return which keys from `first` on each query sees, bool [B, Tq, Tk − first], or [1, …]
        where all rows agree."""
        depth = self.depth[:1] if self.alike else self.depth
        keys = torch.arange(self.first, self.keys.shape[1], device=depth.device)
        return keys <= depth[:, :, None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions of the packed row [R], and the layout that has queries at these alone."""

    index: Tensor
    layout: Layout


@dataclass(frozen=True, slots=True)
class Layout:
    """How the attention of a packed row of `num_tokens` is computed; `plans` fills up as head
    counts are met."""

    groups: tuple[Group, ...]
    num_queries: int
    num_tokens: int
    by_matmul: bool  # by plain matmuls, SDPA where not
    flat: bool  # every token is a key of one group
    rows: Rows | None = None  # for a last layer of which only some positions are used
    plans: dict[Any, Any] = field(default_factory=dict)


def make_layout(
    segments: Sequence[Segment],
    device: torch.device | str,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Layout:
    """Compute the layout of a packed row, for attention in `dtype` on `device`; with `rows`
    (ascending), also that of these positions alone."""
    whole, num_tokens = paths(segments), segments[-1].end
    limit = LONGEST_BY_MATMUL.get(dtype, LONGEST_BY_MATMUL_ELSE)
    by_matmul = torch.device(device).type == "cpu" and max(map(len, whole)) <= limit
    trimmed = None
    if rows is not None and rows.shape[0] < num_tokens:
        units = _units(segments, whole, rows.tolist())
        trimmed = Rows(rows, _layout(units, rows.shape[0], num_tokens, by_matmul, device))
    units = _units(segments, whole, range(num_tokens))
    return _layout(units, num_tokens, num_tokens, by_matmul, device, trimmed)


class _Unit(NamedTuple):
    queries: Sequence[int]  # their place among all queries
    depths: Sequence[int]  # their place in the sequence
    keys: list[int]

    def pieces(self) -> Iterator[_Unit]:
        """Yield the unit, or where its sequence is long, parts of its queries with the keys that
        these see."""
        if len(self.keys) <= LONGEST_KEPT:
            yield self
            return
        for low in range(0, len(self.queries), PIECE):
            depths = self.depths[low : low + PIECE]
            yield _Unit(self.queries[low : low + PIECE], depths, self.keys[: depths[-1] + 1])


def _units(
    segments: Sequence[Segment], whole: Sequence[list[int]], rows: Sequence[int]
) -> list[_Unit]:
    """Return the queries at `rows` of each segment that has some, and the keys that they see."""
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
    device: torch.device | str,
    rows: Rows | None = None,
) -> Layout:
    if by_matmul:
        units = [piece for unit in units for piece in unit.pieces()]
    cost = _CALL_COST.get(torch.device(device).type, _CALL_COST_ELSEWHERE)
    groups = []
    for causal in (True, False):
        mine = [u for u in units if (len(u.queries) == len(u.keys)) == causal]
        mine.sort(key=lambda u: (len(u.queries), len(u.keys)))
        for low, high in _partition([(len(u.queries), len(u.keys)) for u in mine], cost):
            groups.append(_group(mine[low:high], causal, device))
    flat = sum(len(unit.keys) for unit in units) == num_tokens
    return Layout(tuple(groups), num_queries, num_tokens, by_matmul, flat, rows)


def _partition(shapes: list[tuple[int, int]], call_cost: int) -> list[tuple[int, int]]:
    """Cut sorted (queries, keys) into runs so that calls and padding together cost least."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for high in range(1, len(shapes) + 1):
        options = []
        keys = 0
        for low in range(high - 1, -1, -1):
            keys = max(keys, shapes[low][1])
            padded = (high - low) * shapes[high - 1][0] * keys
            options.append((best[low][0] + call_cost + padded, low))
            if padded > options[0][0] - best[high - 1][0] + call_cost * (high - low):
                break  # already dearer than one call each
        best.append(min(options))
    cuts, high = [], len(shapes)
    while high:
        cuts.append((best[high][1], high))
        high = best[high][1]
    return cuts[::-1]


def _group(units: list[_Unit], causal: bool, device: torch.device | str) -> Group:
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
    return Group(
        queries=_indices(queries, device),
        keys=_indices(keys, device),
        depth=_indices(depths, device),
        padding=_indices(padding, device),
        causal=causal,
        alike=all(depth == depths[0] for depth in depths),
        first=(min(map(min, depths)) + 1) // KEYS_MULTIPLE * KEYS_MULTIPLE,
        keep=tk <= LONGEST_KEPT,
        spans=spans if list(map(len, spans)) == [len(unit.keys) for unit in units] else None,
    )


def _indices(x: list[Any], device: torch.device | str) -> Tensor:
    return torch.tensor(x, dtype=torch.int64, device=device)
