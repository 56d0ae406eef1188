"""Rows to tokens: what is read, what is a target, what is cut; and which rows make a batch.

Rows are those of a task (`chainlora.data.tasks`) or of a user's own file in one of three formats:

    completion   {"prompt": …, "completion": …}              loss on the completion chat
    {"messages": [{"role": …, "content": …}]}   the model's own chat template, loss on the assistant
    text         {"text": …}                                 loss on everything

Everything is checked here, before training starts, and a row that cannot be used is named by file
and line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from chainlora.data.examples import Example
from chainlora.data.tasks import Task, load_rows, where
from chainlora.errors import ConfigError, DataError, nearest

__all__ = ["FORMATS", "detect_format", "encode_examples", "epoch_batches", "load_rows"]

FORMATS = {"completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
Row = Mapping[str, Any]
Ids = list[int]


@dataclass(frozen=True, slots=True)
class NamedExample(Example):
    """A row whose candidates stand for `names`, which metrics compare with `references` (as in
    ReCoRD)."""

    names: tuple[str, ...] = ()


@dataclass(slots=True)
class _Item:
    """A row on its way to tokens: each sequence is ``ids[start:]`` scored after ``ids[:start]``
    read."""

    place: str
    texts: tuple[str, ...]  # of the candidates, or one
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sequences: tuple[Ids, ...] = ()
    scored: tuple[list[tuple[int, int]], ...] = ()


def encode_examples(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    *,
    max_length: int | None = None,
    truncation: Literal["error", "left"] | None = None,
    add_eos: bool | None = None,
    objective: Literal["candidates", "completion"] | None = None,
    reserve: int = 0,
    before: str = "",
) -> list[Example]:
    """Tokenise rows.

    Where a candidate begins: the sequence is ``tokenizer(prompt + candidate)``, and its candidate
    are the last ``len(sequence) - len(tokenizer(prompt))`` tokens (MeZO's rule; the tokens after
    the prompt, where the prompt's tokens are a prefix). A completion begins at the first token that
    is not the prompt's.

    Args:
        rows: as `load_rows` or `tasks.load_split` give them. tokenizer: of the model; special
        tokens it adds in front stay in front, whatever is cut. task: a task, or a format:
        "completion", "chat", "text" or "auto". max_length: most tokens in a sequence; None is no
        limit. truncation: "left" cuts the oldest tokens of the prompt, by the same number for all
        candidates of a
            row and never the candidate; "error" refuses. None is the task's own, "error" for
            formats.
        add_eos: end completions and texts with the end-of-sequence token. None is the task's own,
        yes for formats. objective: "candidates" gives every candidate, "completion" the right one
        alone (teacher
            forcing). None is "candidates" where the task has some.
        reserve: tokens to keep free after the prompt (for generation).
        before: text in front of every prompt, such as `Task.demonstrations`.

    Raises:
        DataError: no rows; a row that cannot be rendered, tokenises to nothing, or is too long
        (file, line,
            length, limit and remedy are named).
        ConfigError: unknown format.
    """
    if not rows:
        raise DataError("data must hold at least one row (got none); check the file or the split")
    is_task = isinstance(task, Task)
    name = task if isinstance(task, str) else task.name
    if isinstance(task, str) and task == "auto":
        name = task = detect_format(rows)
    if isinstance(task, str) and task not in FORMATS:
        raise ConfigError(
            f"format must be auto, {', '.join(FORMATS)} (got {name!r}{nearest(name, FORMATS)})"
        )
    reader = _Reader(tokenizer)
    eos = (task.add_eos if isinstance(task, Task) else True) if add_eos is None else add_eos
    if isinstance(task, Task):
        items = reader.task_items(rows, task, objective, eos, before)
    elif task == "chat":
        items = reader.chat_items(rows)
    else:
        items = reader.text_items(rows, FORMATS[task], eos)
    cut = truncation or (task.truncation if isinstance(task, Task) else "error")
    keep_scored = is_task or task == "completion"
    if max_length is not None:
        if cut == "error":
            _refuse_long(
                [(_length(item, reserve, keep_scored), item.place) for item in items], max_length
            )
        for item in items:
            reader.fit(item, max_length, reserve, keep_scored=keep_scored)
    return [
        _example(getattr(row, "index", position), item)
        for position, (row, item) in enumerate(zip(rows, items, strict=True))
    ]


def detect_format(rows: Sequence[Row]) -> str:
    """Return the format whose fields the first row has. Raises DataError naming the fields there
    are."""
    for name, fields in FORMATS.items():
        if all(field in rows[0] for field in fields):
            return name
    known = "; ".join(f"{' + '.join(fields)} ({name})" for name, fields in FORMATS.items())
    raise DataError(
        f"rows must have the fields of a format: {known} (got {', '.join(map(str, rows[0]))} at "
        f"{where(rows[0])}); rename the fields or describe them in a task file"
    )


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool = False
) -> list[list[int]]:
    """Return the batches of one epoch as row indices; a pure function of its arguments.

    Every row comes once; the last batch may be smaller. `group_by_length` shuffles the rows, sorts
    windows of 32 batches by length, and shuffles the batches.
    """
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if group_by_length:
        window = 32 * batch_size  # long enough that lengths are alike, short enough to stay random
        order = [
            row
            for start in range(0, len(order), window)
            for row in sorted(order[start : start + window], key=lambda row: lengths[row])
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if group_by_length:
        batches = [
            batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()
        ]
    return batches


def _example(row: int, item: _Item) -> Example:
    sequences, scored = tuple(map(tuple, item.sequences)), tuple(map(tuple, item.scored))
    prompt = sequences[0][: scored[0][-1][0]]
    if item.names and item.label is not None:
        return NamedExample(row, sequences, scored, item.label, prompt, item.references, item.names)
    return Example(row, sequences, scored, item.label, prompt, item.references)


class _Reader:
    """Rows to items with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        plain, whole = self._ids(["a"], special=False)[0], tokenizer("a")["input_ids"]
        starts = [
            at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain
        ]
        self.num_front = starts[0] if starts else 0  # special tokens in front, such as BOS
        self.num_back = len(whole) - len(plain) - self.num_front if starts else 0

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        return list(
            self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        )

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise with the special tokens in front and none behind."""
        end = -self.num_back or None
        return [ids[:end] for ids in self._ids(texts, special=True)]

    def _eos(self) -> Ids:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer must have an end-of-sequence token to end completions with (got "
                "none); set add_eos: false"
            )
        return [self.tokenizer.eos_token_id]

    def task_items(
        self, rows: Sequence[Row], task: Task, objective: str | None, add_eos: bool, before: str
    ) -> list[_Item]:
        shown = [task.render(row, position) for position, row in enumerate(rows)]
        alone = objective == "completion" or task.completion is not None
        if objective == "candidates" and task.completion is not None:
            raise ConfigError(
                f"objective 'candidates' needs a task with candidates (got {task.name!r}, "
                "which has a completion); use objective 'completion'"
            )
        items = [
            _Item(
                where(row, position),
                (one.completion,) if alone else one.candidates,
                None if alone else one.label,
                one.references,
                one.names if task.candidates else (),
            )
            for position, (row, one) in enumerate(zip(rows, shown, strict=True))
        ]
        self._tokenize(
            items,
            [before + one.prompt for one in shown],
            exact=task.completion is None,
            end=self._eos() if add_eos and alone else [],
        )
        for item in items if not alone else ():
            _check_candidates(item, task.scoring)
        return items

    def text_items(self, rows: Sequence[Row], fields: Sequence[str], add_eos: bool) -> list[_Item]:
        for position, row in enumerate(rows):
            for field in fields:
                if not isinstance(row.get(field), str):
                    raise DataError(
                        f"`{field}` must be a text (got {row.get(field)!r:.60} at "
                        f"{where(row, position)}); correct or remove the row"
                    )
        *prompts, last = fields
        items = [
            _Item(where(row, position), (row[last],), references=(row[last],) if prompts else ())
            for position, row in enumerate(rows)
        ]
        starts = [row[prompts[0]] if prompts else "" for row in rows]
        self._tokenize(items, starts, exact=False, end=self._eos() if add_eos else [])
        return items

    def _tokenize(
        self, items: Sequence[_Item], prompts: Sequence[str], *, exact: bool, end: Ids
    ) -> None:
        """Fill in the sequences of items; `exact` is MeZO's rule for where a candidate begins."""
        starts = self.ids(prompts)
        pairs = zip(items, prompts, strict=True)
        wholes = iter(self.ids([prompt + text for item, prompt in pairs for text in item.texts]))
        for item, prompt, read in zip(items, prompts, starts, strict=True):
            sequences, scored = [], []
            for text in item.texts:
                ids = next(wholes)
                start = len(read) if exact else _common(read, ids)
                if len(ids) <= start or len(ids + end) < 2:
                    _refuse_nothing(text, prompt, item.place)
                if start == 0 and (prompt or exact):
                    raise DataError(
                        f"a prompt must be a token at least (got {prompt!r:.40} at "
                        f"{item.place}); lengthen it"
                    )
                sequences.append(ids + end)
                scored.append([(max(start, 1), len(ids) + len(end))])
            item.sequences, item.scored = tuple(sequences), tuple(scored)

    def chat_items(self, rows: Sequence[Row]) -> list[_Item]:
        template = self.tokenizer.chat_template
        if not template:
            raise DataError(
                "the tokenizer must have a chat template for rows of `messages` (got none); use "
                "a chat model, or rows of prompt + completion"
            )
        for position, row in enumerate(rows):
            _check_messages(row.get("messages"), where(row, position))
        marked = "generation %}" in str(template).replace("-%}", "%}")
        turns = self._marked_turns if marked else self._prefix_turns
        return [turns(row["messages"], where(row, position)) for position, row in enumerate(rows)]

    def _marked_turns(self, messages: Sequence[Row], place: str) -> _Item:
        """The template marks the assistant's tokens itself with ``{% generation %}``."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        answer = self._chat(messages, place, **options)
        ids, mask = list(answer["input_ids"]), [0, *answer["assistant_masks"], 0]
        edges = [at for at in range(1, len(mask)) if mask[at] != mask[at - 1]]
        spans = [
            (max(begin - 1, 1), stop - 1)
            for begin, stop in zip(edges[::2], edges[1::2], strict=True)
        ]
        return _chat_item(ids, spans, messages, place)

    def _prefix_turns(self, messages: Sequence[Row], place: str) -> _Item:
        """An assistant's turn is what the template adds to the conversation before it, if it only
        adds."""
        whole = self._chat(messages, place, tokenize=False)
        texts = [whole]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._chat(messages[:index], place, tokenize=False, add_generation_prompt=True)
            after = self._chat(messages[: index + 1], place, tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    "the chat template must render a conversation as a prefix of the longer one "
                    f"(got other text before turn {index + 1} at {place}), or mark turns with "
                    "{% generation %}; end the row with its first assistant turn"
                )
            texts += [before, after.rstrip()]
        ids, *edges = self._ids(texts, special=False)
        places = [_common(edge, ids) for edge in edges]
        spans = [
            (max(begin, 1), stop) for begin, stop in zip(places[::2], places[1::2], strict=True)
        ]
        return _chat_item(ids, spans, messages, place)

    def _chat(self, messages: Sequence[Row], place: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], **options
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"messages must suit the model's chat template (got: {reason:.120} at {place}); "
                "correct the row"
            ) from None

    def fit(self, item: _Item, max_length: int, reserve: int, *, keep_scored: bool) -> None:
        """Cut the oldest tokens after the special ones, the same number in every sequence of the
        row."""
        longest = _length(item, reserve, keep_scored)
        if longest <= max_length:
            return
        excess, front = longest - max_length, self.num_front
        room = min(spans[0][0] for spans in item.scored) - max(front, 1)
        if keep_scored and excess > room:
            raise DataError(
                f"what is scored must fit the context beside one token of prompt (got "
                f"{longest - room} tokens for at most {max_length} at {item.place}); shorten it "
                "or raise data.max_length"
            )
        item.sequences = tuple(ids[:front] + ids[front + excess :] for ids in item.sequences)
        first = max(front, 1)
        item.scored = tuple(
            [
                (max(begin - excess, first), stop - excess)
                for begin, stop in spans
                if stop - excess > first
            ]
            for spans in item.scored
        )
        if not all(item.scored):
            raise DataError(
                f"a cut row must keep something to learn (got only unscored tokens in the last "
                f"{max_length} at {item.place}); shorten it or raise data.max_length"
            )


def _length(item: _Item, reserve: int, keep_scored: bool) -> int:
    """Return the tokens of a row's longest sequence, with room for what is to be generated."""
    longest = max(map(len, item.sequences))
    return max(longest, item.scored[0][0][0] + reserve) if keep_scored else longest


def _refuse_long(lengths: Sequence[tuple[int, str]], max_length: int) -> None:
    """Name the first row that is too long, and how far one would have to go for all of them."""
    long = [(length, place) for length, place in lengths if length > max_length]
    if not long:
        return
    length, place = long[0]
    more = (
        f"; {len(long)} of {len(lengths)} rows are longer, up to {max(long)[0]} tokens"
        if len(long) > 1
        else ""
    )
    raise DataError(
        f"a row must fit the context (got {length} tokens for at most {max_length} at "
        f"{place}{more}); "
        "shorten it, raise data.max_length, or set data.truncation: left"
    )


def _common(first: Ids, second: Ids) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(
        (index for index, (one, other) in pairs if one != other), min(len(first), len(second))
    )


def _refuse_nothing(text: str, prompt: str, place: str) -> NoReturn:
    merged = prompt != prompt.rstrip() and text.strip()
    remedy = (
        "move the prompt's last blank to the start of what follows" if merged else "write some text"
    )
    raise DataError(
        f"a candidate or completion must tokenise to at least one token after its prompt (got "
        f"{text!r:.60} after …{prompt[-20:]!r} at {place}); {remedy}"
    )


def _check_candidates(item: _Item, scoring: str) -> None:
    if scoring == "first_token":
        starts = [start for ((start, _),) in item.scored]
        item.scored = tuple([(start, start + 1)] for start in starts)
        item.sequences = tuple(
            ids[: start + 1] for ids, start in zip(item.sequences, starts, strict=True)
        )
    seen: dict[tuple[int, ...], int] = {}
    for index, (text, ids) in enumerate(zip(item.texts, item.sequences, strict=True)):
        twin = seen.setdefault(tuple(ids), index)
        if twin != index:
            first = scoring == "first_token"
            what = "first tokens under scoring: first_token" if first else "tokens"
            raise DataError(
                f"candidates must have different {what} (got {item.texts[twin]!r} and {text!r} "
                f"at {item.place}); {'use scoring: mean or ' if first else ''}choose other words"
            )


def _check_messages(messages: Any, place: str) -> None:
    good = (
        isinstance(messages, Sequence)
        and not isinstance(messages, str)
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and "content" in message
            for message in messages
        )
    )
    if not good:
        raise DataError(
            f"`messages` must be a list of objects with role and content (got {messages!r:.80} "
            f"at {place}); correct or remove the row"
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"`messages` must have a turn with role assistant to learn from (got roles "
            f"{[message['role'] for message in messages]} at {place}); remove the row"
        )


def _chat_item(
    ids: Ids, spans: list[tuple[int, int]], messages: Sequence[Row], place: str
) -> _Item:
    spans = [(begin, stop) for begin, stop in spans if stop > begin]
    if not spans:
        raise DataError(
            f"an assistant's turn must tokenise to something (got none at {place}); correct it"
        )
    last = next(
        message["content"] for message in reversed(messages) if message["role"] == "assistant"
    )
    return _Item(place, (), references=(str(last),), sequences=(ids,), scored=(spans,))
