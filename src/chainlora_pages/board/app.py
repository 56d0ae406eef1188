"""The page of the board in Gradio: layout, events, server and guard.

The page is served only to this machine unless another host is given. It loads nothing from other
sites: `Guard` makes the browser block whatever Gradio or a model's answer would fetch.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from chainlora.errors import ChainLoRAError
from chainlora.evaluation.generation import Decoding
from chainlora.evaluation.training_rows import answer_limit
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import earlier_of, later_of, redo, undo
from chainlora.runs.paths import is_run
from chainlora.runs.state import OpenState
from chainlora_pages.board.ask_tab import ask_tab
from chainlora_pages.board.desk import Desk, added, in_use
from chainlora_pages.board.train_tab import standing, targets, train_tab
from chainlora_pages.board.training import Trainer, plain
from chainlora_pages.board.watching import find_runs, last_changed, sections_of
from chainlora_pages.board.widgets import MODEL, changing_choice, choices, known_run, told
from chainlora_pages.page import Section, as_text, part_style, render_part

_SECONDS = 4  # between two reads of the files; unchanged parts are not drawn again
_NO_RUN = "There is no run yet. Train one."
_TITLE = """# chainlora board
Teach a language model the answers to your questions, one file after another. Each training can be
undone, erased, and exported.
"""
_SPECIALISTS = "For specialists: losses of the data sets, learning rate and links"
_READING = "Reading the run…"
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
#ask:not(:has(button, p))::before { content: "Reading the run…"; }
#now, #step { min-height: 0; }
#now p { margin: 0; }
input[role=combobox] { padding-right: 2.5rem !important; text-overflow: ellipsis; }
#scores:not(:has(table)) { display: none; }
#title h1 { margin: 0; }
#notices p { border-left: 4px solid #b7791f; padding-left: 0.7rem; font-weight: 600; }
#step progress { appearance: none; border: 0; width: 100%; height: 0.7rem; margin-bottom: 0.8rem;
  border-radius: 0.35rem; overflow: hidden; background: #8b95a355; }
#step ::-webkit-progress-bar { background: none; }
#step ::-webkit-progress-value { background: #2563eb; }
#step ::-moz-progress-bar { background: #2563eb; }
#step figure { max-width: 32rem; }
#example :is(pre, code) { white-space: pre-wrap !important; overflow-wrap: anywhere; }
#log pre { margin: 0.4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; }
.chainlora { background: none !important; }
.chainlora section:first-child h2 { margin-top: 0; }
"""
# Gradio 6 opens a menu again when Tab has left it, and then never closes it.
_SCRIPT = """
addEventListener("keydown", (event) => {
  if (event.key === "Tab" && event.target.matches("[role=combobox]")) event.stopPropagation();
}, true);
"""
_FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def server_of(
    places: Sequence[str | Path], host: str, port: int | None
) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server of the page, its listening socket, and the address of the page.

    ``server.run([socket])`` serves the page. Gradio's own `launch` is not used: it gives up if its
    server does not answer within seconds, as on a busy machine. Raises OSError or UnicodeError if
    no port is free, or if `host` is not an address of this machine.
    """
    trainer = Trainer()
    listening = _listening_socket(host, range(port, port + 1) if port else _PORTS)
    number = listening.getsockname()[1]
    guard = Middleware(Guard, is_local=host in _LOCAL)
    page = page_of(places, trainer)
    page.has_launched = True  # otherwise Gradio accepts any path as that of an uploaded file
    app = gr.mount_gradio_app(
        FastAPI(middleware=[guard], openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=number,
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", **_FONTS),
        head=f"<style>{_STYLE}{part_style()}</style><script>{_SCRIPT}</script>",
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    name = "localhost" if host == "0.0.0.0" else host
    return _Server(config, trainer), listening, f"http://{name}:{number}/"


def _listening_socket(host: str, ports: range) -> socket.socket:
    """Return a socket at the first free port. Raises OSError if no port is free."""
    for port in ports:
        try:
            return socket.create_server((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise AssertionError("ports has one or more")


class _Server(uvicorn.Server):
    """Stops a training at shutdown, and closes open pages without a traceback for each."""

    def __init__(self, config: uvicorn.Config, trainer: Trainer) -> None:
        super().__init__(config)
        self.trainer = trainer

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop serving."""
        self.trainer.stop()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


class Guard:
    """ASGI middleware: refuse requests of other sites, and forbid the page to load from them."""

    def __init__(self, app: Any, is_local: bool) -> None:
        self.app, self.is_local = app, is_local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._is_allowed(Headers(scope=scope)):
            await PlainTextResponse("requests of other sites are refused", 403)(
                scope, receive, send
            )
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, answer)

    def _is_allowed(self, headers: Headers) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            is_same_site = origin is None or urlsplit(origin).netloc == host
            return is_same_site and (not self.is_local or urlsplit(f"//{host}").hostname in _LOCAL)
        except ValueError:  # a malformed address
            return False


def page_of(places: Sequence[str | Path], trainer: Trainer) -> gr.Blocks:
    """Return the page about the runs at `places`; the first folder there gets new runs."""
    before = find_runs(places)
    first = next((str(run) for run in before.values()), None)
    folder = next((Path(place) for place in places if not is_run(place)), None)
    desk_of = _one_desk()
    with gr.Blocks(title="chainlora board", analytics_enabled=False) as blocks:
        gr.Markdown(_TITLE, elem_id="title")
        several = len(before) > 1
        keys: Any = {"label": "Run", "visible": several, "elem_id": "run"}
        run = changing_choice(choices(before), value=None, **keys)
        version, wanted = gr.State(""), gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                state = gr.Markdown(elem_id="now")
            back = gr.Button("Undo", size="sm", min_width=90, scale=0, visible=bool(first))
            forth = gr.Button("Redo", size="sm", min_width=90, scale=0, visible=bool(first))
        with gr.Tabs(selected="watch" if first else "train"):
            with gr.Tab("Train", id="train"):
                widgets, changes = train_tab(trainer, places, folder, run, wanted, desk_of)
            with gr.Tab("Watch", id="watch"):
                view = gr.HTML(f"<p>{_READING if first else _NO_RUN}</p>", apply_default_css=False)
                # An accordion of Gradio: a fold in HTML would close on every redraw.
                with gr.Accordion(_SPECIALISTS, open=False, visible=bool(first)) as fold:
                    more = gr.HTML(apply_default_css=False)
            with gr.Tab("Ask", id="ask", elem_id="ask"):

                @gr.render([run, version], triggers=[version.change])
                def asking(shown: str | None, version: str) -> None:
                    try:
                        ask_tab(desk_of(known_run(places, shown))) if shown else gr.Markdown(
                            _NO_RUN
                        )
                    except ChainLoRAError as error:
                        gr.Markdown(as_text(f"{plain(str(error))}."))

        looking: Any = {
            "fn": _look(places, before, folder, trainer),
            "inputs": [run, wanted],
            "outputs": [run, wanted, view, more, fold, version, state, back, forth, *widgets],
            "show_progress": "hidden",
        }
        for button, change in ((back, undo), (forth, redo)):
            changes.append(button.click(told()(_change_handler(places, change)), run, None))
        for event in changes:
            event.then(**looking)
        gr.on([blocks.load, run.input, gr.Timer(_SECONDS).tick], **looking)
        gr.api(_answering(places, desk_of), api_name="ask", **MODEL)
    return blocks


def _answering(
    places: Sequence[str | Path], desk_of: Callable[[str], Desk]
) -> Callable[[str, str, str], str]:
    """Return the function `ask` of the HTTP API."""

    @told()
    def ask(run: str, question: str, state: str = "") -> str:
        """Answer a question in a state of a run, by default the one in use."""
        desk = desk_of(known_run(places, run))
        limit = Decoding(max_new_tokens=answer_limit(desk.rows))
        turns = [{"role": "user", "content": question}]
        is_chat = desk.rows is not None and desk.rows.is_chat
        return [*desk.answer(state or desk.now.key, turns, limit, as_chat=is_chat)][-1]

    return ask


def _look(
    places: Sequence[str | Path], before: Mapping[str, Path], folder: Path | None, trainer: Trainer
) -> Callable[[str | None, str | None], tuple[Any, ...]]:
    """Return the event handler that reads the runs again and updates the page.

    Its arguments are the run that is shown, None for a page that was just opened, and the run to
    show once it exists. `before` are the runs of the first page.
    """

    def look(shown: str | None, wanted: str | None) -> tuple[Any, ...]:
        runs = find_runs(places)
        new = [str(run) for run in runs.values() if wanted and run.resolve() == Path(wanted)]
        is_kept = shown is not None and (Path(shown) in runs.values() or not is_run(shown))
        now = new[0] if new else shown if is_kept else last_changed(runs)
        parts = _parts(sections_of(runs, Path(now))) if now else (_NO_RUN, "")
        pages = (*parts, gr.Accordion(visible=bool(parts[1])))
        run_choice, into = gr.skip(), gr.skip()
        if now and (runs != before or now != shown):
            gone = {} if Path(now) in runs.values() else {now: Path(now)}
            run_choice = gr.Dropdown(choices(runs | gone), value=now, visible=len(runs) > 1)
            target: Any = {"value": now} if now != shown else {}
            into = gr.Dropdown(targets(folder, runs), **target)
        training = (into, *standing(trainer, now))
        return run_choice, None if new else wanted, *pages, *_state_widgets(now), *training

    return look


def _one_desk() -> Callable[[str], Desk]:
    """Return a function from a run to its desk; only the last desk keeps a model in memory."""
    desks: list[Desk] = []

    def desk_of(run: str) -> Desk:
        fresh = Desk(run)
        if [desk.what for desk in desks] == [fresh.what]:
            desks[0].look_again(fresh.now)
            return desks[0]
        for desk in desks:  # Gradio never releases the desks of closed pages
            desk.release()
        desks[:] = [fresh]
        return fresh

    return desk_of


def _change_handler(
    places: Sequence[str | Path], change: Callable[[str], OpenState]
) -> Callable[[str], None]:
    """Return the event handler for `undo` or `redo`, which shows the new state."""

    def move(run: str) -> None:
        state = change(known_run(places, run))
        gr.Info(f"In use: {escape(in_use(state.history, state.key))}. Nothing was deleted.")

    return move


def _state_widgets(run: str | None) -> tuple[Any, ...]:
    """Return a version that changes with the run's state, its text, and the buttons Undo, Redo."""
    try:
        state = None if run is None else open_run(run)
    except ChainLoRAError:
        state = None
    if run is None or state is None:
        return "none", "", gr.Button(visible=False), gr.Button(visible=False)
    history = state.history
    entries = [(entry.key, entry.state.digest) for entry in history.entries]
    version = f"{run} {state.key} {entries} {bool(state.facts)}"
    back, forth = ([*known(history)][:1] for known in (earlier_of, later_of))
    names = [
        f"Undo: {added(history, back[0], state.key)}" if back else "Undo",
        f"Redo: {added(history, state.key, forth[0])}" if forth else "Redo",
    ]
    pairs = zip(names, (back, forth), strict=True)
    keys: Any = {"visible": True}
    buttons = (gr.Button(n.removesuffix(": "), interactive=bool(to), **keys) for n, to in pairs)
    return version, f"In use: **{as_text(in_use(history, state.key))}**", *buttons


def _parts(sections: Sequence[Section]) -> tuple[str, str]:
    """Return sections as HTML: for all readers, and for specialists."""
    plain = [s for s in sections if not s.is_folded]
    folded = [replace(s, is_folded=False) for s in sections if s.is_folded and s.blocks]
    return render_part(plain), render_part(folded) if folded else ""
