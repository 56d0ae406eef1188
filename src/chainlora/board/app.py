"""The page, by Gradio: what there is to see and to set. What it does is in `watching` and `desk`.

It is served to this machine alone unless another host is named, and loads nothing from elsewhere:
`Guard` forbids it to the browser, whatever Gradio or a model's answer would fetch.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from chainlora.board.desk import EXPORTS, Desk, Mix
from chainlora.board.watching import find_runs, sections_of
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.generation import Decoding
from chainlora.evaluation.training_rows import answer_limit
from chainlora.reports.charts import Table, number
from chainlora.reports.page import Numbers, as_text, part_style, render_part, section

_SECONDS = 4  # between two looks at the files; what has not changed is not drawn again
_SIDES = ("A", "B")
_MODEL: Any = {"concurrency_id": "model", "concurrency_limit": 1}  # there is one
_PORTS = range(7860, 7960)
_LOCAL = ("127.0.0.1", "localhost")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'"
)
_STYLE = """
.gradio-container { max-width: 84rem !important; }
footer { display: none !important; }
#mix:not(:has(h2, p))::before { content: "Reading the run…"; }
.chainlora { background: none !important; }
.chainlora section:first-child h2 { margin-top: 0; }
"""
_FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def server_of(
    places: Sequence[str | Path], host: str, port: int | None
) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server of the page, the socket that it listens on, and the address of the page.

    ``server.run([socket])`` serves it. Gradio's own `launch` gives up where it does not answer
    itself within seconds, as on a busy machine. `port` None takes the first free one from 7860 on.
    Raises OSError or UnicodeError where none is free, or the host is not one of this machine.
    """
    listening = _listening(host, range(port, port + 1) if port else _PORTS)
    number = listening.getsockname()[1]
    guard = Middleware(Guard, is_local=host in _LOCAL)
    app = gr.mount_gradio_app(
        FastAPI(middleware=[guard], openapi_url=None),
        page_of(places),
        path="/",
        server_name=host,
        server_port=number,
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", **_FONTS),
        head=f"<style>{_STYLE}{part_style()}</style>",
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    name = "localhost" if host == "0.0.0.0" else host
    return _Server(config), listening, f"http://{name}:{number}/"


def _listening(host: str, ports: range) -> socket.socket:
    """Return a socket at the first free port. Raises OSError where there is none."""
    for port in ports:
        try:
            return socket.create_server((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise AssertionError("ports has one or more")


class _Server(uvicorn.Server):
    """Cuts pages that are still open off without a traceback for each."""

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop serving."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


class Guard:
    """ASGI: no other site may call or frame this page, and the page loads nothing from there."""

    def __init__(self, app: Any, is_local: bool) -> None:
        self.app, self.is_local = app, is_local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._may_come(Headers(scope=scope)):
            await PlainTextResponse("not from here", 403)(scope, receive, send)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, answer)

    def _may_come(self, headers: Headers) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            is_own = origin is None or urlsplit(origin).netloc == host
            return is_own and (not self.is_local or urlsplit(f"//{host}").hostname in _LOCAL)
        except ValueError:  # a malformed address
            return False


def page_of(places: Sequence[str | Path]) -> gr.Blocks:
    """Return the page about the runs at some places."""
    desks: list[Desk] = []  # the last one alone has a model in memory
    before = find_runs(places)

    def desk_of(run: str) -> Desk:
        fresh = Desk(run)
        if [desk.what for desk in desks] != [fresh.what]:
            for desk in desks:  # pages that were closed hold them for ever
                desk.release()
            desks[:] = [fresh]
        return desks[0]

    def look(shown: str) -> tuple[Any, str]:
        runs = find_runs(places)
        gone = {} if Path(shown) in runs.values() else {shown: Path(shown)}
        there = gr.skip() if runs == before else gr.Dropdown(_choices(runs | gone), visible=True)
        return there, render_part(sections_of(runs, Path(shown)))

    with gr.Blocks(title="chainlora board", analytics_enabled=False) as blocks:
        several = len(before) > 1
        run = gr.Dropdown(_choices(before), label="Run", visible=several, elem_id="run")
        with gr.Tab("Watch"):
            view = gr.HTML("<p>Reading the run…</p>", apply_default_css=False)
        with gr.Tab("Mix and talk", elem_id="mix"):

            @gr.render(run)
            def mixing(shown: str) -> None:
                try:
                    _mixing(desk_of(shown))
                except ChainLoRAError as error:
                    gr.Markdown(f"{error}. Then load this page again.")

        keys: Any = {"inputs": run, "outputs": [run, view], "show_progress": "hidden"}
        blocks.load(look, **keys)
        run.input(look, **keys)
        gr.Timer(_SECONDS).tick(look, **keys)
    return blocks


def _choices(runs: Mapping[str, Path]) -> list[tuple[str, str]]:
    return [(name, str(run)) for name, run in runs.items()]


# --- mixing ---


def _mixing(desk: Desk) -> None:
    """Put two mixes on the page, and what can be done with them."""
    gr.Markdown(f"## {as_text(desk.run.resolve().name)}")
    widgets = _talking(desk)
    for part in (_scoring, _keeping):
        part(desk, widgets)


def _other_than(now: Mapping[str, float]) -> dict[str, float]:
    """Return the mix to compare with: without the last stage that is on; of the base, with all."""
    on = [stage for stage, strength in now.items() if strength]
    return {**now, on[-1]: 0.0} if on else dict.fromkeys(now, 1.0)


def _sliders(desk: Desk, side: str, strengths: Mapping[str, float]) -> list[Any]:
    found: list[Any] = []
    with gr.Column(min_width=300):
        gr.Markdown(f"### {side}")
        for stage, now in strengths.items():
            keys: Any = {"interactive": True, "elem_id": f"{side}-{stage}", "label": stage}
            least, most = min(0, now), max(1, now)  # `mix` takes any number
            found.append(gr.Slider(least, most, now, step=0.05, **keys))
    return found


def _mixes(desk: Desk, values: Sequence[Any]) -> list[Mix]:
    """Return the mixes that the sliders of both sides say."""
    half = len(values) // 2
    stages = desk.state.strengths
    return [dict(zip(stages, own, strict=True)) for own in (values[:half], values[half:])]


@contextmanager
def _told() -> Iterator[None]:
    """Show our errors to the person who asked, as the line that they are."""
    try:
        yield
    except ChainLoRAError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def _talking(desk: Desk) -> list[Any]:
    """Put prompt, answers and then the sliders on the page, which a phone shows in this order."""
    rows, has_template = desk.rows, bool(desk.tokenizer.chat_template)
    is_chat = has_template and (rows is None or rows.is_chat)
    keys: Any = {"lines": 2, "max_lines": 8, "placeholder": "Shift+Enter asks A, and then B"}
    prompt = gr.Textbox(label="Prompt", elem_id="prompt", **keys)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=90)
        stop, clear = gr.Button("Stop", min_width=90), gr.Button("Clear", min_width=90)
    if not is_chat and (prompts := desk.prompts(3)):
        gr.Examples([[text] for text in prompts], prompt, label="Prompts from its rows")
    with gr.Row():
        keys = {"render_markdown": False, "buttons": [], "height": 280, "min_width": 300}
        chats = [gr.Chatbot(label=f"{s} says", elem_id=f"chat-{s}", **keys) for s in _SIDES]
    now = desk.state.strengths
    with gr.Row():
        widgets = [*_sliders(desk, "A", now), *_sliders(desk, "B", _other_than(now))]
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
            gr.Warning(f"The rows of this run have prompts that end in {endings}.")
        question = {"role": "user", "content": text}
        said = [[*_answered(turns), question] for turns in values[:2]]
        yield "" if chat else text, *said
        with _told():
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
    button = gr.Button("Score A and B")
    view = gr.HTML(apply_default_css=False)

    @_told()
    def score(*values: Any) -> str:
        a, b = desk.scores(_mixes(desk, values))
        rows = []
        for one, two in zip(a, b, strict=True):
            error = max(one.error, two.error) or None
            texts = [number(value, 4) for value in (one.value, two.value, error)]
            rows.append((f"{one.stage}, {one.metric} of {one.rows} {one.split}", *texts))
        heads, note = ("rows of", "A", "B", "±"), "±: standard error over the rows."
        table = Table("What the mixes score", heads, tuple(rows), note)
        return render_part([section("Scores", Numbers(table))])

    button.click(score, widgets, view, **_MODEL)


def _keeping(desk: Desk, widgets: list[Any]) -> None:
    with gr.Accordion("Save or export", open=False):
        keys: Any = {"interactive": True}  # what has a value is else shown only
        side = gr.Radio(list(_SIDES), value="A", label="Which mix", **keys)
        save = gr.Button("Save: the run is this mix from now on")
        with gr.Row():
            kind = gr.Radio(list(EXPORTS), value="adapter", label="Export as", **keys)
            folder = gr.Textbox(f"{desk.run}-mix", label="New folder", **keys)
        export = gr.Button("Export")
        outcome = gr.Markdown(elem_id="outcome")

    @_told()
    def save_mix(which: str, *values: Any) -> str:
        mix = _mixes(desk, values)[_SIDES.index(which)]
        desk.save(mix)
        words = " ".join(f"{stage}={strength:g}" for stage, strength in mix.items())
        return f"Saved, as by `chainlora mix {desk.run} {words}`."

    @_told()
    def export_mix(which: str, to: str, output: str, *values: Any) -> str:
        done = desk.export(_mixes(desk, values)[_SIDES.index(which)], output, to)
        return f"{done['links']} links are in `{done['output']}`."

    save.click(save_mix, [side, *widgets], outcome)
    export.click(export_mix, [side, kind, folder, *widgets], outcome)
