"""The tab Train of the board: rows, target, progress, and answers after the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.config.staging import name_of_rows
from chainlora.data.sources import SUFFIXES
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.stage_scores import HARM
from chainlora_pages.board.correcting import correcting_part, data_sets
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.models import model_choices, models_at_hand
from chainlora_pages.board.previews import Upload, guess, preview_html, read_upload
from chainlora_pages.board.right_table import answers_html
from chainlora_pages.board.training import (
    PREPARING,
    Offer,
    Trainer,
    command_of,
    continuing,
    plain,
)
from chainlora_pages.board.watching import loss_html, standing_of
from chainlora_pages.board.widgets import MODEL, changing_choice, choices, known_run, told

_ROWS = """
Each row is one question and the answer that you want. As CSV, which spreadsheets save:
```
question,answer
When do you open?,"Tuesday to Saturday, from 9 to 17."
Do you repair lamps?,"Yes, for 15 euros."
```
You get a model that answers like your rows. You can try it under Ask, undo it and export it.
"""
_ASKING = "<p>The model answers the questions of the rows …</p>"
_NAMES = ("chain.epochs", "chain.ranks", "train.lr")  # keys of the fields under Settings


def targets(folder: Path | None, runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return the choices for "Train into": the runs and, if there is a folder for it, a new one."""
    new = [("a new run", "")] if folder is not None else []
    return [*choices(runs), *new]


def standing(trainer: Trainer, shown: str | None = None) -> tuple[Any, ...]:
    """Return the updates of the widgets of `train_tab` but the target, for a run that is shown."""
    is_on, offer = trainer.is_training, _offer(trainer, shown)
    texts = (_harm_text(n) if HARM in n else plain(n) for n in trainer.notices)
    notices = "".join(f"<p>⚠ {escape(text)}</p>" for text in texts)
    log = escape("\n".join(map(plain, trainer.lines())))
    return (
        _progress_html(trainer),
        gr.Button(interactive=not is_on),
        gr.Button(visible=is_on),
        gr.Button(offer.label if offer else "Continue", visible=offer is not None),
        gr.HTML(f'<div role="alert">{notices}</div>', visible=bool(notices)),
        gr.Button(visible=bool(notices)),
        gr.Accordion(visible=bool(log)),
        f"<pre>{log}</pre>",
        trainer.finished,
        data_sets(shown),
    )


def _offer(trainer: Trainer, shown: str | None) -> Offer | None:
    """Return the next step after the last command, or for the shown run if it was interrupted."""
    if trainer.is_training or trainer.offer:
        return trainer.offer
    is_interrupted = shown is not None and standing_of(Path(shown))["state"] == "interrupted"
    return continuing(shown) if shown and is_interrupted else None


def _progress_html(trainer: Trainer) -> str:
    """Return the progress as a sentence, a bar and, while a command runs, the loss curve."""
    if not trainer.is_training:
        return f"<p>{escape(trainer.standing)}</p>" if trainer.standing else ""
    work = trainer.work
    value = "" if work.share is None else f' value="{work.share:.3f}"'
    bar = f'<progress max="1"{value} aria-label="Progress"></progress>'
    curve = "" if work == PREPARING else loss_html(trainer.run)
    return f"<p>{escape(trainer.standing)}</p>{bar}{curve}"


def _harm_text(harm: str) -> str:
    """Return the warning of lost general ability in plain words, with its remedy."""
    remedy = "Undo reverts this training."
    if "chainlora combine" in harm:
        remedy = "Combine tries to keep both the old abilities and the new answers."
    return (
        f"The model has lost some of its earlier abilities in this training. {remedy} "
        f"({harm.partition(':')[0]})"
    )


def _rows_part() -> list[Any]:
    """Create the file of rows, its preview, and the menus of its columns."""
    gr.Markdown(f"**Your data**: a file of questions and answers ({', '.join(SUFFIXES)})")
    keys: Any = {"file_types": [*SUFFIXES], "height": 140, "show_label": False}
    rows = gr.File(label="Your data", elem_id="rows", **keys)
    example = gr.Markdown(_ROWS, elem_id="example")
    preview = gr.HTML(apply_default_css=False, visible=False, elem_id="preview")
    with gr.Row(visible=False) as menus:
        keys = {"interactive": True, "min_width": 200}
        question = changing_choice(label="Column of the questions", elem_id="question", **keys)
        answer = changing_choice(label="Column of the answers", elem_id="answer", **keys)
    return [rows, question, answer, example, preview, menus]


def _target_part(folder: Path | None) -> list[Any]:
    """Create the fields about the run: target, model, name and settings."""
    with gr.Row():
        keys: Any = {"interactive": True, "min_width": 240}
        into = changing_choice(
            targets(folder, {}), value="", label="Train into", elem_id="into", **keys
        )
        first = next(iter(models_at_hand()), None)
        keys |= {"label": "Model (or its folder)", "elem_id": "model"}
        model = changing_choice(model_choices(), value=first, visible=folder is not None, **keys)
        name = gr.Textbox(label="Name", placeholder="Name of the file", elem_id="name")
    with gr.Accordion("Settings", open=False), gr.Row():
        # Textboxes, not numbers: Gradio turns an empty number that starts folded into 0.
        texts = {"Epochs": "automatic", "Rank": "8", "Learning rate": "default"}
        settings = [gr.Textbox(label=k, placeholder=v, min_width=140) for k, v in texts.items()]
    return [into, model, name, *settings]


def _progress_part(trainer: Trainer) -> tuple[list[Any], Any]:
    """Create the buttons, notices and progress. Return what `standing` updates, and the answers."""
    with gr.Row():
        begin = gr.Button("Train", variant="primary", min_width=120, elem_id="begin")
        stop = gr.Button("Stop", min_width=120, visible=trainer.is_training, elem_id="stop")
        further = gr.Button("Continue", min_width=120, visible=False, elem_id="further")
    step = gr.HTML(elem_id="step")
    notices = gr.HTML(visible=False, elem_id="notices")
    dismiss = gr.Button("Dismiss", size="sm", visible=False, elem_id="dismiss")
    table = gr.HTML(apply_default_css=False, elem_id="answers")
    with gr.Accordion("Log", open=False, visible=False) as fold:
        log = gr.HTML(elem_id="log")
    return [step, begin, stop, further, notices, dismiss, fold, log, gr.State("")], table


def train_tab(
    trainer: Trainer,
    places: Sequence[str | Path],
    folder: Path | None,
    run: Any,
    wanted: Any,
    desk_of: Callable[[str], Desk],
) -> tuple[list[Any], list[Any]]:
    """Create the tab Train.

    `run` is the shown run; `wanted` becomes the run that a training writes. Returns the widgets
    that the page updates with `targets` and `standing`, and the events after which it does so.
    """
    rows, question, answer, *read = _rows_part()
    fields = into, model, name, *_ = _target_part(folder)
    shown, table = _progress_part(trainer)
    stage, changes = correcting_part(places, trainer, run, rows)
    _, begin, stop, further, _, dismiss, _, _, finished = shown
    keys: Any = {"show_progress": "hidden"}

    @told()
    def train(
        file: str | None, asked: str | None, right: str | None, to: str, base: str, called: str,
        *values: str | None,
    ) -> str:  # fmt: skip
        command = command_of(
            folder or Path(),
            file,
            columns=(asked, right) if asked or right else None,
            run=known_run(places, to) if to else None,
            model=base,
            name=_field_text(called),
            settings=dict(zip(_NAMES, map(_field_text, values), strict=True)),
        )
        trainer.start(command, Path(file).name if file else "")
        return str(trainer.run.resolve())

    @told()
    def go_on(shown: str | None) -> None:
        if offer := _offer(trainer, shown and known_run(places, shown)):
            trainer.start(offer.words)

    began = begin.click(train, [rows, question, answer, *fields], wanted, **keys)
    changes += [began, further.click(go_on, run, None, **keys)]
    for button, handler in ((stop, trainer.stop), (dismiss, trainer.dismiss)):
        changes.append(button.click(handler, None, None, **keys))
    finished.change(_show_answers(trainer, desk_of), None, table, **keys, **MODEL)
    gr.on([rows.upload, rows.clear], told()(_read), rows, [name, question, answer, *read], **keys)
    columns = [rows, question, answer]
    gr.on([question.input, answer.input], told()(_preview), columns, read[1], **keys)
    into.change(lambda to: gr.Dropdown(visible=not to and folder is not None), into, model, **keys)
    run.input(lambda shown: shown, run, into, **keys)
    return [into, *shown, stage], changes


def _read(file: str | None) -> tuple[Any, ...]:
    """Return the updates for a file: name, menus of columns, example, preview, and their row."""
    upload = read_upload(file) if file else Upload([], [])
    asked, right = guess(upload.columns)
    names = [("(none)", ""), *((name, name) for name in upload.columns)]
    # the folder of an upload says nothing
    name = "train" if file and Path(file).stem == "train" else name_of_rows(file or "")
    return (
        name if file else "",
        gr.Dropdown(choices=names, value=asked or ""),
        gr.Dropdown(choices=names, value=right or ""),
        gr.Markdown(visible=not file),
        gr.HTML(preview_html(upload, asked, right), visible=bool(file)),
        gr.Row(visible=upload.has_pairs),
    )


def _preview(file: str | None, asked: str | None, right: str | None) -> str:
    return preview_html(read_upload(file), asked, right) if file else ""


def _show_answers(trainer: Trainer, desk_of: Callable[[str], Desk]) -> Callable[[], Iterator[str]]:
    """Return the event handler that asks the questions of a finished training."""

    @lru_cache(maxsize=1)  # every open page asks
    def answers(finished: str) -> str:
        try:
            return _answers_of(desk_of(str(trainer.run)), trainer.has_trained)
        except ChainLoRAError as error:
            return f"<p>{escape(plain(str(error)))}</p>"

    def ask_questions() -> Iterator[str]:
        if key := trainer.finished:
            yield _ASKING
        yield answers(key) if key else ""

    return ask_questions


def _answers_of(desk: Desk, has_advice: bool) -> str:
    """Return the answers to the rows of the stage that was trained last, now and before."""
    states = [("got", desk.now.key), ("before", desk.before)]
    entries = reversed(desk.history.entries)
    stage = next((entry.key for entry in entries if entry.key in desk.now.stages), None)
    return answers_html(desk, states, stage, has_advice=has_advice)


def _field_text(text: str | None) -> str | None:
    """Return the text of a field; None if it is empty or was never shown."""
    return (text or "").strip() or None
