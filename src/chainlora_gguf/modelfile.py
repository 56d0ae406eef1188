"""A Modelfile for Ollama, with the chat template of a tokenizer.

Ollama (https://docs.ollama.com/modelfile) renders chats by a Go template. Without one in the
Modelfile it takes the known template nearest to the one in the GGUF file, and gives
the bare prompt where it knows none. The template here is made of pieces of a rendered chat, and
checked on another chat. Where the rows were no chats, it is the bare prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from chainlora.data.templates import render_chat
from chainlora.runs.state import OpenState
from chainlora_gguf.gguf_writing import context_of

logger = logging.getLogger(__name__)

_CONTEXT = 4096  # tokens that Ollama makes room for by itself


def write_modelfile(
    file: Path, lines: list[str], state: OpenState, stage: str, tokenizer: Any, config: Any
) -> None:
    """Write a Modelfile that begins with these lines, for the rows of a stage."""
    longest = (state.with_rows.config().data.max_length if state.has_run else None) or 0
    room = min(context_of(config), max(_CONTEXT, longest))
    chat = cut_template(tokenizer) if tokenizer.chat_template else None
    if not tokenizer.chat_template or not _is_chat(state, stage, tokenizer):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif chat is None:
        logger.warning("the Modelfile has no TEMPLATE: Ollama guesses this chat template")
    else:
        lines.append(f'TEMPLATE """{chat.in_go()}"""')
        if chat.stop:  # an empty one would stop at once
            lines.append(f'PARAMETER stop "{chat.stop}"')
    file.write_text("\n".join([*lines, f"PARAMETER num_ctx {room}"]) + "\n", encoding="utf-8")


def _is_chat(state: OpenState, stage: str, tokenizer: Any) -> bool:
    """Say whether a chat template wrote the rows; where no rows are kept, that is assumed."""
    kept = state.kept().get(stage)
    if kept is None or not len(kept.train):
        return True
    messages = [{"role": "user", "content": "a"}]
    try:
        said = [_rendered(tokenizer, messages, add_generation_prompt=add) for add in (False, True)]
    except ValueError as error:  # then `cut_template` cuts nothing
        logger.warning("the chat template fails on a question: %s", error)
        return True
    opening = said[1].removeprefix(said[0]).strip()
    return opening in tokenizer.decode(list(kept.train[0].sequences[0]))


class ChatPieces(NamedTuple):
    """What a chat template writes around contents; `start` where there is no system message."""

    system: tuple[str, str] | None  # before and after one; None where the template refuses it
    start: str
    user: str
    assistant: str
    answered: str
    end: str
    stop: str

    def text(self, contents: Sequence[str], system: str | None = None) -> str:
        """Return what a chat of user and assistant in turn becomes."""
        said = self.start if system is None or not self.system else system.join(self.system)
        for user, answer in zip_longest(contents[::2], contents[1::2]):
            said += self.user + user
            said += "" if answer is None else self.assistant + answer + self.answered
        return said + self.end

    def in_go(self) -> str:
        """Return it as a template of Ollama."""
        start = self.start
        if self.system:
            said = "{{ .System }}".join(self.system)
            start = f"{{{{ if .System }}}}{said}{{{{ else }}}}{start}{{{{ end }}}}"
        turn = f'{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
        turn += f'{{{{ else if eq .Role "assistant" }}}}{self.assistant}{{{{ .Content }}}}'
        turn += f"{self.answered}{{{{ end }}}}"
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.end}"


def cut_template(tokenizer: Any) -> ChatPieces | None:
    """Cut a tokenizer's chat template into pieces; None where pieces cannot say what it does.

    BOS, which llama.cpp puts before a text, is left out where the tokenizer puts it there too.
    """
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    bos = tokenizer.bos_token if begins else ""

    def said(contents: Sequence[str], system: str | None = None) -> str:
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        first = [] if system is None else [{"role": "system", "content": system}]
        text = _rendered(tokenizer, first + messages, add_generation_prompt=True)
        return text.removeprefix(bos)

    marks = ("§1§", "§2§", "§3§")
    try:
        bare = _split(said(marks), marks)
    except ValueError:
        return None
    system: list[str] | None
    try:
        system = _split(said(marks, "§0§"), ("§0§", *marks))
    except ValueError:
        system = None  # Gemma's refuses one
    befores = [bare[0], bare[2]] + ([system[1]] if system else [])
    endings = (bare[0][i:] for i in range(len(bare[0]) + 1))
    user = next(end for end in endings if all(text.endswith(end) for text in befores))
    words = re.search(r"<[^<>]+>|\S+", bare[2])
    pieces = ChatPieces(
        system=(system[0], system[1].removesuffix(user)) if system else None,
        start=bare[0].removesuffix(user),
        user=user,
        assistant=bare[1],
        answered=bare[2].removesuffix(user),
        end=bare[3],
        stop=words[0] if words else "",
    )
    chat = ("one  two", "three", "four\nfive", "six", "seven")
    same = pieces.text(chat) == said(chat)
    if system:
        same = same and pieces.text(chat, "eight") == said(chat, "eight")
    literal = "".join(bare + (system or []))
    return pieces if same and not re.search(r'\{\{|"""', literal) else None


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **keys: bool) -> str:
    """Render a chat. Raises ValueError where the template fails."""
    reply = render_chat(tokenizer, {"messages": messages, **keys})
    if reply.error:
        raise ValueError(reply.error)
    return str(reply.value[0])


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """Cut a text at marks, each there once and in this order. Raises ValueError."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]
