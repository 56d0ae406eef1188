"""One answer at a time, given out piece by piece: continuations of a text, turns of a chat.

A chat goes through the model's own chat template. The oldest turns are left out when a conversation
no longer fits the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.evaluation.generation import greedy_config, run_generate
from chainlora.models.text_config import context_length

Message = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest one at `temperature` 0, else drawn.

    `top_p` draws from the likeliest tokens that together have this probability (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError("`temperature` must be at least 0", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError("`top_p` must be above 0 and at most 1", self.top_p)
        if self.max_new_tokens < 1:
            raise ConfigError("`max_new_tokens` must be at least 1", self.max_new_tokens)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("`seed` must be at least 0 and below 2**63", self.seed)
        if self.top_p < 1 and self.temperature == 0:
            got = f"{self.top_p} at temperature 0, which takes the likeliest"
            remedy = "give a temperature above 0"
            raise ConfigError("`top_p` needs tokens that are drawn", got, remedy)


class Speaker:
    """A model that answers, each piece of text given to `write` as soon as it is whole."""

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding | None = None) -> None:
        self.model = to_accelerator(model)
        self.tokenizer = tokenizer
        self.decoding = decoding or Decoding()
        self.cut_by: str | None = None  # the last answer: by its `limit`, or by the `context`
        self._generator = torch.Generator().manual_seed(self.decoding.seed)

    def complete(self, prompt: str, write: Callable[[str], None]) -> str:
        """Continue a text. Raises DataError for one that is empty or fills the context."""
        (ids,) = TokenReader(self.tokenizer).ids([prompt])  # as rows have prompts
        if not ids:
            raise DataError("the prompt must have tokens (got an empty one); give some text")
        return self._speak(ids, write, [])

    def answer(self, messages: Sequence[Message], write: Callable[[str], None]) -> str:
        """Answer a conversation by the chat template, without its oldest turns if it must be."""
        system = [each for each in messages if each["role"] == "system"]
        turns = [each for each in messages if each["role"] != "system"]
        context = context_length(self.model)
        room = context - min(self.decoding.max_new_tokens, context // 2)
        questions = [at for at, each in enumerate(turns) if each["role"] == "user"]
        ids = self._chat_ids([*system, *turns])
        for question in questions[1:]:
            if len(ids) <= room:
                break
            ids = self._chat_ids([*system, *turns[question:]])
        return self._speak(ids, write, ends_of_turn(self.tokenizer))

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        chat = {"messages": messages, "add_generation_prompt": True, "tools": None}
        reply = render_chat(self.tokenizer, chat)
        if reply.error:
            remedy = "leave --system out" if messages[0]["role"] == "system" else "begin a new one"
            raise DataError(
                f"the conversation must suit the model's chat template (got: {reply.error:.120}); "
                f"{remedy}"
            )
        return list(self.tokenizer(reply.value[0], add_special_tokens=False)["input_ids"])

    def _speak(self, ids: list[int], write: Callable[[str], None], ends: list[int]) -> str:
        limit, context = self.decoding.max_new_tokens, context_length(self.model)
        room = context - len(ids)
        if room < 1:
            raise DataError(
                f"the prompt must leave room in the context of {context} tokens "
                f"(got {len(ids)}); shorten it"
            )
        config = greedy_config(self.model, self.tokenizer, min(limit, room), ends)
        if self.decoding.temperature > 0:
            config.do_sample, config.temperature = True, self.decoding.temperature
            config.top_p, config.top_k = self.decoding.top_p, 0
        prompt = torch.tensor([ids], device=self.model.device)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self._generator)))
            output = run_generate(
                self.model,
                config,
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=_Pieces(self.tokenizer, write),
            )
        answer = output[0, len(ids) :].tolist()
        is_cut = len(answer) >= min(limit, room) and answer[-1] not in (config.eos_token_id or [])
        self.cut_by = ("limit" if limit <= room else "context") if is_cut else None
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


class _Pieces(TextStreamer):
    """transformers' streamer, which writes to whoever asked instead of to stdout."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def check_chat(tokenizer: Any, name: str) -> None:
    if not tokenizer.chat_template:
        raise ModelError(
            f"a model to chat with must have a chat template (got {name}, which has none); use "
            "`chainlora generate` instead"
        )


def to_accelerator(model: Any) -> Any:
    """Return the model on the machine's accelerator, if there is one; quantised ones stay."""
    if getattr(model, "hf_quantizer", None) is not None or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())
