"""Run a model in the fastest way that computes the same function.

    with Engine(model, training=True) as engine:
        engine.adapt(lora_layers)                        # after a LoRA is attached to the model
        loss, count = engine.loss(engine.pack(examples), "completion")
        scores = engine.scores(examples)

This file is the plain engine. It runs a batch through the model's own forward
(`packing.padded_hidden`) and computes losses and scores at the head (`head`), one micro-batch after
the other. Fast paths are plug-ins (`chainlora_fast`). At the start, a probe compares each one with
the plain forward of this model; if they differ, the engine does not use it, and `notes` has the
reason. `close` restores the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.fast_path import PACKED, FastPath
from chainlora.engine.head import candidate_loss, candidate_scores, completion_loss, find_head
from chainlora.engine.packing import PackedBatch, input_sequences, pack, padded_hidden
from chainlora.engine.probes import Facts, examine, forget_lengths
from chainlora.engine.score_batches import evaluation_batches, pack_size
from chainlora.errors import DataError, ScoreError
from chainlora.models.modes import in_mode
from chainlora.models.shards import at_head, is_sharded
from chainlora.models.text_config import base_model, causal_model, text_config

log = logging.getLogger(__name__)

Kind = Literal["candidates", "completion"]
Speedups = Literal["auto", "off"]
# called after each batch with the numbers of finished and of all rows
ScoringProgress = Callable[[int, int], None]
Batch = TypeVar("Batch")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sharing(Protocol):
    """Processes that share the work of an engine (`training.processes`)."""

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return the results of `compute` for all items; each process computes some of them."""

    def most(self, number: int) -> int:
        """Return the maximum of a number over all processes."""


class Engine:
    """Runs a model by the fastest paths that compute the same function up to rounding.

    The engine changes the model in place. `close`, which a ``with`` block calls, restores it.

    Args:
        model: a transformers causal language model; only trained parameters require gradients.
        speedups: ``auto`` uses every fast path whose probe succeeds; ``off`` uses none, so padded
            batches, plain forwards and one thread.
        training: whether gradients are needed. Otherwise all parameters are frozen until `close`.
        threads: largest number of threads; None for one per core, up to `MOST_THREADS`.
        sharing: the processes that share the work; None if this process computes everything.

    Attributes:
        notes: one line per fast path: used, or the reason why not.

    Raises:
        ModelError: the model cannot be scored. It does not run on token ids alone, is not causal,
            draws random numbers in evaluation, or has logits that are not its head's output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        speedups: Speedups = "auto",
        training: bool,
        threads: int | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.model = model
        self.speedups = speedups
        self.notes: list[str] = []
        self._sharing = sharing
        self._is_sharded = is_sharded(model)
        self._fast: list[FastPath] = []
        self._frozen = [] if training else [p for p in model.parameters() if p.requires_grad]
        try:
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            base_model(model)  # raises unless this is a causal language model
            embedding: Any = causal_model(model).get_input_embeddings()  # type: ignore[operator]
            self._num_tokens = embedding.weight.shape[0]
            facts = examine(model, training=training)
            if training and getattr(text_config(model), "output_router_logits", False):
                self.notes.append("auxiliary loss of the router (`output_router_logits`): not used")
            facts.most_threads, facts.is_shared = threads, self._is_sharded
            self._length_from = facts.threshold if facts.length else None
            find_head(model)  # raises for other logits; cached here, before threads start
            if self._is_sharded:
                self.notes.append("weights: sharded over processes, gathered one layer at a time")
            self._take_fast_paths(facts)
        except BaseException:
            self.close()
            raise
        for note in self.notes:
            log.info("%s", note)

    def _take_fast_paths(self, facts: Facts) -> None:
        """Apply every registered path whose probe succeeds, and note the result of each."""
        paths: list[FastPath] = [make() for make in import_module("chainlora_fast").FAST_PATHS]
        if self.speedups == "auto":
            facts.watched = [module for path in paths for module in path.watched(self.model)]
        for path in paths:
            if path.needs not in (None, *facts.taken):
                continue
            off = "speedups are off" if self.speedups == "off" else None
            reason = off or path.probe(self.model, facts)
            if reason is None:
                self._fast.append(path)
                path.apply(self.model)
                facts.taken.append(path.name)
            if note := path.note(reason):
                self.notes.append(note)

    @property
    def path(self) -> Literal["packed", "padded"]:
        """How batches run: all sequences in one packed row, or one padded row per sequence."""
        return "packed" if any(path.name == PACKED for path in self._fast) else "padded"

    @property
    def num_threads(self) -> int:
        """Number of threads in training."""
        return max((path.num_threads for path in self._fast), default=1)

    # --- batches ---

    def adapt(self, layers: Iterable[nn.Module]) -> None:
        """Use fast forwards for LoRA layers on the model; may be called again."""
        layers = list(layers)
        for path in self._fast:
            path.adapt(layers)

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Return examples as one batch on the model's device.

        Raises:
            DataError: a token is not in the model's vocabulary.
        """
        batch = pack(examples, share_prefixes=self.speedups == "auto")
        last = int(max(batch.input_ids.max(), batch.token_target.max()))
        if last >= self._num_tokens:
            row = next(e.row for e in examples if last in {*chain(*e.sequences)})
            raise DataError(
                "the tokens of a row must be in the model's vocabulary",
                f"token {last} in row {row}, and a vocabulary of {self._num_tokens}",
                "drop the row",
            )
        return batch.to(next(self.model.parameters()).device)

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Cut a micro-batch into shards for `add_gradients`; equal examples give equal shards."""
        for path in self._fast:
            if (shards := path.split(examples)) is not None:
                return [[examples[place] for place in shard] for shard in shards]
        return [list(examples)]

    def _map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, training: bool
    ) -> Iterator[Result]:
        """Return ``function(item)`` in the order of the items; threads may compute it."""
        for path in self._fast:
            if (results := path.map(function, items, training=training)) is not None:
                return results
        return map(function, items)

    # --- forward, loss and gradient ---

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [R, d] at `batch.rows`, after the final norm, differentiable."""
        if self._length_from is not None:
            forget_lengths(self.model)
        for path in self._fast:
            if (hidden := path.hidden(self.model, batch)) is not None:
                return hidden
        return padded_hidden(self.model, batch)

    def loss(self, batch: PackedBatch, kind: Kind) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, a differentiable scalar, and its number of terms.

        Args:
            kind: ``candidates`` for the cross-entropy over each example's candidates,
                ``completion`` for the negative log-likelihood of each scored token.
        """
        if kind == "candidates":
            return self.at_head(candidate_loss, batch), batch.num_examples
        return self.at_head(completion_loss, batch)

    def at_head(self, compute: Callable[..., Result], batch: PackedBatch) -> Result:
        """Return ``compute(model, hidden states [R, d], batch)``; it may use the head's weights."""

        def finish(hidden: Tensor) -> Result:
            return compute(self.model, hidden, batch)

        hidden = self.hidden(batch)
        return at_head(self.model, finish, hidden) if self._is_sharded else finish(hidden)

    def add_gradients(
        self,
        batches: Sequence[Sequence[Batch]],
        parameters: Sequence[nn.Parameter],
        *,
        loss: Callable[[Batch], Tensor],
        count: Callable[[Batch], int],
        terms: float | None = None,
    ) -> float:
        """Add the gradient of a step's mean loss to ``parameter.grad``; return the mean loss.

        Losses and gradients are summed in the order of the shards, so equal batches give equal
        bits.

        Args:
            batches: the micro-batches of the step, each one as its shards.
            loss: returns the summed loss of a shard.
            count: returns the number of terms in that sum.
            terms: number of terms in the whole step, if `batches` are only a part of it.
        """
        if terms is None:
            terms = sum(count(batch) for shards in batches for batch in shards)

        def gradients(batch: Batch) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                mean = loss(batch) / terms
                return mean.item(), torch.autograd.grad(mean, parameters, allow_unused=True)

        total = 0.0
        for shards in batches:
            if len(shards) == 1:
                mean = loss(shards[0]) / terms
                mean.backward()
                total += mean.item()
                continue
            for part, grads in self._map(gradients, shards, training=True):
                total += part
                _accumulate(parameters, grads)
        return total

    # --- scores ---

    def scores(
        self,
        examples: Sequence[Example],
        *,
        max_tokens: int = 4096,
        progress: ScoringProgress | None = None,
    ) -> list[list[float]]:
        """Return, per example, the mean log-probability per token of each of its sequences.

        Args:
            max_tokens: largest number of tokens that all threads together compute at once.
            progress: see `ScoringProgress`.

        Raises:
            ScoreError: a score is not a number.
        """
        return self.spread(examples, lambda part: self._scores(part, max_tokens, progress))

    def _scores(
        self, examples: Sequence[Example], max_tokens: int, progress: ScoringProgress | None
    ) -> list[list[float]]:
        # If scores depend on the longest sequence of a batch, sequences of one length are batched.
        units = list(examples)
        if self._length_from is not None:
            units = [
                Example(example.row, (sequence,), (spans,))
                for example in examples
                for sequence, spans in zip(example.sequences, example.scored, strict=True)
            ]
        scores: list[list[float]] = [[] for _ in units]
        batches: Iterable[list[int]] = self._scoring_batches(units, max_tokens)
        if self._is_sharded:  # all processes must run the same number of forward passes
            batches = list(batches)
            batches += batches[:1] * (self.most(len(batches)) - len(batches))

        def score(indices: list[int]) -> tuple[list[int], list[float]]:
            batch = self.pack([units[i] for i in indices])
            with self._no_gradients():
                return indices, self.at_head(candidate_scores, batch).tolist()

        done = 0
        with self.plain():
            for indices, flat in self._map(score, batches, training=False):
                for index in indices:
                    count = len(units[index].sequences)
                    scores[index], flat = flat[:count], flat[count:]
                    if any(map(math.isnan, scores[index])):
                        raise ScoreError(
                            f"scores must be numbers (got nan at row {units[index].row}); check "
                            "the model's weights, or use dtype float32"
                        )
                done += len(indices)
                if progress is not None:
                    share = min(done, len(units)) * len(examples) // len(units)
                    progress(share, len(examples))
        flat_scores = (score for unit in scores for score in unit)
        return [[next(flat_scores) for _ in example.sequences] for example in examples]

    def _scoring_batches(self, units: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
        """Yield the indices of units to score together.

        If scores depend on the longest row of a batch, all units of a batch have one length; all
        lengths up to the threshold count as one.
        """
        threads = max((path.num_scoring_threads for path in self._fast), default=1)
        size = pack_size(units, max_tokens, threads)
        size = min([size, *(path.longest_row for path in self._fast)])
        groups: dict[int, list[int]] = {}
        for index, unit in enumerate(units):
            first = self._length_from
            length = 0 if first is None else max(*map(len, input_sequences(unit)), first)
            groups.setdefault(length, []).append(index)
        for group in groups.values():
            packed = self.path == "packed"
            members = [units[index] for index in group]
            for batch in evaluation_batches(members, max_tokens=size, packed=packed):
                yield [group[place] for place in batch]

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Yield the model in inference mode, for its own forward or `generate`."""
        with in_mode(self.model), self._no_gradients():
            yield self.model

    def _no_gradients(self) -> AbstractContextManager[Any]:
        """Inference mode; no_grad for a sharded model, which gathers weights inside the block."""
        return torch.no_grad() if self._is_sharded else torch.inference_mode()

    # --- other processes ---

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return the results of `compute` for all items; processes share the work."""
        return compute(items) if self._sharing is None else self._sharing.spread(items, compute)

    def most(self, number: int) -> int:
        """Return the maximum of a number over the processes that share a sharded model."""
        if self._sharing is None or not self._is_sharded:
            return number
        return self._sharing.most(number)

    # --- close ---

    def close(self) -> None:
        """Restore the model; safe to call twice."""
        with ExitStack() as stack:  # runs every callback, even if one raises
            for parameter in self._frozen:
                stack.callback(parameter.requires_grad_, True)
            for path in self._fast:
                stack.callback(path.undo)
            self._frozen, self._fast = [], []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def num_terms(batch: PackedBatch, kind: Kind) -> int:
    """Return the number of terms in the loss of a batch: examples, or scored tokens."""
    return batch.num_examples if kind == "candidates" else batch.num_scored_tokens


def _accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    sums, terms = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            sums.append(parameter.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)
