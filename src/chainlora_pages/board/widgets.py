"""Parts that the tabs of the board share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.errors import ChainLoRAError, RunError
from chainlora_pages.board.training import plain
from chainlora_pages.board.watching import find_runs

MODEL: Any = {"concurrency_id": "model", "concurrency_limit": 1}  # all answers use one model


def changing_choice(*values: Any, **keys: Any) -> gr.Dropdown:
    """Create a dropdown whose choices change while the board runs.

    Gradio checks values by the choices of the opened page, and so would refuse new runs to clients
    without a page. Handlers check the value instead, for a run by `known_run`.
    """
    return gr.Dropdown(*values, allow_custom_value=True, **keys)


def known_run(places: Sequence[str | Path], run: str | None) -> str:
    """Return a run of the board. Raises RunError for any other path."""
    if run not in [str(path) for path in find_runs(places).values()]:
        raise RunError("The run must be one of this board", remedy="train one, or choose another")
    return str(run)


def choices(runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return runs as choices of a dropdown."""
    return [(name, str(run)) for name, run in runs.items()]


@contextmanager
def told() -> Iterator[None]:
    """Show errors of chainlora to the user as their one line, until it is dismissed."""
    try:
        yield
    except ChainLoRAError as error:
        text = escape(plain(str(error)))
        raise gr.Error(text, duration=None, print_exception=False) from error
