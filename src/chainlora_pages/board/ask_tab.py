"""The tab Ask of the board, in Gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chainlora.evaluation.generation import Decoding
from chainlora.evaluation.training_rows import answer_limit
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.right_table import answers_html
from chainlora_pages.board.widgets import MODEL, told
from chainlora_pages.page import as_text

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


def ask_tab(desk: Desk) -> None:
    """Create the tab Ask: two states to compare, score, export and use."""
    states = _chat_part(desk)
    _test_part(desk, states)
    _export_part(desk, states)


def _state_choices(desk: Desk) -> list[Any]:
    """Create the dropdowns of both states."""
    dropdowns, entries = [], [*desk.entries.items()]
    with gr.Row():
        for side, entry in zip(_SIDES, (desk.now.key, desk.before), strict=True):
            keys: Any = {"label": side, "elem_id": f"state-{side}", "interactive": True}
            dropdowns.append(gr.Dropdown(entries, value=entry, min_width=300, **keys))
    return dropdowns


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
        **MODEL,
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
        if not text.strip():
            return
        if rows is not None and not chat and not rows.has(text):
            endings = " or ".join(map(repr, rows.endings))
            text_of_warning = f"Prompts of this run's rows end in {escape(endings)}."
            gr.Warning(text_of_warning, duration=None)
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


def _test_part(desk: Desk, states: list[Any]) -> None:
    button = gr.Button("Test both on questions of the data")
    view = gr.HTML(apply_default_css=False, elem_id="scores")

    @told()
    def test(*keys: str) -> str:
        return answers_html(desk, [(desk.words(key), key) for key in keys])

    button.click(test, states, view, **MODEL)
    # Clear the answers in the browser at once, because another pair has other answers.
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
