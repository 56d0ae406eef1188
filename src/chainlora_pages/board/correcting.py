"""The section "Correct or erase" of the board: take out a data set of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.errors import ChainLoRAError
from chainlora.runs.history_file import read_history
from chainlora.runs.pruning import plan_pruning
from chainlora_pages.board.training import Trainer
from chainlora_pages.board.widgets import changing_choice, known_run, told
from chainlora_pages.page import as_text

_HELP = (
    "Take out a data set to erase its rows and what was learned from them. The other data sets "
    "stay. **Undo**, at the top of the page, only switches it off and deletes nothing."
)


def data_sets(run: str | None) -> Any:
    """Return the data sets of a run as choices."""
    try:
        history = read_history(Path(run)) if run else None
    except ChainLoRAError:
        history = None
    names = [entry.key for entry in history.entries if entry.has_config] if history else []
    return gr.Dropdown(choices=names)


def correcting_part(places: Sequence[str | Path], trainer: Trainer, run: Any) -> tuple[Any, Any]:
    """Create the section. Return the dropdown of data sets, and the event that begins a change."""
    with gr.Accordion("Correct or erase", open=False):
        gr.Markdown(_HELP)
        stage = changing_choice(label="Data set", interactive=True, elem_id="data-set")
        ask = gr.Button("Take out …", elem_id="take-out")
        with gr.Group(visible=False) as confirm:
            question = gr.Markdown(elem_id="confirm", padding=True)
            with gr.Row():
                erase = gr.Button("Delete it for good", variant="stop", min_width=140)
                keep = gr.Button("Keep it", min_width=140)

    @told()
    def plan_erasing(run: str | None, name: str | None) -> tuple[Any, str]:
        return gr.Group(visible=True), _consequences(known_run(places, run), name)

    @told()
    def begin_erasing(run: str | None, name: str | None) -> Any:
        plan_pruning(known_run(places, run), name or "")
        trainer.start(["prune", str(run), str(name), "--yes"])
        return gr.Group(visible=False)

    def close() -> Any:
        return gr.Group(visible=False)

    hidden: Any = {"show_progress": "hidden"}
    ask.click(plan_erasing, [run, stage], [confirm, question], **hidden)
    gr.on([keep.click, stage.input, run.change], close, None, confirm, **hidden)
    return stage, erase.click(begin_erasing, [run, stage], confirm, **hidden)


def _consequences(run: str, name: str | None) -> str:
    """Return what is deleted with a data set, as Markdown. Raises RunError if it cannot be."""
    plan = plan_pruning(run, name or "")
    also = f" Also deleted: {', '.join(plan.later)}, trained on top of it." if plan.later else ""
    again = " The others are combined again, which takes a while." if plan.again else ""
    text = f"{name} will be deleted for good, with its rows.{also}{again} This cannot be undone."
    return as_text(text)
