"""The tabs Train and Ask of the board, in Gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.config.staging import name_of_rows
from chainlora.data.sources import SUFFIXES
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.generation import Decoding
from chainlora.evaluation.training_rows import answer_limit
from chainlora.showing import number
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.training import MODELS, Offer, Trainer, command_of, continuing
from chainlora_pages.board.watching import standing_of
from chainlora_pages.charts import Table
from chainlora_pages.page import Numbers, as_text, render_part, section

_SIDES = ("Left", "Right")
_EXPORTS = (
    ("Adapter: to serve with PEFT or vLLM", "adapter"),
    ("Merged: a whole model folder, for transformers", "merged"),
    ("GGUF: one file, for Ollama and llama.cpp", "gguf"),
)
_NEXT = {
    "adapter": "Next: give this folder and the base model to PEFT or vLLM.",
    "merged": "Next: load this folder with transformers, like any model.",
    "gguf": "Next, in this folder: `ollama create NAME -f Modelfile`, then `ollama run NAME`.",
}
_ROWS = """
Each row is one question and the answer that you want. As CSV, which spreadsheets save:
```
instruction,output
When do you open?,"Tuesday to Saturday, from 9 to 17."
Do you repair lamps?,"Yes, for 15 euros."
```
The same as JSONL:
```
{"instruction": "When do you open?", "output": "Tuesday to Saturday, from 9 to 17."}
{"instruction": "Do you repair lamps?", "output": "Yes, for 15 euros."}
```
You get a model that answers like your rows. You can try it under Ask, undo it and export it.
"""
_MODEL: Any = {"concurrency_id": "model", "concurrency_limit": 1}  # all answers use one model


def choices(runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return runs as choices of a dropdown."""
    return [(name, str(run)) for name, run in runs.items()]


# --- training ---


def targets(folder: Path | None, runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return the choices for "Train into": a new run, if there is a folder for it, and the runs."""
    new = [("a new run", "")] if folder is not None else []
    return [*new, *choices(runs)]


def standing(trainer: Trainer, shown: str | None = None) -> tuple[Any, ...]:
    """Return the progress of the training as HTML, and the buttons Train, Stop and Continue."""
    is_on, offer = trainer.is_training, _offer(trainer, shown)
    further = gr.Button(offer.label if offer else "Continue", visible=offer is not None)
    progress = _progress_html(trainer)
    return progress, gr.Button(interactive=not is_on), gr.Button(visible=is_on), further


def _offer(trainer: Trainer, shown: str | None) -> Offer | None:
    """Return the next step after the last command, or for the shown run if it was interrupted."""
    if trainer.is_training or trainer.offer:
        return trainer.offer
    is_interrupted = shown is not None and standing_of(Path(shown))["state"] == "interrupted"
    return continuing(shown) if shown and is_interrupted else None


def _progress_html(trainer: Trainer) -> str:
    progress, harm = trainer.standing, trainer.harm
    lines = [line for line in trainer.lines() if line != harm]
    text = f"<p>{escape(progress)}</p>"
    if harm and not trainer.is_training:
        text += f'<p class="warning">⚠ {escape(_harm_text(harm))}</p>'
    listing = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    if "cannot be read: " in progress:
        listing = f"<details><summary>Details</summary>{listing}</details>"
    return text + listing if progress else ""


def _harm_text(harm: str) -> str:
    """Return the warning of lost general ability in plain words, with its remedy."""
    can_combine = "chainlora combine" in harm
    remedy = (
        "Combine tries to keep both the old abilities and the new answers."
        if can_combine
        else "Undo reverts this training."
    )
    return (
        f"The model has lost some of its earlier abilities in this training. {remedy} "
        f"({harm.removeprefix('warning: ').partition(':')[0]})"
    )


def _train_fields(folder: Path | None, runs: Mapping[str, Path]) -> list[Any]:
    """Create the fields of the tab Train: rows, run, model, name, and settings."""
    gr.Markdown(f"**Your data**: a file of rows ({', '.join(SUFFIXES)})")
    keys: Any = {"file_types": [*SUFFIXES], "height": 140, "show_label": False}
    rows = gr.File(label="Your data", elem_id="rows", **keys)
    gr.Markdown(_ROWS, elem_id="example")
    with gr.Row():
        keys = {"interactive": True, "min_width": 240}
        into = gr.Dropdown(targets(folder, runs), label="Train into", elem_id="into", **keys)
        model = gr.Dropdown(
            [*MODELS],
            value=MODELS[0],
            label="Model, on the Hugging Face Hub or in a folder",
            allow_custom_value=True,
            visible=folder is not None,
            elem_id="model",
            **keys,
        )
        name = gr.Textbox(label="Name", placeholder="Name of the file", elem_id="name")
    with gr.Accordion("Settings", open=False), gr.Row():
        # Textboxes, not numbers: Gradio turns an empty number that starts folded into 0.
        texts = {"Epochs": "automatic", "Rank": "8", "Learning rate": "default"}
        settings = [gr.Textbox(label=k, placeholder=v, min_width=140) for k, v in texts.items()]
    return [rows, into, model, name, *settings]


def train_tab(
    trainer: Trainer, folder: Path | None, runs: Mapping[str, Path], run: Any, wanted: Any
) -> list[Any]:
    """Create the tab Train.

    `run` is the shown run; `wanted` becomes the run that a training writes. Returns the widgets
    that the page updates with `targets` and `standing`.
    """
    fields = rows, into, model, name, *_ = _train_fields(folder, runs)
    with gr.Row():
        begin = gr.Button("Train", variant="primary", min_width=120, elem_id="begin")
        stop = gr.Button("Stop", min_width=120, visible=trainer.is_training, elem_id="stop")
        further = gr.Button("Continue", min_width=120, visible=False, elem_id="further")
    shown = [gr.HTML(elem_id="step"), begin, stop, further]

    @told()
    def train(
        file: str | None, to: str, base: str, called: str, *values: str | None
    ) -> tuple[Any, ...]:
        names = ("chain.epochs", "chain.ranks", "train.lr")
        command = command_of(
            folder or Path(),
            file,
            run=to or None,
            model=base,
            name=_field_text(called),
            settings=dict(zip(names, map(_field_text, values), strict=True)),
        )
        trainer.start(command, Path(file).name if file else "")
        return str(trainer.run.resolve()), *standing(trainer)

    @told()
    def go_on(shown: str | None) -> tuple[Any, ...]:
        if offer := _offer(trainer, shown):
            trainer.start(offer.words)
        return standing(trainer)

    def end() -> tuple[Any, ...]:
        trainer.stop()
        return standing(trainer)

    rows.upload(_name_of_upload, rows, name, show_progress="hidden")
    into.input(lambda to: gr.Dropdown(visible=not to), into, model, show_progress="hidden")
    begin.click(train, fields, [wanted, *shown])
    stop.click(end, None, shown)
    further.click(go_on, run, shown)
    return [into, *shown]


def _name_of_upload(file: str) -> str:
    """Return a name for uploaded rows; the folder of an upload says nothing."""
    return "train" if Path(file).stem == "train" else name_of_rows(file)


def _field_text(text: str | None) -> str | None:
    """Return the text of a field; None if it is empty or was never shown."""
    return (text or "").strip() or None


# --- asking ---


def ask_tab(desk: Desk) -> None:
    """Create the tab Ask: two states to compare, score, export and use."""
    states = _chat_part(desk)
    _score_part(desk, states)
    _export_part(desk, states)


def _state_choices(desk: Desk) -> list[Any]:
    """Create the dropdowns of both states."""
    dropdowns, entries = [], [*desk.entries.items()]
    with gr.Row():
        for side, entry in zip(_SIDES, (desk.now.key, desk.before), strict=True):
            keys: Any = {"label": side, "elem_id": f"state-{side}", "interactive": True}
            dropdowns.append(gr.Dropdown(entries, value=entry, min_width=300, **keys))
    return dropdowns


@contextmanager
def told() -> Iterator[None]:
    """Show errors of chainlora to the user as their one line."""
    try:
        yield
    except ChainLoRAError as error:
        raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error


def _chat_part(desk: Desk) -> list[Any]:
    """Create the states to choose, prompt and answers.

    The tab is drawn again after `undo` or a training; widgets with a key keep their values.
    """
    rows, has_template = desk.rows, bool(desk.tokenizer.chat_template)
    is_chat = has_template and (rows is None or rows.is_chat)
    states = _state_choices(desk)
    keys: Any = {"lines": 2, "max_lines": 8}
    keys |= {"label": "Question or prompt", "key": (str(desk.run), "prompt")}
    prompt = gr.Textbox(elem_id="prompt", **keys)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=90)
        stop, clear = gr.Button("Stop", min_width=90), gr.Button("Clear", min_width=90)
    if not is_chat and (prompts := desk.prompts(3)):
        gr.Examples([[text] for text in prompts], prompt, label="Prompts from its rows")
    with gr.Row():
        keys = {"render_markdown": False, "buttons": [], "height": 280, "min_width": 300}
        chats = [
            gr.Chatbot(label=f"{side} says", elem_id=f"chat-{side}", **keys) for side in _SIDES
        ]
    with gr.Accordion("How to answer", open=False), gr.Row():
        as_chat = gr.Checkbox(is_chat, label="Chat template", visible=has_template)
        keys = {"precision": 0, "minimum": 1, "interactive": True}
        limit = gr.Number(answer_limit(rows), label="Most tokens", **keys)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature")
    asking = gr.on(
        [ask.click, prompt.submit],
        _talk(desk),
        [prompt, as_chat, limit, temperature, *chats, *states],
        [prompt, *chats],
        show_progress_on=chats,
        **_MODEL,
    )
    stop.click(None, cancels=asking)
    clear.click(lambda: ([], []), None, chats, cancels=asking)
    return states


def _talk(desk: Desk) -> Callable[..., Iterator[Any]]:
    """Return the event handler that asks both states and streams their answers."""
    rows = desk.rows

    def talk(
        text: str, chat: bool, most: int | None, temperature: float, *values: Any
    ) -> Iterator[Any]:
        if rows is not None and not chat and not rows.has(text):
            endings = " or ".join(map(repr, rows.endings))
            gr.Warning(f"Prompts of this run's rows end in {escape(endings)}.")
        question = {"role": "user", "content": text}
        shown = [[*_answered(turns), question] for turns in values[:2]]
        yield "" if chat else text, *shown
        with told():
            decoding = Decoding(temperature=temperature, max_new_tokens=most or answer_limit(rows))
            for place, key in enumerate(values[2:]):
                turns = shown[place]
                for answer in desk.answer(key, turns, decoding, as_chat=chat):
                    shown[place] = [*turns, {"role": "assistant", "content": answer or "(nothing)"}]
                    yield gr.skip(), *shown

    return talk


def _answered(turns: Sequence[Any]) -> list[dict[str, str]]:
    """Convert a conversation of Gradio for models, without a last question that has no answer.

    Gradio returns the content of a turn as a list of parts.
    """
    messages = [
        {"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])}
        for turn in turns
    ]
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


def _score_part(desk: Desk, states: list[Any]) -> None:
    button = gr.Button("Test both on the data's questions")
    view = gr.HTML(apply_default_css=False, elem_id="scores")

    @told()
    def score(*keys: str) -> str:
        a, b = desk.scores(keys)
        rows = []
        for one, two in zip(a, b, strict=True):
            error = max(one.error, two.error) or None
            texts = [number(value, 4) for value in (one.value, two.value, error)]
            rows.append((f"{one.stage}, {one.metric} of {one.rows} {one.split}", *texts))
        names, note = [desk.words(key) for key in keys], "±: standard error over the rows."
        title = "Scores of {} and {}".format(*names)
        table = Table(title, ("rows of", *names, "±"), tuple(rows), note)
        return render_part([section("Scores", Numbers(table))])

    button.click(score, states, view, **_MODEL)
    # Clear the scores in the browser at once, because another pair has other scores.
    gr.on([state.change for state in states], None, None, view, js="() => ''")


def _export_part(desk: Desk, states: list[Any]) -> None:
    with gr.Accordion("Export or use", open=False):
        keys: Any = {"interactive": True}  # Gradio makes widgets with a value read-only otherwise
        side = gr.Radio(list(_SIDES), value=_SIDES[0], label="Which", **keys)
        kind = gr.Radio(_EXPORTS, value="adapter", label="Export as", **keys)
        folder = gr.Textbox(f"{desk.run}-adapter", label="New folder", elem_id="folder", **keys)
        with gr.Row():
            export = gr.Button("Export")
            save = gr.Button(_use_label(_SIDES[0]), elem_id="use")
        outcome = gr.Markdown(elem_id="outcome", key=(str(desk.run), "outcome"))

    @told()
    def save_state(which: str, *keys: str) -> str:
        key = keys[_SIDES.index(which)]
        desk.save(key)
        return f"In use: {as_text(desk.words(key))}. Undo reverts it."

    @told()
    def export_state(which: str, to: str, output: str, *keys: str) -> str:
        done = desk.export(keys[_SIDES.index(which)], output, to)
        return f"Exported to `{Path(done['output']).resolve()}`. {_NEXT[to]}"

    kind.input(lambda to: f"{desk.run}-{to}", kind, folder, show_progress="hidden")
    side.input(_use_label, side, save, show_progress="hidden")
    save.click(save_state, [side, *states], outcome)
    export.click(export_state, [side, kind, folder, *states], outcome)


def _use_label(side: str) -> str:
    return f"Use {side} from now on (Undo reverts it)"
