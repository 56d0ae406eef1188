"""`chainlora generate` and `chainlora chat`: hear what a run or a model says, piece by piece."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click

from chainlora.cli.common import HELP, json_option, print_json, quiet
from chainlora.cli.runs import check_run_or_model


def _speaking_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what both verbs take."""
    options = (
        click.argument("run_or_model", metavar="RUN|MODEL"),
        click.option(
            "--links",
            type=click.IntRange(min=0),
            default=None,
            help="The chain as it was after K links.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            help="Most tokens of an answer.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token; above it, tokens are drawn.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            show_default=True,
            help="Draw from the likeliest tokens that together have this probability.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            help="Data type of the weights. Default: the run's, or float32.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(context_settings=HELP)
@_speaking_options
@click.option("--prompt", default=None, help="Text to continue; else it is read from stdin.")
@json_option
def generate(run_or_model: str, prompt: str | None, as_json: bool, **keys: Any) -> None:
    """Continue a text with a run or a model.

    The text is printed while the model writes it. `chat` uses the model's chat template, this does
    not.
    """
    check_run_or_model(run_or_model, keys["links"])
    if prompt is None:
        stdin = _stdin()
        if stdin.isatty():
            raise click.UsageError("Missing option '--prompt' (or a text on stdin)")
        prompt = stdin.read()
    speaker = _speaker(run_or_model, **keys)
    text = speaker.complete(prompt, (lambda piece: None) if as_json else _write)
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        click.echo()


@click.command(context_settings=HELP)
@_speaking_options
@click.option("--system", default=None, help="A system message before the conversation.")
def chat(run_or_model: str, system: str | None, **keys: Any) -> None:
    """Talk with a run or a model by its chat template.

    A line is a turn. /clear forgets the conversation; /exit or Ctrl-D ends it.
    """
    check_run_or_model(run_or_model, keys["links"])
    speaker = _speaker(run_or_model, **keys)
    from chainlora.evaluation.streaming import check_chat

    check_chat(speaker.tokenizer, run_or_model)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _turns():
        if line == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        text = speaker.answer(messages, _write)
        click.echo()
        messages.append({"role": "assistant", "content": text})


def _speaker(
    run_or_model: str,
    *,
    links: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
) -> Any:
    if top_p < 1 and temperature == 0:
        raise click.UsageError("--top-p needs --temperature above 0: at 0 no token is drawn")
    quiet()
    from chainlora.evaluation.streaming import Decoding, Speaker
    from chainlora.runs.opening import load_run_or_model

    model, tokenizer = load_run_or_model(run_or_model, num_links=links, dtype=dtype)
    return Speaker(model, tokenizer, Decoding(temperature, top_p, max_new_tokens, seed))


def _write(piece: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may know few characters
    click.echo(piece.encode(encoding, "replace").decode(encoding), nl=False)  # flushes


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
