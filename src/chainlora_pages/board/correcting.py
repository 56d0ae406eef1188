"""The section "Correct or erase" of the board: replace or take out a data set of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.errors import ChainLoRAError, ConfigError
from chainlora.runs.history_file import read_history
from chainlora.runs.pruning import plan_pruning
from chainlora_pages.board.training import Trainer, copy_rows
from chainlora_pages.board.widgets import changing_choice, known_run, told
from chainlora_pages.page import as_text

_HELP = (
    "**Replace its rows** trains a data set again, on the corrected file that you choose above. "
    "**Take out** deletes its rows and what was learned from them. The other data sets stay. "
    "Undo, at the top of the page, only switches a data set off and deletes nothing."
)


def data_sets(run: str | None) -> Any:
    """Return the data sets of a run as choices."""
    try:
        history = read_history(Path(run)) if run else None
    except ChainLoRAError:
        history = None
    names = [entry.key for entry in history.entries if entry.has_config] if history else []
    return gr.Dropdown(choices=names)


def correcting_part(
    places: Sequence[str | Path], trainer: Trainer, run: Any, rows: Any
) -> tuple[Any, list[Any]]:
    """Create the section. Return the dropdown of data sets, and the events that begin a change."""
    with gr.Accordion("Correct or erase", open=False):
        gr.Markdown(_HELP)
        stage = changing_choice(label="Data set", interactive=True, elem_id="data-set")
        purge = gr.Checkbox(label="Also delete the former rows for good when they are replaced")
        with gr.Row():
            change = gr.Button("Replace its rows", min_width=140, elem_id="replace")
            ask = gr.Button("Take out …", min_width=140, elem_id="take-out")
        with gr.Group(visible=False) as confirm:
            question = gr.Markdown(elem_id="confirm", padding=True)
            with gr.Row():
                erase = gr.Button("Delete it for good", variant="stop", min_width=140)
                keep = gr.Button("Keep it", min_width=140)

    @told()
    def plan_erasing(run: str | None, name: str | None) -> tuple[Any, str]:
        return gr.Group(visible=True), _consequences(known_run(places, run), name)

    @told()
    def begin_erasing(run: str | None, name: str | None) -> tuple[Any, None]:
        plan_pruning(known_run(places, run), name or "")
        trainer.start(["prune", str(run), str(name), "--yes"])
        return gr.Group(visible=False), None

    @told()
    def replace_rows(run: str | None, name: str | None, file: str | None, purge: bool) -> None:
        words = _update(known_run(places, run), name, file, purge)
        trainer.start(words, Path(file or "").name)

    def close() -> Any:
        return gr.Group(visible=False)

    hidden: Any = {"show_progress": "hidden"}
    ask.click(plan_erasing, [run, stage], [confirm, question], **hidden)
    gr.on([keep.click, stage.input, run.change], close, None, confirm, **hidden)
    erased = erase.click(begin_erasing, [run, stage], [confirm, stage], **hidden)
    return stage, [erased, change.click(replace_rows, [run, stage, rows, purge], None, **hidden)]


def _update(run: str, name: str | None, file: str | None, purge: bool) -> list[str]:
    """Return the command that trains a data set again on another file."""
    if not name or not file:
        rule = "Choose a data set here, and its corrected file above"
        raise ConfigError(rule, remedy="both are needed")
    copy = copy_rows(Path(file), Path(run).parent)
    return ["update", run, name, "--data.train", str(copy), "--yes", *["--purge"] * purge]


def _consequences(run: str, name: str | None) -> str:
    """Return what is deleted with a data set, as Markdown. Raises RunError if it cannot be."""
    plan = plan_pruning(run, name or "")
    also = f" Also deleted: {', '.join(plan.later)}, trained on top of it." if plan.later else ""
    again = " The others are combined again, which takes a while." if plan.again else ""
    text = f"{name} will be deleted for good, with its rows.{also}{again} This cannot be undone."
    return as_text(text)
