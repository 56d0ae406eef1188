"""Run shards of a micro-batch in parallel threads, on CPUs only.

If all cores share each matmul of a small model, they wait for each other after every matmul: on two
cores, a step of a 135M Llama keeps 1.6 cores busy. Here each thread gets its share of the cores and
runs forward and backward of one shard at a time, alone. Gradients are summed in the order of the
shards, so results do not depend on which thread ends first.

Only the calling thread computes if several threads could change results or would not be faster
(`CoreThreads.probe`, `split`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import nn

from chainlora.data.examples import Example
from chainlora.engine.fast_path import PACKED, FastPath, Item, Result
from chainlora.engine.packing import fresh_tokens, input_sequences
from chainlora.engine.probes import Facts

_Inputs = list[tuple[int, ...]]

# Python runs one thread at a time between operations, so many threads would wait for each other.
# Two threads were measured, four are a guess. On larger machines each thread has several cores.
MOST_THREADS = 4
# Tokens per shard. Matmuls of 300 rows reach 95 % of the rate of 600 rows (bfloat16, one core). A
# thread frees the activations of a shard before the next one, so memory does not grow with the
# batch.
_SHARD = 384
# Parallel threads compute about 1.2 times the tokens per second (docs/decisions/0003). Sharding
# does not pay if it costs more than this factor: prefixes computed twice, or an idle thread.
_WORTH = 1.15


class CoreThreads(FastPath):
    """Computes the shards of a micro-batch, or the packs to score, in several threads."""

    name = "threads"
    _pool: ThreadPoolExecutor | None = None
    _why_one: str | None = None

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why one thread must compute everything, or None.

        If only training draws random numbers, one thread trains and several threads score.
        """
        if facts.is_shared:
            return "processes share the weights"
        if next(model.parameters()).device.type != "cpu":
            return "the model is not on a CPU"
        if torch.get_num_threads() == 1:
            return "torch has one thread"
        if PACKED not in facts.taken:
            return "rows are padded"
        if facts.length is not None:
            return facts.length
        allowed = facts.most_threads or MOST_THREADS
        self.num_scoring_threads = min(torch.get_num_threads(), MOST_THREADS, allowed)
        self._why_one = facts.random
        self.num_threads = 1 if facts.random else self.num_scoring_threads
        return None

    def undo(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def note(self, reason: str | None) -> str | None:
        reason = reason or self._why_one
        return f"{self.name}: {self.num_threads}{', ' + reason if reason else ''}"

    def split(self, examples: Sequence[Example]) -> list[list[int]] | None:
        return split(examples, self.num_threads) if self.num_threads > 1 else None

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, training: bool
    ) -> Iterator[Result] | None:
        count = self.num_threads if training else self.num_scoring_threads
        if count == 1:
            return None
        self._pool = self._pool or make_pool(count)  # both counts are equal unless one is 1
        return map_in_threads(self._pool, count, function, items)


def make_pool(count: int) -> ThreadPoolExecutor:
    """Return a pool of `count` threads, each with an equal share of this thread's cores."""
    share = max(torch.get_num_threads() // count, 1)
    # torch stores the number of threads per calling thread: the caller keeps its own number
    return ThreadPoolExecutor(count, "chainlora", torch.set_num_threads, (share,))


def map_in_threads(
    pool: ThreadPoolExecutor, count: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items.

    At most two items per thread are submitted ahead of the caller. Each thread has its own gradient
    and inference mode, so `function` must set them.
    """
    waiting = iter(items)
    ahead = [pool.submit(function, item) for item in islice(waiting, 2 * count)]
    try:
        while ahead:
            result = ahead.pop(0).result()
            ahead += [pool.submit(function, item) for item in islice(waiting, 1)]
            yield result
    finally:
        for future in ahead:
            future.cancel()


def split(examples: Sequence[Example], count: int) -> list[list[int]]:
    """Cut examples into shards for `count` threads.

    Tries two plans, examples with a common prefix kept together and every example by itself, and
    uses the one that computes less. If neither plan pays, all examples are one shard. Returns the
    ascending indices of each shard.
    """
    everything = list(range(len(examples)))
    if len(examples) == 1:
        return [everything]
    inputs = [sorted(set(input_sequences(example))) for example in examples]
    whole = _tokens(inputs, everything)
    number = count * max(1, round(whole / (count * _SHARD)))
    plans = [
        _spread(inputs, units, number) for units in (_families(inputs), [[i] for i in everything])
    ]
    costs = []
    for plan in plans:
        sizes = [_tokens(inputs, shard) for shard in plan]
        costs.append(max(sum(sizes), max(sizes) * count))
    best = costs.index(min(costs))
    return plans[best] if costs[best] <= _WORTH * whole else [everything]


def _spread(inputs: list[_Inputs], units: list[list[int]], number: int) -> list[list[int]]:
    """Distribute units over `number` shards: the largest unit first, into the emptiest shard."""
    sizes = [_tokens(inputs, unit) for unit in units]
    shards: list[list[int]] = [[] for _ in range(min(number, len(units)))]
    filled = [0] * len(shards)
    for unit in sorted(range(len(units)), key=lambda u: (-sizes[u], u)):
        shard = filled.index(min(filled))
        shards[shard] += units[unit]
        filled[shard] += sizes[unit]
    return [sorted(shard) for shard in shards]


def _families(inputs: list[_Inputs]) -> list[list[int]]:
    """Group examples with a common prefix that `pack` would store once."""
    families: list[list[int]] = []
    last: tuple[int, ...] = ()
    for index in sorted(range(len(inputs)), key=lambda i: inputs[i]):
        _, common = fresh_tokens(inputs[index], last)
        if not (common and families):
            families.append([])
        families[-1].append(index)
        last = inputs[index][-1]
    return families


def _tokens(inputs: list[_Inputs], indices: Iterable[int]) -> int:
    """Return the number of tokens that a pack of these examples computes."""
    return fresh_tokens(sorted(sequence for index in indices for sequence in inputs[index]))[0]
