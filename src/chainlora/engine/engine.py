"""The one door to the room: a model, and the fastest way to run it that is the same function.

    with Engine(model, training=True) as engine:
        engine.adapt(lora_layers)                        # after a LoRA was put on the model
        loss, count = engine.loss(engine.pack(examples), "completion")
        scores = engine.scores(examples)

What is fast is found at the start by probes on the model itself, each against plain transformers:

    path        packed: sequences side by side in one row, no padding, common beginnings once;
                padded: a right-padded batch through the model's own forward
    forwards    decoder layers of Llama's shape, LoRA layers, bfloat16 matmuls on old CPUs
    threads     micro-batches side by side on a CPU's cores

Where a probe does not agree, the plain way runs and `notes` says why. `close` leaves the model as
it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.attention import CannotPackError, packed_name
from chainlora.engine.bf16_matmul import accelerate_linears
from chainlora.engine.decoder_layer import install_fast_layers, layers_to_probe, why_plain_layers
from chainlora.engine.head import candidate_loss, candidate_scores, completion_loss, logit_transform
from chainlora.engine.hidden_states import ForwardPath, packed_hidden, padded_hidden
from chainlora.engine.limits import UNLIMITED
from chainlora.engine.lora_layer import accelerate_layers
from chainlora.engine.packing import PackedBatch, pack
from chainlora.engine.patching import Patches
from chainlora.engine.probes import examine, forget_lengths
from chainlora.engine.score_batches import evaluation_batches, pack_size
from chainlora.engine.threads import MOST_THREADS, Threads, split, why_one_thread
from chainlora.errors import ModelError
from chainlora.models.modes import evaluation_mode
from chainlora.models.shards import at_head, by_module, in_forward, is_sharded
from chainlora.models.text_config import base_model

log = logging.getLogger(__name__)

Kind = Literal["candidates", "completion"]
Speedups = Literal["auto", "off"]
ScoringProgress = Callable[[int, int], None]  # told (rows done, rows) after each batch
Batch = TypeVar("Batch")
Item = TypeVar("Item")
Found = TypeVar("Found")
Result = TypeVar("Result")


class Engine:
    """A model and the fastest way to run it that computes the same function to rounding.

    Args:
        model: a transformers causal language model, frozen but for what is trained.
        speedups: ``auto`` takes every fast path whose probe agrees; ``off`` takes none: the padded
            path, plain forwards, one thread, no packing.
        training: whether gradients will be asked for. Without, every parameter is frozen until
            `close`.
        threads: most threads; None is one a core, up to a few.
        device: where the model is moved to first; None leaves it where it is.

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
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model if device is None else model.to(device)
        # what is fast reads weights of other modules than the one that is called
        self.speedups = "off" if by_module(model) else speedups
        self.notes: list[str] = []
        self.spread: Callable[..., list[Any]] = compute_all  # set where processes share rows
        self.most: Callable[[int], int] = int  # set where they share the model
        self._is_sharded = is_sharded(model)
        self._patches = Patches()
        self._pools: dict[int, Threads] = {}
        self._frozen = [] if training else [p for p in model.parameters() if p.requires_grad]
        try:
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            base_model(model)  # refuses what is not a causal language model
            packing = self.speedups == "auto"
            watch = layers_to_probe(model) if packing else []
            self._findings = examine(model, training=training, packing=packing, watch=watch)
            logit_transform(model)  # refuses a model with other logits; found once, not in a thread
            self.path = self._choose_path()
            self._install(training)
            if self._is_sharded:
                unit = "module" if by_module(model) else "layer"
                self.notes.append(f"weights: shared by processes, whole one {unit} at a time")
            self._choose_threads(threads)
            self._findings.calls.clear()
        except BaseException:
            self.close()
            raise
        for note in self.notes:
            log.info("%s", note)

    # --- what the model computes ---

    def adapt(self, layers: Iterable[nn.Module]) -> None:
        """Give LoRA layers that were put on the model the fused forward; safe to call again."""
        if self.speedups == "auto":
            accelerate_layers(layers, self._patches)

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Return examples as one batch on the model's device."""
        batch = pack(examples, share_prefixes=self.speedups == "auto")
        return batch.to(self._device())

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Cut a micro-batch into the shards that threads take one by one, always the same."""
        shards = split(examples, self.num_threads)
        return [[examples[place] for place in shard] for shard in shards]

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [R, d] at `batch.rows`, after the final norm, differentiable."""
        if self._findings.length:
            forget_lengths(self.model)
        limits = self._findings.limits
        fits = batch.num_tokens <= limits.row and batch.longest <= limits.sequence
        if self.path is ForwardPath.PACKED and fits:
            with suppress(CannotPackError):  # a mask of the model's own, which no probe has met
                return packed_hidden(self.model, batch)
        return padded_hidden(self.model, batch)

    def loss(self, batch: PackedBatch, kind: Kind) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, a scalar, and the number of terms in the sum.

        ``candidates``: cross-entropy over each example's candidates; ``completion``: negative
        log-likelihood of each scored token.
        """
        if kind == "candidates":
            return self._at_head(candidate_loss, batch), batch.num_examples
        return self._at_head(completion_loss, batch)

    def _at_head(self, compute: Callable[..., Result], batch: PackedBatch) -> Result:
        """Return ``compute(model, hidden, batch)``, which may use the head's weights."""
        if not self._is_sharded:
            return compute(self.model, self.hidden(batch), batch)

        def forward() -> Result:
            hidden = self.hidden(batch)
            return at_head(self.model, lambda hidden: compute(self.model, hidden, batch), hidden)

        return in_forward(self.model, forward)

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
            for part, grads in self._threads(self.num_threads).map(gradients, shards):
                total += part
                _accumulate(parameters, grads)
        return total

    def scores(
        self,
        examples: Sequence[Example],
        *,
        max_tokens: int = 4096,
        progress: ScoringProgress | None = None,
    ) -> list[list[float]]:
        """Return, per example, the mean log-probability per token of each of its sequences.

        `max_tokens` bounds what is computed at once, in all threads together. Raises ModelError
        when a score is not a number.
        """
        return self.spread(examples, lambda part: self._scores(part, max_tokens, progress))

    def _scores(
        self, examples: Sequence[Example], max_tokens: int, progress: ScoringProgress | None
    ) -> list[list[float]]:
        if self._findings.length:
            return self._scores_by_length(examples, max_tokens, progress)
        scores: list[list[float]] = [[] for _ in examples]
        threads = self._threads(self._scoring_threads)
        size = pack_size(examples, max_tokens, threads.count)
        if self.path is ForwardPath.PACKED:
            size = min(size, self._findings.limits.row)
        batches = evaluation_batches(examples, max_tokens=size, path=self.path)

        def score(indices: list[int]) -> tuple[list[int], list[float]]:
            batch = self.pack([examples[i] for i in indices])
            with self._no_gradients():
                return indices, self._at_head(candidate_scores, batch).tolist()

        done = 0
        with self.plain():
            for indices, flat in threads.map(score, self._in_step(batches)):
                for index in indices:
                    count = len(examples[index].sequences)
                    scores[index], flat = flat[:count], flat[count:]
                    _check_scores(scores[index], examples[index].row)
                done += len(indices)
                if progress is not None:
                    progress(min(done, len(examples)), len(examples))
        return scores

    def _in_step(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the batches, some again where another process has more of them and shares the
        model with this one."""
        if not self._is_sharded:
            return batches
        batches = list(batches)
        return batches + batches[:1] * (self.most(len(batches)) - len(batches))

    def _scores_by_length(
        self, examples: Sequence[Example], max_tokens: int, progress: ScoringProgress | None
    ) -> list[list[float]]:
        """Score each sequence beside those alone that let it be what it is by itself.

        Below the threshold of the rotary embedding all are alike; above it, those of one length.
        """
        scores = [[math.nan] * len(example.sequences) for example in examples]
        groups: dict[int, list[tuple[int, int]]] = {}
        for index, example in enumerate(examples):
            for slot, sequence in enumerate(example.sequences):
                alike = max(len(sequence), self._findings.threshold)
                groups.setdefault(alike, []).append((index, slot))
        batches: list[list[tuple[int, int]]] = []
        for places in groups.values():
            alone = [_one_sequence(examples[index], slot) for index, slot in places]
            picked = evaluation_batches(alone, max_tokens=max_tokens, path=self.path)
            batches += [[places[i] for i in indices] for indices in picked]
        done = 0
        with self.plain():
            for places in self._in_step(batches):
                batch = self.pack([_one_sequence(examples[i], slot) for i, slot in places])
                found = self._at_head(candidate_scores, batch).tolist()
                for (index, slot), score in zip(places, found, strict=True):
                    scores[index][slot] = score
                    _check_scores([score], examples[index].row)
                done += len(places)
                if progress is not None:
                    total = sum(len(example.sequences) for example in examples)
                    progress(min(done, total) * len(examples) // total, len(examples))
        return scores

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Yield the model for calls of its own forward or `generate`, in inference mode."""
        with evaluation_mode(self.model), self._no_gradients():
            yield self.model

    def _no_gradients(self) -> AbstractContextManager[Any]:
        """Inference mode, in which weights that are gathered could not be trained on later."""
        return torch.no_grad() if self._is_sharded else torch.inference_mode()

    # --- its life ---

    def close(self) -> None:
        """End the threads and give the model everything back; safe to call twice."""
        try:
            for pool in self._pools.values():
                pool.close()
        finally:
            self._pools.clear()
            self._patches.restore()
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose_path(self) -> ForwardPath:
        limits, reason = self._findings.limits, self._findings.packed
        if reason is not None:
            self.notes.append(f"packed sequences: no, {reason}")
            return ForwardPath.PADDED
        within = []
        if limits.sequence < UNLIMITED:
            within.append(f"up to {limits.sequence} tokens each (its attention window)")
        if limits.row < UNLIMITED:
            within.append(f"in rows of up to {limits.row} tokens (`{limits.row_field}`)")
        self.notes.append(", ".join(["packed sequences: yes", *within]))
        return ForwardPath.PACKED

    def _install(self, training: bool) -> None:
        if self.speedups == "off":
            return
        if count := accelerate_linears(self.model, self._patches):
            self.notes.append(
                f"bfloat16 matmuls by float32: yes, in {count} layers; this CPU has none of its own"
            )
        if self.path is not ForwardPath.PACKED:
            return
        reason = self._findings.random or why_plain_layers(
            self.model, self._findings.calls, training=training
        )
        self._patches.set_attention(base_model(self.model), packed_name)
        if reason is None:
            install_fast_layers(self.model, self._patches)
        self.notes.append(f"fast decoder layers: {'yes' if reason is None else 'no, ' + reason}")

    def _choose_threads(self, threads: int | None) -> None:
        """One thread where several would be wrong: for training, and for scoring in between."""
        most = min(torch.get_num_threads(), MOST_THREADS, threads or MOST_THREADS)
        off, found = "speedups are off" if self.speedups == "off" else None, self._findings
        if self._is_sharded:
            off = off or "processes share the weights"
        scoring = off or why_one_thread(self.model, self.path, found.length)
        reason = scoring or found.random
        self.num_threads = 1 if reason else most
        self._scoring_threads = 1 if scoring else most
        self.notes.append(f"threads: {self.num_threads}{', ' + reason if reason else ''}")

    def _threads(self, count: int) -> Threads:
        if count not in self._pools:
            self._pools[count] = Threads(count)
        return self._pools[count]

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def compute_all(
    items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Found]]
) -> list[Found]:
    """Compute all items here: the plain case of `Engine.spread`."""
    return compute(items)


def num_terms(batch: PackedBatch, kind: Kind) -> int:
    """Return how many terms the loss of a batch sums: examples, or scored tokens."""
    return batch.num_examples if kind == "candidates" else batch.num_scored_tokens


def _one_sequence(example: Example, slot: int) -> Example:
    return Example(example.row, (example.sequences[slot],), (example.scored[slot],))


def _check_scores(scores: Sequence[float], row: int) -> None:
    if any(map(math.isnan, scores)):
        raise ModelError(
            f"scores must be numbers (got nan at row {row}); the model's weights or its dtype are "
            "at fault, try float32"
        )


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
