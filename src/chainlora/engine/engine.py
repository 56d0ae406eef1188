"""A model, and the fastest way to run it that is the same function.

    with Engine(model, training=True) as engine:
        engine.adapt(lora_layers)                        # after a LoRA was put on the model
        loss, count = engine.loss(engine.pack(examples), "completion")
        scores = engine.scores(examples)

This file is the plain engine: a batch through the model's own forward (`packing.padded_hidden`),
then losses and scores at its head (`head`), one micro-batch after the other. Faster ways are
plug-ins (`fast`), each tried at the start by a probe on the model itself. Where a probe does not
agree, the plain way is taken and `notes` says why. `close` leaves the model as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine import fast
from chainlora.engine.fast.plugin import PACKED, FastPath
from chainlora.engine.head import candidate_loss, candidate_scores, completion_loss, logit_transform
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
ScoringProgress = Callable[[int, int], None]  # told (rows done, rows) after each batch
Batch = TypeVar("Batch")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sharing(Protocol):
    """Several processes that share the work of an engine (`training.processes`)."""

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return what `compute` returns for all items, each computed by one process."""

    def most(self, number: int) -> int:
        """Return the largest of the numbers that all processes have here."""


class Engine:
    """A model and the fastest way to run it that computes the same function to rounding.

    Args:
        model: a transformers causal language model, frozen but for what is trained.
        speedups: ``auto`` takes every fast path whose probe agrees; ``off`` takes none: the padded
            path, plain forwards, one thread, no packing.
        training: whether gradients will be asked for. Without, every parameter is frozen until
            `close`.
        threads: most threads; None is one a core, up to a few.
        sharing: the processes that share the work; None computes everything here.

    Raises:
        ModelError: a model that this package cannot score: it does not run on token ids alone, is
            not causal, draws random numbers in evaluation, or has logits that are not its head's.

    The model is changed in place and is itself again after `close`, which a ``with`` block calls.
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
            base_model(model)  # refuses what is not a causal language model
            embedding: Any = causal_model(model).get_input_embeddings()  # type: ignore[operator]
            self._num_tokens = embedding.weight.shape[0]
            facts = examine(model, training=training)
            if training and getattr(text_config(model), "output_router_logits", False):
                self.notes.append("auxiliary loss of the router (`output_router_logits`): left out")
            facts.most_threads, facts.is_shared = threads, self._is_sharded
            self._length_from = facts.threshold if facts.length else None
            logit_transform(model)  # refuses a model with other logits; found once, not in a thread
            if self._is_sharded:
                self.notes.append("weights: shared by processes, whole one layer at a time")
            self._take_fast_paths(facts)
        except BaseException:
            self.close()
            raise
        for note in self.notes:
            log.info("%s", note)

    def _take_fast_paths(self, facts: Facts) -> None:
        """Apply every registered path whose probe agrees; note which, and why not the others."""
        paths = [make() for make in fast.FAST_PATHS]
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
        """How batches run: sequences side by side in one row, or each in a padded row."""
        return "packed" if any(path.name == PACKED for path in self._fast) else "padded"

    @property
    def num_threads(self) -> int:
        """The number of threads that train."""
        return max((path.num_threads for path in self._fast), default=1)

    # --- batches ---

    def adapt(self, layers: Iterable[nn.Module]) -> None:
        """Make LoRA layers fast that were put on the model; safe to call again."""
        layers = list(layers)
        for path in self._fast:
            path.adapt(layers)

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Return examples as one batch on the model's device.

        Raises DataError where there is a token that the model does not have.
        """
        batch = pack(examples, share_prefixes=self.speedups == "auto")
        last = int(max(batch.input_ids.max(), batch.token_target.max()))
        if last >= self._num_tokens:
            row = next(each.row for each in examples if last in {*chain(*each.sequences)})
            raise DataError(
                "the model must have the tokens of a row",
                f"token {last} in row {row}, and {self._num_tokens} tokens",
                "drop the row",
            )
        return batch.to(next(self.model.parameters()).device)

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Cut a micro-batch into the shards of `add_gradients`, always the same."""
        for path in self._fast:
            if (shards := path.split(examples)) is not None:
                return [[examples[place] for place in shard] for shard in shards]
        return [list(examples)]

    def _map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, training: bool
    ) -> Iterator[Result]:
        """Return ``function(item)`` in the order of the items, perhaps from other threads."""
        for path in self._fast:
            if (results := path.map(function, items, training=training)) is not None:
                return results
        return map(function, items)

    # --- what the model computes ---

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [R, d] at `batch.rows`, after the final norm, differentiable."""
        if self._length_from is not None:
            forget_lengths(self.model)
        for path in self._fast:
            if (hidden := path.hidden(self.model, batch)) is not None:
                return hidden
        return padded_hidden(self.model, batch)

    def loss(self, batch: PackedBatch, kind: Kind) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, a scalar, and the number of terms in the sum.

        ``candidates``: cross-entropy over each example's candidates; ``completion``: negative
        log-likelihood of each scored token.
        """
        if kind == "candidates":
            return self.at_head(candidate_loss, batch), batch.num_examples
        return self.at_head(completion_loss, batch)

    def at_head(self, compute: Callable[..., Result], batch: PackedBatch) -> Result:
        """Return ``compute(model, hidden states, batch)``, which may use the head's weights."""

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
        """Add the gradient of a step's mean loss to ``parameter.grad`` of each; return that loss.

        `batches` holds the micro-batches of the step, each as its shards; ``loss(shard)`` is summed
        over ``count(shard)`` terms. Losses and gradients are summed in the order of the shards, so
        equal work gives equal bits. `terms` is the number in the whole step, where these batches
        are a part of it.
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

        `max_tokens` bounds what is computed at once, in all threads together. Raises ScoreError
        when a score is not a number.
        """
        return self.spread(examples, lambda part: self._scores(part, max_tokens, progress))

    def _scores(
        self, examples: Sequence[Example], max_tokens: int, progress: ScoringProgress | None
    ) -> list[list[float]]:
        # what a sequence is may depend on the longest one beside it: then each is a unit of its own
        units = list(examples)
        if self._length_from is not None:
            units = [
                Example(example.row, (sequence,), (spans,))
                for example in examples
                for sequence, spans in zip(example.sequences, example.scored, strict=True)
            ]
        scores: list[list[float]] = [[] for _ in units]
        batches: Iterable[list[int]] = self._scoring_batches(units, max_tokens)
        if self._is_sharded:  # in step with a process that has more batches
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
                            f"scores must be numbers (got nan at row {units[index].row}); the "
                            "model's weights or its dtype are at fault, try float32"
                        )
                done += len(indices)
                if progress is not None:
                    share = min(done, len(units)) * len(examples) // len(units)
                    progress(share, len(examples))
        found = (score for unit in scores for score in unit)
        return [[next(found) for _ in example.sequences] for example in examples]

    def _scoring_batches(self, units: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
        """Yield the indices of the units that are scored together.

        Where lengths show, these are of one length; below the threshold all are alike.
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
            mine = [units[index] for index in group]
            for batch in evaluation_batches(mine, max_tokens=size, packed=packed):
                yield [group[place] for place in batch]

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Yield the model for calls of its own forward or `generate`, in inference mode."""
        with in_mode(self.model), self._no_gradients():
            yield self.model

    def _no_gradients(self) -> AbstractContextManager[Any]:
        """Inference mode, in which weights that are gathered could not be trained on later."""
        return torch.no_grad() if self._is_sharded else torch.inference_mode()

    # --- other processes ---

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return what `compute` returns for all items; processes share the work."""
        return compute(items) if self._sharing is None else self._sharing.spread(items, compute)

    def most(self, number: int) -> int:
        """Return the largest of the numbers that processes have which share the model."""
        if self._sharing is None or not self._is_sharded:
            return number
        return self._sharing.most(number)

    # --- its end ---

    def close(self) -> None:
        """Give the model everything back; safe to call twice."""
        with ExitStack() as stack:  # all of it, whatever one of them raises
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
    """Return how many terms the loss of a batch sums: examples, or scored tokens."""
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
