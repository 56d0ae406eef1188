"""Write a Modelfile for Ollama, with the chat template of a tokenizer.

Ollama (https://docs.ollama.com/modelfile) renders chats with a Go template. Without a template in
the Modelfile it uses the known template nearest to the one in the GGUF file, or the bare prompt if
none is near. Here the template is assembled from pieces of a rendered chat, and checked on another
chat. If the rows are not chats, the template is the bare prompt.
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

_CONTEXT = 4096  # Ollama's default context, in tokens


def write_modelfile(
    file: Path, lines: list[str], state: OpenState, stage: str, tokenizer: Any, config: Any
) -> None:
    """Write a Modelfile that begins with `lines`, with the template of a stage's rows."""
    longest = (state.with_rows.config().data.max_length if state.has_run else None) or 0
    context = min(context_of(config), max(_CONTEXT, longest))
    chat = cut_template(tokenizer) if tokenizer.chat_template else None
    if not tokenizer.chat_template or not _is_chat(state, stage, tokenizer):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
        kept = state.kept().get(stage)
        if kept is not None and kept.asked["stop"]:  # can be a line break, so three quotes
            lines.append(f'PARAMETER stop """{kept.asked["stop"]}"""')
    elif chat is None:
        logger.warning(
            "the Modelfile has no TEMPLATE, as the chat template cannot be translated; Ollama "
            "guesses one"
        )
    else:
        lines.append(f'TEMPLATE """{chat.in_go()}"""')
        if chat.stop:  # an empty text would stop at once
            lines.append(f'PARAMETER stop "{chat.stop}"')
    file.write_text("\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n", encoding="utf-8")


def _is_chat(state: OpenState, stage: str, tokenizer: Any) -> bool:
    """Return whether a chat template wrote the rows; True if no rows are kept."""
    kept = state.kept().get(stage)
    if kept is None or not len(kept.train):
        logger.warning(
            "no rows of %s are kept: the Modelfile has the chat template; for other prompts write "
            "TEMPLATE {{ .Prompt }} there",
            stage,
        )
        return True
    messages = [{"role": "user", "content": "a"}]
    try:
        texts = [_rendered(tokenizer, messages, add_generation_prompt=add) for add in (False, True)]
    except ValueError as error:  # `cut_template` will return None
        logger.warning("the chat template fails on a question: %s", error)
        return True
    opening = texts[1].removeprefix(texts[0]).strip()
    return opening in tokenizer.decode(list(kept.train[0].sequences[0]))


class ChatPieces(NamedTuple):
    """The texts that a chat template writes around the contents of messages."""

    system: tuple[str, str] | None  # around a system message; None if the template refuses it
    start: str  # the beginning without a system message
    user: str
    assistant: str
    answered: str  # after an answer
    end: str
    stop: str  # the first token-like text after an answer

    def text(self, contents: Sequence[str], system: str | None = None) -> str:
        """Render a chat whose contents alternate between user and assistant."""
        text = self.start if system is None or not self.system else system.join(self.system)
        for user, answer in zip_longest(contents[::2], contents[1::2]):
            text += self.user + user
            text += "" if answer is None else self.assistant + answer + self.answered
        return text + self.end

    def in_go(self) -> str:
        """Return the Go template for Ollama."""
        start = self.start
        if self.system:
            system = "{{ .System }}".join(self.system)
            start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}"
        turn = f'{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
        turn += f'{{{{ else if eq .Role "assistant" }}}}{self.assistant}{{{{ .Content }}}}'
        turn += f"{self.answered}{{{{ end }}}}"
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.end}"


def cut_template(tokenizer: Any) -> ChatPieces | None:
    """Cut a tokenizer's chat template into pieces; None if pieces cannot reproduce it.

    A BOS token is left out if the tokenizer adds it, because llama.cpp adds it too.
    """
    marks = ("§1§", "§2§", "§3§")
    try:
        bare = _split(_chat_text(tokenizer, marks), marks)
    except ValueError:
        return None
    system: list[str] | None
    try:
        system = _split(_chat_text(tokenizer, marks, "§0§"), ("§0§", *marks))
    except ValueError:
        system = None  # some templates refuse a system message (Gemma)
    pieces = _pieces(bare, system)
    # Check the pieces on another chat.
    chat = ("one  two", "three", "four\nfive", "six", "seven")
    same = pieces.text(chat) == _chat_text(tokenizer, chat)
    if system:
        same = same and pieces.text(chat, "eight") == _chat_text(tokenizer, chat, "eight")
    literal = "".join(bare + (system or []))  # must not be read as Go or end the Modelfile's text
    return pieces if same and not re.search(r'\{\{|"""', literal) else None


def _chat_text(tokenizer: Any, contents: Sequence[str], system: str | None = None) -> str:
    """Render contents of user and assistant in turn, without BOS. Raises ValueError."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    first = [] if system is None else [{"role": "system", "content": system}]
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    text = _rendered(tokenizer, first + messages, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token if adds_bos else "")


def _pieces(bare: Sequence[str], system: Sequence[str] | None) -> ChatPieces:
    """Assemble pieces from the texts around three messages, and around a system message too.

    The text before a user's message is the longest common ending of all texts before one.
    """
    before_user = [bare[0], bare[2]] + ([system[1]] if system else [])
    endings = (bare[0][i:] for i in range(len(bare[0]) + 1))
    user = next(end for end in endings if all(text.endswith(end) for text in before_user))
    stop = re.search(r"<[^<>]+>|\S+", bare[2])
    return ChatPieces(
        system=(system[0], system[1].removesuffix(user)) if system else None,
        start=bare[0].removesuffix(user),
        user=user,
        assistant=bare[1],
        answered=bare[2].removesuffix(user),
        end=bare[3],
        stop=stop[0] if stop else "",
    )


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **keys: bool) -> str:
    """Render a chat. Raises ValueError if the template fails."""
    reply = render_chat(tokenizer, {"messages": messages, **keys})
    if reply.error:
        raise ValueError(reply.error)
    return str(reply.value[0])


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """Cut a text at marks in this order. Raises ValueError if one is missing."""
    pieces = []
    for mark in marks:
        before, separator, text = text.partition(mark)
        if not separator:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]
