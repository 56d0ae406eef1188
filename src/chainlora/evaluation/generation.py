"""Generate text: greedily in batches, or single answers that are streamed.

Batches are for tasks with free-text answers (SQuAD, DROP). Prompts of similar length share a batch,
padded on the left, and are continued by the model's own `generate`. A row ends at its first line
break (or another `stop`) or end-of-sequence token, as in MeZO (arXiv 2305.17333).

A single answer continues a text, or is a turn of a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.engine.engine import ScoringProgress
from chainlora.engine.probes import first_line, forget_lengths, length_dependence
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.models.loading import accelerator
from chainlora.models.shards import is_sharded
from chainlora.models.text_config import compute_dtype, context_length, text_config


class _StopAt(StoppingCriteria):
    """End a row when the text after its prompt contains `stop`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = max(len(self.stop) * 4, 2)  # a character is at most 4 tokens
        new = input_ids[:, self.prompt_width :][:, -last:]
        texts = self.tokenizer.batch_decode(new)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)


def generate_greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: str | None = "\n",
    **keys: Any,
) -> list[str]:
    """Return the greedy continuation of each prompt up to the first `stop`, stripped.

    A prompt (token ids) without room for `max_new_tokens` in the model's context is cut on the
    left; its beginning-of-sequence token is kept. `keys` are those of `continue_greedily`.
    """
    context = context_length(model)
    if not 0 < max_new_tokens < context:
        raise ConfigError(
            f"max_new_tokens must be at least 1 and below the context of {context} tokens "
            f"(got {max_new_tokens}); change it"
        )
    room, bos = context - max_new_tokens, tokenizer.bos_token_id
    shortened = [_cut_left(prompt, room, bos, row) for row, prompt in enumerate(prompts)]
    config = greedy_config(model, tokenizer, max_new_tokens)
    answers = continue_greedily(model, tokenizer, shortened, config, stop=stop, **keys)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.split(stop, 1)[0] if stop else text).strip() for text in texts]


def continue_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop: str | None = None,
    max_tokens: int = 4096,
    progress: ScoringProgress | None = None,
    most: Callable[[int], int] = int,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, with the token that ends the answer.

    Each prompt gets the same answer as alone: prompts of different lengths share a batch only if
    padding does not change results (`_padding_matters`).

    Args:
        stop: text that ends an answer, beside the end-of-sequence tokens.
        max_tokens: the most tokens of a padded batch, with new ones.
        progress: called as ``progress(prompts_done, prompts)``.
        most: returns the largest of a number over all processes that shard the model, because all
            must make the same number of forward passes.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    lengths, new = [len(prompt) for prompt in prompts], int(config.max_new_tokens or 0)
    same_length = most(len(set(lengths))) > 1 and _padding_matters(model, config)
    batches = list(_batches(lengths, new, max_tokens, same_length=same_length))
    # processes with fewer batches repeat their first one
    batches += batches[:1] * (most(len(batches)) - len(batches))
    ends, done = {*(config.eos_token_id or [])}, 0
    for batch in batches:
        forget_lengths(model)
        rows = [prompts[i] for i in batch]
        padded = _left_padded(rows, int(config.pad_token_id), model.device)
        width = padded["input_ids"].shape[1]
        criteria = StoppingCriteriaList([_StopAt(tokenizer, stop, width)] if stop else [])
        keys = {"stopping_criteria": criteria, "synced_gpus": is_sharded(model)}
        output = run_generate(model, config, **padded, **keys)  # [rows, width + new tokens]
        for index, answer in zip(batch, output[:, width:].tolist(), strict=True):
            last = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            answers[index] = answer[: last + 1]
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    return answers


def run_generate(model: Any, config: GenerationConfig, **inputs: Any) -> Any:
    """Call transformers' `generate` with this config alone."""
    # the model's own config is replaced for the call, because `generate` would merge both
    before, model.generation_config = model.generation_config, config
    try:
        return model.generate(**inputs)
    except Exception as error:  # any error of an architecture
        raise ModelError(
            f"the model must generate by transformers' `generate` (got {first_line(error)} from "
            f"{type(model).__name__}); use metrics that score, or another model"
        ) from error
    finally:
        model.generation_config = before


def _cut_left(prompt: Sequence[int], room: int, bos: int | None, row: int) -> list[int]:
    """Return the last `room` tokens of a prompt, with its beginning-of-sequence token."""
    if not prompt:
        raise DataError(
            f"a prompt to continue must have tokens (got none at prompt {row}); check the template"
        )
    if len(prompt) <= room:
        return list(prompt)
    kept = [bos] if bos is not None and prompt[0] == bos and room > 1 else []
    return kept + list(prompt[len(prompt) - room + len(kept) :])


def greedy_config(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    more_ends: Sequence[int] = (),
) -> GenerationConfig:
    """Return plain greedy search; end tokens are those of model and tokenizer, and `more_ends`."""
    own = getattr(model, "generation_config", None)
    of_model = getattr(own, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    known = dict.fromkeys([*of_model, tokenizer.eos_token_id, *more_ends])
    ends = [end for end in known if end is not None]
    pad = tokenizer.pad_token_id
    if pad is None:  # padding is masked, so any id is possible
        pad = ends[0] if ends else 0
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=getattr(own, "bos_token_id", None),
    )


def _padding_matters(model: Any, config: GenerationConfig) -> bool:
    """Say whether padding on the left changes the answers of a model.

    It does for models with a recurrent state that reads the padding (RWKV), and if the angles of
    the rotary embedding depend on the longest row of a batch.
    """
    if length_dependence(model)[0]:
        return True
    probe = GenerationConfig(
        do_sample=False,
        max_new_tokens=3,  # the first is computed from the prompt, the others from its cache
        pad_token_id=config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    vocabulary = int(text_config(model).vocab_size)
    rows = [[(7 * i + j) % vocabulary for i in range(n)] for j, n in ((1, 4), (2, 9))]
    results = []
    try:
        for prompts in (rows[:1], rows):
            inputs = _left_padded(prompts, int(config.pad_token_id), model.device)
            steps = run_generate(model, probe, **inputs).logits
            results.append(torch.stack([logits[0] for logits in steps]))  # [steps, vocabulary]
    except Exception:  # any error of an architecture: prompts of one length are safe
        return True
    # Tolerances are for rounding in two bytes, or in float32. A state that has read the padding is
    # wrong by about its own norm.
    two_bytes = compute_dtype(model) in (torch.bfloat16, torch.float16)
    alone, padded = results
    return bool((alone - padded).norm() > (5e-2 if two_bytes else 1e-3) * alone.norm())


def _batches(
    lengths: Sequence[int], new: int, max_tokens: int, *, same_length: bool
) -> Iterator[list[int]]:
    """Yield the indices of each batch: prompts of similar length, or of the same length."""
    # the longest come first, so that memory peaks in the first batch
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        batch = order[start : start + max(1, max_tokens // (longest + new))]
        if same_length:
            batch = [index for index in batch if lengths[index] == longest]
        yield batch
        start += len(batch)


def _left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, Tensor]:
    """Return token ids and attention mask, both [rows, longest], by the names of `generate`."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


Message = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the most probable one at `temperature` 0, else by sampling.

    `top_p` samples from the most probable tokens with this total probability (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


class Speaker:
    """A model whose answers are iterators over pieces of text; closing one stops the model."""

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding | None = None) -> None:
        self.model = to_accelerator(model)
        self.tokenizer = tokenizer
        self.decoding = decoding or Decoding()
        self.tools: Sequence[Mapping[str, Any]] | None = None  # for the chat template
        self.text = ""  # the last whole answer
        self.cut_by: str | None = None  # "limit" or "context", if the last answer was cut
        self._generator = torch.Generator().manual_seed(self.decoding.seed)

    def complete(self, prompt: str) -> Iterator[str]:
        """Continue a text. Raises DataError for an empty one, or one that fills the context."""
        (ids,) = TokenReader(self.tokenizer).ids([prompt])  # tokenised like prompts of rows
        if not ids:
            raise DataError("the prompt must have tokens (got an empty one); give some text")
        return self._pieces(ids, [])

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Answer a conversation by the chat template; drop the oldest turns if it is too long."""
        system = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        context = context_length(self.model)
        room = context - min(self.decoding.max_new_tokens, context // 2)
        questions = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        ids = self._chat_ids([*system, *turns])
        for question in questions[1:]:
            if len(ids) <= room:
                break
            ids = self._chat_ids([*system, *turns[question:]])
        return self._pieces(ids, ends_of_turn(self.tokenizer))

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation. Raises DataError if the template refuses it."""
        chat = {"messages": messages, "add_generation_prompt": True, "tools": self.tools}
        reply = render_chat(self.tokenizer, chat)
        if reply.error:
            remedy = "leave --system out" if messages[0]["role"] == "system" else "begin a new one"
            raise DataError(
                f"the conversation must suit the model's chat template (got: {reply.error:.120}); "
                f"{remedy}"
            )
        return list(self.tokenizer(reply.value[0], add_special_tokens=False)["input_ids"])

    def _pieces(self, ids: list[int], ends: list[int]) -> Iterator[str]:
        """Yield the answer to a prompt of tokens, which a thread generates."""
        pieces = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = Event()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._speak, ids, ends, pieces, closed)
            done.add_done_callback(lambda _: pieces.end())  # also after an error
            try:
                yield from filter(None, pieces)
            finally:
                closed.set()
        done.result()  # raises the error

    def _speak(
        self, ids: list[int], ends: list[int], streamer: TextIteratorStreamer, closed: Event
    ) -> None:
        """Generate an answer to a prompt of tokens, and note in `cut_by` whether it was cut."""
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
        until = StoppingCriteriaList([lambda *_, **__: closed.is_set()])
        keys: dict[str, Any] = {"streamer": streamer, "stopping_criteria": until}
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self._generator)))
            prompt = _left_padded([ids], 0, self.model.device)
            output = run_generate(self.model, config, **prompt, **keys)
        answer = output[0, len(ids) :].tolist()
        is_cut = len(answer) >= min(limit, room) and answer[-1] not in (config.eos_token_id or [])
        self.cut_by = ("limit" if limit <= room else "context") if is_cut else None
        self.text = str(self.tokenizer.decode(answer, skip_special_tokens=True))


def check_chat(tokenizer: Any, name: str, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Raise ModelError for a model without a chat template, or with one that ignores the tools."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"a model to chat with must have a chat template (got {name}, which has none); use "
            "`chainlora generate` instead"
        )
    chat = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
    with_tools, without = (
        render_chat(tokenizer, chat | {"tools": given}) for given in (tools, None)
    )
    if tools and not with_tools.error and with_tools == without:
        rule, got = "the model's chat template must show `tools`", f"{name}, which ignores them"
        raise ModelError(rule, got, "leave --tools out")


def to_accelerator(model: Any) -> Any:
    """Move a model to the accelerator, if there is one, and return it; quantised models stay."""
    return model if getattr(model, "hf_quantizer", None) is not None else model.to(accelerator())
