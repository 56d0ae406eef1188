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

from chainlora.data.templates import render_chats
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.evaluation.generation import greedy_config, run_generate
from chainlora.models.text_config import context_length

Message = dict[str, str]


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
        self.was_cut = False  # the last answer, by its number of tokens
        self._generator = torch.Generator().manual_seed(self.decoding.seed)

    def complete(self, prompt: str, write: Callable[[str], None]) -> str:
        """Continue a text. Raises DataError for one that is empty or fills the context."""
        ids = list(self.tokenizer(prompt)["input_ids"])
        if not ids:
            raise DataError("the prompt must have tokens (got an empty one); give some text")
        return self._speak(ids, write, [])

    def answer(self, messages: Sequence[Message], write: Callable[[str], None]) -> str:
        """Answer a conversation by the chat template, without its oldest turns if it must be."""
        system = [each for each in messages if each["role"] == "system"]
        turns = [each for each in messages if each["role"] != "system"]
        context = context_length(self.model)
        room = context - min(self.decoding.max_new_tokens, context // 2)
        ids = self._chat_ids([*system, *turns])
        while len(ids) > room and len(turns) > 2:
            turns = turns[2:]  # a question and its answer
            ids = self._chat_ids([*system, *turns])
        return self._speak(ids, write, self._ends_of_turn())

    def _chat_ids(self, messages: Sequence[Message], *, open_turn: bool = True) -> list[int]:
        chat = {"messages": messages, "add_generation_prompt": open_turn}
        (reply,) = render_chats(self.tokenizer, [chat])
        if reply.error:
            raise DataError(
                f"the conversation must suit the model's chat template (got: {reply.error:.120}); "
                "leave --system out"
            )
        return list(self.tokenizer(reply.value[0], add_special_tokens=False)["input_ids"])

    def _ends_of_turn(self) -> list[int]:
        """Return the special token that the template writes after an answer, if it writes one.

        The model's own end of sequence is often another one, if it is a base model.
        """
        word = {"role": "assistant", "content": "x"}
        question = {"role": "user", "content": "x"}
        before = self._chat_ids([question])
        after = self._chat_ids([question, word], open_turn=False)[len(before) :]
        special = {int(id_) for id_ in self.tokenizer.added_tokens_decoder}
        return [token for token in after if token in special][:1]

    def _speak(self, ids: list[int], write: Callable[[str], None], ends: list[int]) -> str:
        room = context_length(self.model) - len(ids)
        if room < 1:
            raise DataError(
                f"the prompt must leave room in the context of {context_length(self.model)} tokens "
                f"(got {len(ids)}); shorten it"
            )
        config = self._config(min(self.decoding.max_new_tokens, room), ends)
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
        is_full = len(answer) == self.decoding.max_new_tokens
        self.was_cut = is_full and answer[-1] not in (config.eos_token_id or [])
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _config(self, max_new_tokens: int, ends: list[int]) -> Any:
        config = greedy_config(self.model, self.tokenizer, max_new_tokens)
        own = config.eos_token_id
        all_ends = [*(own if isinstance(own, list) else [own]), *ends]
        config.eos_token_id = [end for end in dict.fromkeys(all_ends) if end is not None] or None
        if self.decoding.temperature > 0:
            config.do_sample = True
            config.temperature = self.decoding.temperature
            config.top_p, config.top_k = self.decoding.top_p, 0
        return config


class _Pieces(TextStreamer):
    """transformers' streamer, which writes to whoever asked instead of to stdout."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        if text:
            self._write(text)


def check_chat(tokenizer: Any, name: str) -> None:
    """Raise ModelError for a model without a chat template."""
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
