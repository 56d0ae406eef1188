"""`chainlora generate` and `chainlora chat`: hear what a run or a model says, piece by piece."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from chainlora import files
from chainlora.cli.common import (
    check_run_or_model,
    chosen_state,
    dtype_option,
    json_option,
    links_option,
    print_json,
    quiet,
    stages_option,
    to_stderr,
)
from chainlora.errors import DataError, FileError

if TYPE_CHECKING:
    from chainlora.evaluation.streaming import Message, Speaker, Tools
    from chainlora.evaluation.training_rows import RowFacts


_MOST = 256  # tokens of an answer: `MOST_TOKENS`, without what it imports


def _speaking_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what both verbs take."""
    options = (
        click.argument("run_or_model", metavar="RUN|MODEL", type=click.Path()),
        links_option,
        stages_option,
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            help=f"Most tokens of an answer. Default: {_MOST}; of `generate` twice the longest "
            "completion of the run's rows, if that is less.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.0,
            help="0 takes the likeliest token; above it, tokens are drawn.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            help="Draw from the likeliest tokens that together have this probability.",
        ),
        click.option("--seed", type=int, default=0, help="Seed of the draws."),
        dtype_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command
@_speaking_options
@click.option("--prompt", help="Text to continue; else it is read from stdin.")
@json_option
def generate(run_or_model: str, prompt: str | None, as_json: bool, **keys: Any) -> None:
    """Continue a text with a run or a model.

    The text is printed while the model writes it. `chat` uses the model's chat template, this does
    not.
    """
    check_run_or_model(run_or_model, keys["links"], keys["stages"])
    if prompt is None:
        stdin = _stdin()
        if stdin.isatty():
            raise click.UsageError("Missing option '--prompt' (or a text on stdin)")
        prompt = stdin.read()
    speaker, facts = _speaker(run_or_model, **keys)
    if facts is not None and not prompt.endswith(facts.ending):
        other = "; `chainlora chat` writes it" if facts.is_chat else ""
        to_stderr(
            f"chainlora: the run's rows have prompts that end in {facts.ending!r}, and this one "
            f"does not: the answer may make no sense{other}"
        )
    text = speaker.complete(prompt, (lambda piece: None) if as_json else _write)
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        click.echo()
    if speaker.cut_by == "context":
        to_stderr("chainlora: the answer was cut where the model's context ends")
    elif speaker.cut_by == "limit" and keys["max_new_tokens"] is None:
        to_stderr(
            f"chainlora: the answer was cut after {speaker.decoding.max_new_tokens} tokens; "
            "--max-new-tokens allows more"
        )


@click.command
@_speaking_options
@click.option("--system", help="A system message before the conversation.")
@click.option(
    "--tools", "tools_file", type=click.Path(), help="JSON file: a list of schemas of functions."
)
@click.option(
    "--save",
    type=click.Path(),
    help="JSONL file: the conversation becomes one more row to train on.",
)
def chat(
    run_or_model: str, system: str | None, tools_file: str | None, save: str | None, **keys: Any
) -> None:
    """Talk with a run or a model by its chat template.

    A line is a turn. /clear forgets the conversation; /exit or Ctrl-D ends it. With --tools, a call
    that the model makes is shown and not executed: the next line is its result.
    """
    check_run_or_model(run_or_model, keys["links"], keys["stages"])
    tools = [] if tools_file is None else _read_tools(Path(tools_file))
    if save is not None:
        _check_appendable(Path(save))
    speaker, _ = _speaker(
        run_or_model, **keys | {"max_new_tokens": keys["max_new_tokens"] or _MOST}
    )
    from chainlora.evaluation.streaming import check_chat, check_tools

    check_chat(speaker.tokenizer, run_or_model)
    if tools_file is not None:
        check_tools(speaker.tokenizer, tools, tools_file)
    start = [{"role": "system", "content": system}] if system else []
    lines = _turns()
    is_cleared = True
    while is_cleared:
        messages: list[Message] = list(start)
        try:
            is_cleared = _talk(speaker, messages, tools, lines)
        finally:
            if save is not None:
                _append(Path(save), messages, tools)


def _talk(speaker: Speaker, messages: list[Message], tools: Tools, lines: Iterator[str]) -> bool:
    """Hold one conversation, its turns appended to `messages`; say whether /clear ended it."""
    from chainlora.evaluation.streaming import message_of

    num_calls = 0
    waiting: list[Any] = []  # calls whose results are to be typed
    for line in lines:
        if line == "/clear":
            return True
        if waiting:
            call = waiting.pop(0)
            told = {"tool_call_id": call["id"], "name": call["function"]["name"]}
            messages.append({"role": "tool", **told, "content": line})
        else:
            messages.append({"role": "user", "content": line})
        if not waiting:
            try:
                text = speaker.answer(messages, _write, tools)
            except DataError as error:  # too long a turn must not end what was said before it
                if not any(each["role"] == "assistant" for each in messages):
                    raise
                to_stderr(f"chainlora: {error}")
                if messages.pop()["role"] == "tool":
                    waiting.insert(0, call)
                continue
            click.echo()
            messages.append(message_of(text, tools, num_calls))
            waiting = list(messages[-1].get("tool_calls", ()))
            num_calls += len(waiting)
        if waiting:
            function = waiting[0]["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            to_stderr(f"call: {function['name']} {arguments}; the next line is its result")
    return False


def _read_tools(path: Path) -> list[Any]:
    """Read a list of schemas. Raises ChainLoRAError subclasses."""
    from chainlora.data.readers import parse_json

    with files.reported(path, "read"):
        found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, list):
        raise DataError("tools must be a list", f"{type(found).__name__} in {path}", "write [...]")
    return found


def _check_appendable(path: Path) -> None:
    """Raise FileError for a file that no row could be appended to, or that is no data file."""
    if path.suffix != ".jsonl":
        raise FileError("--save must be a .jsonl file", path, "e.g. chats.jsonl")
    files.check_writable(path.parent)
    if path.exists():
        with files.reported(path), path.open("ab"):
            pass


def _append(path: Path, messages: Sequence[Message], tools: Tools) -> None:
    """Append a conversation as a row, up to the last answer; nothing where there is none."""
    answers = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
    if not answers:
        return
    row = {"messages": messages[: answers[-1] + 1]} | ({"tools": tools} if tools else {})
    files.make_folder(path.parent)
    with files.reported(path), path.open("ab+") as file:
        file.seek(max(file.seek(0, io.SEEK_END) - 1, 0))
        start = "" if file.read() in (b"", b"\n") else "\n"  # a last row without an end of line
        file.write(f"{start}{json.dumps(row, ensure_ascii=False)}\n".encode())


def _speaker(
    run_or_model: str,
    *,
    links: int | None,
    stages: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
) -> tuple[Speaker, RowFacts | None]:
    """Return who answers, and what the run's own rows are like."""
    if top_p < 1 and temperature == 0:
        raise click.UsageError("--top-p needs --temperature above 0: at 0 no token is drawn")
    quiet()
    from chainlora.evaluation.streaming import Decoding, Speaker
    from chainlora.evaluation.training_rows import answer_limit, training_rows
    from chainlora.runs.opening import load_run_or_model

    state = chosen_state(run_or_model, stages)
    model, tokenizer = load_run_or_model(state, num_links=links, dtype=dtype)
    facts = training_rows(state, tokenizer)
    decoding = Decoding(temperature, top_p, max_new_tokens or answer_limit(facts), seed)
    return Speaker(model, tokenizer, decoding), facts


def _write(piece: str) -> None:
    click.echo(piece, nl=False)  # flushes


def _stdin() -> TextIO:
    """Return stdin, which may hold bytes that are no text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


def _turns() -> Iterator[str]:
    """Yield what the user says, line by line, asking for it where a person is there to answer."""
    stdin = _stdin()
    is_person = stdin.isatty()
    while True:
        if is_person:
            click.echo("> ", nl=False, err=True)
        line = stdin.readline()
        text = line.strip()
        if not line or text in ("/exit", "/quit"):
            return
        if text:
            yield text
