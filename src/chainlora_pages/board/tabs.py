"""What the tabs Train and Ask hold, by Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from chainlora_pages.board.desk import Desk, Mix
from chainlora_pages.board.training import MODELS, Offer, Trainer, command_of, continuing
from chainlora_pages.board.watching import standing_of
from chainlora_pages.charts import Table
from chainlora_pages.page import Numbers, as_text, render_part, section

_SIDES = ("Left", "Right")
_EXPORTS = (
    ("Adapter: for people who serve with PEFT or vLLM", "adapter"),
    ("Merged: a whole model folder, for transformers", "merged"),
    ("GGUF: one file, for Ollama and llama.cpp", "gguf"),
)
_NEXT = {
    "adapter": "Next: give this folder and the base model to PEFT or vLLM.",
    "merged": "Next: load this folder with transformers, as any model.",
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
You get a model that answers as your rows do; you can try it under Ask, undo it and export it.
"""
_STRENGTHS = (
    "How much of each training is in an answer: 1 is all of it, 0 is none. No file changes."
)
_MODEL: Any = {"concurrency_id": "model", "concurrency_limit": 1}  # there is one


def choices(runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return runs as a dropdown takes them."""
    return [(name, str(run)) for name, run in runs.items()]


# --- training ---


def targets(folder: Path | None, runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return the choices of what to train: in a folder of runs a new one, and those there are."""
    new = [("a new run", "")] if folder is not None else []
    return [*new, *choices(runs)]


def standing(trainer: Trainer, shown: str | None = None) -> tuple[Any, ...]:
    """Return where the training is, and the buttons that begin, stop and continue one."""
    is_on, offer = trainer.is_training, _offer(trainer, shown)
    goes_on = gr.Button(offer.label if offer else "Continue", visible=offer is not None)
    return _told_of(trainer), gr.Button(interactive=not is_on), gr.Button(visible=is_on), goes_on


def _offer(trainer: Trainer, shown: str | None) -> Offer | None:
    """Return what to do next about the last command, or a run that was interrupted before."""
    if trainer.is_training or trainer.offer:
        return trainer.offer
    is_left = shown is not None and standing_of(Path(shown))["state"] == "interrupted"
    return continuing(shown) if shown and is_left else None


def _told_of(trainer: Trainer) -> str:
    said, harm = trainer.standing, trainer.harm
    lines = [line for line in trainer.lines() if line != harm]
    text = f"<p>{escape(said)}</p>"
    if harm and not trainer.is_training:
        text += f'<p class="warning">⚠ {escape(_in_plain_words(harm))}</p>'
    listing = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    if "cannot be read: " in said:
        listing = f"<details><summary>Details</summary>{listing}</details>"
    return text + listing if said else ""


def _in_plain_words(harm: str) -> str:
    can_combine = "chainlora combine" in harm
    cure = (
        "Combine tries to keep both: what it has learned, and what it could do."
        if can_combine
        else "Undo takes this training back."
    )
    return (
        f"The model has become worse at what it could do before this training. {cure} "
        f"({harm.removeprefix('warning: ').partition(':')[0]})"
    )


def train_tab(
    trainer: Trainer, folder: Path | None, runs: Mapping[str, Path], run: Any, wanted: Any
) -> list[Any]:
    """Put what begins and stops a training on the page. Returns what `targets` and `standing` are
    shown by; `run` is the one shown, and `wanted` becomes the one that is trained."""
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
        name = gr.Textbox(label="Name", placeholder="That of the file", elem_id="name")
    with gr.Accordion("Settings", open=False), gr.Row():
        # no numbers: Gradio makes an empty one 0 where it is folded away at first
        texts = {"Epochs": "automatic", "Rank": "8", "Learning rate": "default"}
        settings = [gr.Textbox(label=k, placeholder=v, min_width=140) for k, v in texts.items()]
    with gr.Row():
        begin = gr.Button("Train", variant="primary", min_width=120, elem_id="begin")
        stop = gr.Button("Stop", min_width=120, visible=trainer.is_training, elem_id="stop")
        further = gr.Button("Continue", min_width=120, visible=False, elem_id="further")
    step = gr.HTML(elem_id="step")

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
            name=_given(called),
            settings=dict(zip(names, map(_given, values), strict=True)),
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

    shown = [step, begin, stop, further]
    rows.upload(lambda file: name_of_rows(file), rows, name, show_progress="hidden")
    into.input(lambda to: gr.Dropdown(visible=not to), into, model, show_progress="hidden")
    begin.click(train, [rows, into, model, name, *settings], [wanted, *shown])
    stop.click(end, None, shown)
    further.click(go_on, run, shown)
    return [into, *shown]


def _given(text: str | None) -> str | None:
    """Return what a field says; None of an empty one, and of one that was never seen."""
    return (text or "").strip() or None


# --- asking ---


def ask_tab(desk: Desk) -> None:
    """Put two states on the page, and what can be done with them."""
    widgets = _talking(desk)
    for part in (_scoring, _keeping):
        part(desk, widgets)


def _choosing(desk: Desk) -> list[Any]:
    """Put the choice of both states on the page."""
    found, entries = [], [*desk.entries.items()]
    with gr.Row():
        for side, entry in zip(_SIDES, (desk.now.key, desk.before), strict=True):
            keys: Any = {"label": side, "elem_id": f"state-{side}", "interactive": True}
            found.append(gr.Dropdown(entries, value=entry, min_width=300, **keys))
    return found


def _sliders(desk: Desk, side: str, choice: Any) -> list[Any]:
    """Put the strengths of all stages on the page; those of the chosen state are seen."""
    with gr.Column(min_width=300):
        gr.Markdown(f"### {side}")
        keys: Any = {"interactive": True, "step": 0.05}
        sliders = [
            gr.Slider(label=stage, elem_id=f"{side}-{stage}", **own, **keys)
            for stage, own in _ranges(desk, choice.value).items()
        ]

    def choose(entry: str) -> dict[Any, Any]:
        updates = (gr.Slider(**own) for own in _ranges(desk, entry).values())
        return dict(zip(sliders, updates, strict=True))

    choice.input(choose, choice, sliders, show_progress="hidden")
    return sliders


def _ranges(desk: Desk, entry: str) -> dict[str, dict[str, Any]]:
    """Return what the slider of each stage is in a state."""
    known, found = desk.strengths(entry), {}
    for stage in desk.stages:
        now = known.get(stage, 1.0)
        own = {"minimum": min(0, now), "maximum": max(1, now), "value": now}  # `mix` takes any
        found[stage] = own | {"visible": stage in known}
    return found


def _mixes(desk: Desk, values: Sequence[Any]) -> list[Mix]:
    """Return the mixes that the choices and the sliders of both sides say."""
    entries, strengths, stages = values[:2], values[2:], desk.stages
    sides, found = (strengths[: len(stages)], strengths[len(stages) :]), []
    for entry, own in zip(entries, sides, strict=True):
        known = dict(zip(stages, own, strict=True))
        found.append(Mix(entry, {name: known[name] for name in desk.strengths(entry)}))
    return found


@contextmanager
def told() -> Iterator[None]:
    """Show our errors to the person who asked, as the line that they are."""
    try:
        yield
    except ChainLoRAError as error:
        raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error


def _talking(desk: Desk) -> list[Any]:
    """Put prompt, answers and then the sliders on the page, which a phone shows in this order.

    All is drawn again after `undo` or a training; what has a key stays.
    """
    rows, has_template = desk.rows, bool(desk.tokenizer.chat_template)
    is_chat = has_template and (rows is None or rows.is_chat)
    keys: Any = {"lines": 2, "max_lines": 8}
    states = _choosing(desk)
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
    with gr.Accordion("Strengths", open=False):
        gr.Markdown(_STRENGTHS)
        with gr.Row():
            sliders = [_sliders(desk, *each) for each in zip(_SIDES, states, strict=True)]
    widgets = [*states, *sliders[0], *sliders[1]]
    with gr.Accordion("How to answer", open=False), gr.Row():
        as_chat = gr.Checkbox(is_chat, label="Chat template", visible=has_template)
        keys = {"precision": 0, "minimum": 1, "interactive": True}
        limit = gr.Number(answer_limit(rows), label="Most tokens", **keys)
        heat = gr.Slider(0, 2, 0, step=0.1, label="Temperature")

    def talk(
        text: str, chat: bool, most: int | None, temperature: float, *values: Any
    ) -> Iterator[Any]:
        if rows is not None and not chat and not rows.has(text):
            endings = " or ".join(map(repr, rows.endings))
            gr.Warning(f"The rows of this run have prompts that end in {escape(endings)}.")
        question = {"role": "user", "content": text}
        said = [[*_answered(turns), question] for turns in values[:2]]
        yield "" if chat else text, *said
        with told():
            decoding = Decoding(temperature=temperature, max_new_tokens=most or answer_limit(rows))
            for place, mix in enumerate(_mixes(desk, values[2:])):
                asked = said[place]
                for answer in desk.answer(mix, asked, decoding, as_chat=chat):
                    said[place] = [*asked, {"role": "assistant", "content": answer or "(nothing)"}]
                    yield gr.skip(), *said

    asking = gr.on(
        [ask.click, prompt.submit],
        talk,
        [prompt, as_chat, limit, heat, *chats, *widgets],
        [prompt, *chats],
        show_progress_on=chats,
        **_MODEL,
    )
    stop.click(None, cancels=asking)
    clear.click(lambda: ([], []), None, chats, cancels=asking)
    return widgets


def _answered(turns: Sequence[Any]) -> list[dict[str, str]]:
    """Return a conversation as models take it, without a last question that was not answered.

    Gradio gives a text back as its parts.
    """
    found = [
        {"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])}
        for turn in turns
    ]
    return found[:-1] if found and found[-1]["role"] == "user" else found


def _scoring(desk: Desk, widgets: list[Any]) -> None:
    button = gr.Button("Test both on the data's questions")
    view = gr.HTML(apply_default_css=False, elem_id="scores")

    @told()
    def score(*values: Any) -> str:
        mixes = _mixes(desk, values)
        a, b = desk.scores(mixes)
        rows = []
        for one, two in zip(a, b, strict=True):
            error = max(one.error, two.error) or None
            texts = [number(value, 4) for value in (one.value, two.value, error)]
            rows.append((f"{one.stage}, {one.metric} of {one.rows} {one.split}", *texts))
        names, note = [desk.words(mix) for mix in mixes], "±: standard error over the rows."
        title = "What {} and {} score".format(*names)
        table = Table(title, ("rows of", *names, "±"), tuple(rows), note)
        return render_part([section("Scores", Numbers(table))])

    button.click(score, widgets, view, **_MODEL)
    # at once, in the browser: another pair has other scores
    gr.on([each.change for each in widgets], None, None, view, js="() => ''")


def _keeping(desk: Desk, widgets: list[Any]) -> None:
    with gr.Accordion("Export or use", open=False):
        keys: Any = {"interactive": True}  # what has a value is else shown only
        side = gr.Radio(list(_SIDES), value=_SIDES[0], label="Which", **keys)
        kind = gr.Radio(_EXPORTS, value="adapter", label="Export as", **keys)
        folder = gr.Textbox(f"{desk.run}-adapter", label="New folder", elem_id="folder", **keys)
        with gr.Row():
            export = gr.Button("Export")
            save = gr.Button(_using(_SIDES[0]), elem_id="use")
        outcome = gr.Markdown(elem_id="outcome", key=(str(desk.run), "outcome"))

    @told()
    def save_mix(which: str, *values: Any) -> str:
        mix = _mixes(desk, values)[_SIDES.index(which)]
        desk.save(mix)
        return f"In use: {as_text(desk.words(mix))}. Undo takes it back."

    @told()
    def export_mix(which: str, to: str, output: str, *values: Any) -> str:
        done = desk.export(_mixes(desk, values)[_SIDES.index(which)], output, to)
        return f"Exported to `{Path(done['output']).resolve()}`. {_NEXT[to]}"

    kind.input(lambda to: f"{desk.run}-{to}", kind, folder, show_progress="hidden")
    side.input(_using, side, save, show_progress="hidden")
    save.click(save_mix, [side, *widgets], outcome)
    export.click(export_mix, [side, kind, folder, *widgets], outcome)


def _using(side: str) -> str:
    return f"Use {side} from now on (Undo takes it back)"
