"""A run directory or a model, whichever a name stands for, as a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chainlora.models.loading import load_model
from chainlora.runs.export import load_run


def load_run_or_model(
    run_or_model: str | Path, *, num_links: int | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` of a run's chain, or of a model as `load_model` takes it.

    `num_links` takes a run's chain as it was then; `dtype` defaults to the run's own, or float32.
    """
    if (Path(run_or_model) / "chain.json").is_file():
        return load_run(run_or_model, num_links=num_links, dtype=dtype, as_trained=True)
    return load_model(run_or_model, getattr(torch, dtype or "float32"))
