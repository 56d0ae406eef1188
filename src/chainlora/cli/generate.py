"""`chainlora generate` and `chainlora chat`: generate text with a run or a model, streamed."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from chainlora.cli.common import (
    check_run_or_model,
    dtype_option,
    is_run,
    json_option,
    links_option,
    print_json,
    quiet,
    to_stderr,
)
from chainlora.errors import DataError
from chainlora.runs.paths import split_address

if TYPE_CHECKING:
    from chainlora.evaluation.generation import Message, Speaker
    from chainlora.evaluation.training_rows import RowFacts

_MOST = 256  # tokens of an answer: equals `MOST_TOKENS`, whose module imports torch


def _speaking_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.argument("run_or_model", metavar="RUN|MODEL", type=click.Path()),
        links_option,
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            help=f"Most tokens of an answer. Default: {_MOST}; `generate` uses twice the longest "
            "completion of the run's rows, at least 32, if that is less.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.0,
            help="0 takes the most likely token; a higher value samples.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            help="Sample from the most likely tokens that together have this probability.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the sampling."
        ),
        dtype_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command
@_speaking_options
@click.option("--prompt", help="Text to continue. Default: read from stdin.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without a chat template.")
@json_option
def generate(run_or_model: str, prompt: str | None, raw: bool, as_json: bool, **keys: Any) -> None:
    """Continue a text with a run or a model.

    The output is streamed. If the run's rows are chats, the text is written into the chat template
    as a message of the user, unless it is in the template already.
    """
    check_run_or_model(run_or_model, keys["links"])
    if prompt is None:
        stdin = _stdin()
        if stdin.isatty():
            raise click.UsageError("Missing option '--prompt' (or a text on stdin)")
        prompt = stdin.read()
    speaker, facts = _speaker(run_or_model, **keys)
    if raw or facts is None or facts.has(prompt):
        pieces = speaker.complete(prompt)
    elif facts.is_chat:
        to_stderr(
            "chainlora: asked in the chat template, as the run's rows are; --raw leaves it out"
        )
        pieces = speaker.answer([{"role": "user", "content": prompt}])
    else:
        other = ""
        if facts.has(prompt.rstrip("\r\n")):  # `echo` adds a line break
            other = "; remove the line break at the end of the prompt"
        to_stderr(
            "chainlora: prompts of the run's rows end in "
            f"{' or '.join(map(repr, facts.endings))}, but this prompt does not. The answer may "
            f"make no sense{other}"
        )
        pieces = speaker.complete(prompt)
    if as_json:
        list(pieces)  # the whole answer
        print_json({"prompt": prompt, "text": speaker.text})
    else:
        _show(pieces)
    _tell_of_cut(speaker, is_asked_for=keys["max_new_tokens"] is not None)


def _tell_of_cut(speaker: Speaker, *, is_asked_for: bool) -> None:
    """Tell that the last answer was cut, unless by a limit that the user asked for."""
    if speaker.cut_by == "context":
        to_stderr("chainlora: the answer was cut at the end of the model's context")
    elif speaker.cut_by == "limit" and not is_asked_for:
        to_stderr(
            f"chainlora: the answer was cut after {speaker.decoding.max_new_tokens} tokens; "
            "--max-new-tokens allows more"
        )


@click.command
@_speaking_options
@click.option("--prompt", help="One question to answer. Default: read turns from stdin.")
@click.option("--system", help="A system message before the conversation.")
@click.option(
    "--tools",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A file with a JSON list of tools that the model may call, as in rows.",
)
def chat(
    run_or_model: str, prompt: str | None, system: str | None, tools: Path | None, **keys: Any
) -> None:
    """Chat with a run or a model, using its chat template.

    Each line is a turn. /clear forgets the conversation; /exit or Ctrl-D ends it. With --prompt the
    command answers one question.
    """
    check_run_or_model(run_or_model, keys["links"])
    is_limited = keys["max_new_tokens"] is not None
    keys["max_new_tokens"] = keys["max_new_tokens"] or _MOST
    schemas = None if tools is None else _read_tools(tools)
    speaker, _ = _speaker(run_or_model, **keys)
    from chainlora.evaluation.generation import check_chat

    check_chat(speaker.tokenizer, run_or_model, schemas)
    speaker.tools = schemas
    start = [{"role": "system", "content": system}] if system else []
    _converse(speaker, start, _turns() if prompt is None else [prompt], is_limited)


def _read_tools(file: Path) -> list[dict[str, Any]] | None:
    """Return the tools in a file. Raises DataError unless it is a JSON list of objects."""
    quiet()
    from chainlora.data.encoding.chat import checked_tools
    from chainlora.data.readers import parse_json
    from chainlora.files import reported

    with reported(file, "read"):
        content = file.read_bytes()
    return checked_tools(parse_json(content, str(file)), str(file))


def _converse(
    speaker: Speaker, start: list[Message], turns: Iterable[str | None], is_limited: bool
) -> None:
    """Answer each turn of a user; None starts a new conversation with the messages of `start`."""
    messages = list(start)
    for line in turns:
        if line is None:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            _show(speaker.answer(messages))
        except DataError as error:  # a turn that is too long must not end the conversation
            if len(messages) == len(start) + 1:
                raise
            to_stderr(f"chainlora: {error}")
            messages.pop()
        else:
            _tell_of_cut(speaker, is_asked_for=is_limited)
            messages.append({"role": "assistant", "content": speaker.text})


def _speaker(
    run_or_model: str,
    *,
    links: int | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
) -> tuple[Speaker, RowFacts | None]:
    """Return the speaker, and facts about the run's rows."""
    if top_p < 1 and temperature == 0:
        raise click.UsageError("--top-p needs --temperature above 0, as 0 does not sample")
    quiet()
    from chainlora.evaluation.generation import Decoding, Speaker
    from chainlora.evaluation.training_rows import answer_limit, training_rows
    from chainlora.runs.exported import load_run_or_model

    model, tokenizer = load_run_or_model(run_or_model, num_links=links, dtype=dtype)
    _tell_of_work(run_or_model)
    facts = training_rows(run_or_model, tokenizer)
    decoding = Decoding(temperature, top_p, max_new_tokens or answer_limit(facts), seed)
    return Speaker(model, tokenizer, decoding), facts


def _tell_of_work(run_or_model: str) -> None:
    """Tell what a run lacks of its plan: until it is done, the run answers as before."""
    from chainlora.runs.changes import work_left
    from chainlora.runs.history_file import read_history

    folder, name = split_address(run_or_model)
    if is_run(run_or_model) and name is None and (left := work_left(read_history(folder))):
        finish = f"chainlora train {shlex.quote(run_or_model)} finishes it"
        to_stderr(f"chainlora: {run_or_model} is unfinished, to do: {'; '.join(left)}. {finish}")


def _show(pieces: Iterable[str]) -> None:
    """Print a model's words unescaped, as the user asked for them, and a line break."""
    for piece in pieces:
        click.echo(piece, file=getattr(sys.stdout, "unescaped", None), nl=False)  # flushes
    click.echo()


def _stdin() -> TextIO:
    """Return stdin; bytes that are not text are replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


def _turns() -> Iterator[str | None]:
    """Yield the lines of the user, with a prompt on a terminal; None means /clear."""
    stdin = _stdin()
    is_terminal = stdin.isatty()
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        line = stdin.readline()
        text = line.strip()
        if not line or text in ("/exit", "/quit"):
            return
        if text:
            yield None if text == "/clear" else text
