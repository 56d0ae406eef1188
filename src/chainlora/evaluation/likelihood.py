"""Scores: the mean log-probability of every sequence, by an engine that the model has or gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.hidden_states import ForwardPath
from chainlora.engine.score_batches import evaluation_batches as evaluation_batches
from chainlora.models.modes import evaluation_mode

Progress = Callable[[int, int], None]


def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    engine: Engine | None = None,
    path: ForwardPath | None = None,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Return, per example, the mean log-probability per token of each of its sequences.

    `engine` runs the model; without one, one is made for the call. `max_tokens` bounds what is
    computed at once. Raises ModelError when a score is not a number.
    """
    if engine is not None:
        return engine.scores(examples, max_tokens=max_tokens, progress=progress)
    with Engine(model, training=False, path=path) as own:
        return own.scores(examples, max_tokens=max_tokens, progress=progress)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in inference and evaluation mode, and give every module its own mode back."""
    with evaluation_mode(model), torch.inference_mode():
        yield
