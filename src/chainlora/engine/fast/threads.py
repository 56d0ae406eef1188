"""For CPUs only: micro-batches side by side on the cores, instead of all cores on every matmul.

Cores that share each matmul of a small model wait for one another between any two: on two cores a
step of a 135M Llama keeps 1.6 of them busy. Here a thread with its share of the cores takes whole
sequences through forward and backward alone, one shard of the batch at a time. Gradients are summed
in the order of the shards, so the same run gives the same bits, whichever thread ends first.

One thread, the calling one, remains wherever several could be wrong or do not pay
(`CoreThreads.probe`, `split`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import nn

from chainlora.data.examples import Example
from chainlora.engine.fast.plugin import PACKED, FastPath, Item, Result
from chainlora.engine.packing import fresh_tokens, input_sequences
from chainlora.engine.probes import Facts

_Inputs = list[tuple[int, ...]]

# Between operations Python runs one thread at a time: many would wait for that. Two were measured;
# four is a guess, and threads of a larger machine have several cores each.
MOST_THREADS = 4
# Tokens of one shard. Matmuls of 300 rows run at 95 % of the rate of 600 (bfloat16, one core), and
# the activations of a shard are gone before its thread takes the next, so memory does not grow with
# the batch.
_SHARD = 384
# Side by side, threads compute about 1.2 times the tokens a second (docs/decisions/0003). Shards
# that compute more than this share of the whole (prefixes read twice, a thread with nothing to do)
# are not worth it.
_WORTH = 1.15


class CoreThreads(FastPath):
    """Threads that take the shards of a micro-batch, or the packs to be scored, one by one."""

    name = "threads"

    def __init__(self) -> None:
        super().__init__()
        self._pool: ThreadPoolExecutor | None = None
        self._why_one: str | None = None

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why one thread computes everything.

        What is random in training alone leaves one thread to train and several to score in between.
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
        self._pool = self._pool or make_pool(count)  # where several train, so many score
        return map_in_threads(self._pool, count, function, items)


def make_pool(count: int) -> ThreadPoolExecutor:
    """Return `count` threads, each with its share of this thread's cores."""
    share = max(torch.get_num_threads() // count, 1)
    # torch's number of threads belongs to the thread that sets it: the caller keeps its own
    return ThreadPoolExecutor(count, "chainlora", torch.set_num_threads, (share,))


def map_in_threads(
    pool: ThreadPoolExecutor, count: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of items, at most two items a thread ahead of the
    caller.

    Gradient and inference mode belong to a thread: `function` sets what it needs.
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
    """Cut examples into shards for `count` threads; return the indices of each, ascending.

    Two ways are tried, and the one that computes less is taken: examples with a common beginning
    kept together, and every example for itself. One shard, for all cores together, where several
    would not pay.
    """
    everything = list(range(len(examples)))
    if count == 1 or len(examples) == 1:
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
    """Put the largest unit into the emptiest of `number` shards, and so on."""
    sizes = [_tokens(inputs, unit) for unit in units]
    shards: list[list[int]] = [[] for _ in range(min(number, len(units)))]
    filled = [0] * len(shards)
    for unit in sorted(range(len(units)), key=lambda u: (-sizes[u], u)):
        shard = filled.index(min(filled))
        shards[shard] += units[unit]
        filled[shard] += sizes[unit]
    return [sorted(shard) for shard in shards]


def _families(inputs: list[_Inputs]) -> list[list[int]]:
    """Return the examples with a common beginning, which `pack` would store once, by family."""
    families: list[list[int]] = []
    last: tuple[int, ...] = ()
    for index in sorted(range(len(inputs)), key=lambda i: inputs[i]):
        _, common = fresh_tokens(inputs[index], last)
        if common and families:
            families[-1].append(index)
        else:
            families.append([index])
        last = inputs[index][-1]
    return families


def _tokens(inputs: list[_Inputs], indices: Iterable[int]) -> int:
    """Return how many tokens a pack of these examples computes."""
    return fresh_tokens(sorted(sequence for index in indices for sequence in inputs[index]))[0]
