"""Shared by the encoders: `Draft`, a row before cuts, and `TokenReader`, which tokenises texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from typing import Any, NoReturn, Protocol

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from chainlora.data.examples import Example
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row
from chainlora.errors import DataError

Ids = list[int]
Span = tuple[int, int]


@dataclass(slots=True)
class Draft:
    """A tokenised row before cuts, from which an `Example` is made.

    `content` holds the values that were read, for JSON; the digest of the rows is made from it.
    `scored` holds, per sequence, the spans ``[start, end)`` of its targets. `prompt` holds the
    tokens of the prompt, tokenised alone and without demonstrations; its last token may merge with
    the answer's first one in `sequences`. `asked` holds those of the prompt before the last answer
    of a dialogue; None: it is `prompt`.
    """

    row: Row
    content: Any
    sequences: Sequence[Ids]
    scored: Sequence[list[Span]]
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    prompt: Ids = field(default_factory=list)
    asked: Ids | None = None
    is_joined: bool = False  # a user's prompt and completion have nothing between them
    prompt_hash: int = 0
    answer_hashes: tuple[int, int] = (0, 0)

    def example(self) -> Example:
        return Example(
            self.row.index,
            tuple(map(tuple, self.sequences)),
            tuple(map(tuple, self.scored)),
            self.label,
            self.references,
            self.names if self.label is not None else (),
            prompt_hash=self.prompt_hash,
            answer_hashes=self.answer_hashes,
        )


class Encoder(Protocol):
    """Encodes the rows of one format or kind of task; `make_encoder` lists every encoder."""

    truncation: str
    """The default for rows that are too long (`RowEncoder.truncation`)."""
    keeps_targets: bool
    """Whether cuts remove only tokens of the prompt."""

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        """Tokenise rows. Raises DataError for a bad row, which it names."""
        ...

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row that are not read."""
        ...


class TokenReader:
    """Tokenises texts; knows which special tokens the tokenizer adds at both ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokenizer("a")  # this also ends any truncation or padding
        self._backend = _backend(tokenizer)
        # Some vocabularies (digits, other scripts) have no "a".
        texts = ["a"] if self._is_read("a") else tokenizer.get_vocab()
        text = next(filter(self._is_read, texts), "a")
        (whole,), (plain,) = self._encode([text], special=True), self.bare([text])
        size = len(plain)
        starts = [at for at in range(len(whole) - size + 1) if whole[at : at + size] == plain]
        self.front = whole[: starts[0]] if starts else []  # special tokens, such as BOS
        self._num_back = len(whole) - size - len(self.front) if starts else 0

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise with special tokens in front only, once even if a text contains them too."""
        rows, front = self._encode(texts, special=True), len(self.front)
        if front:
            rows = [ids[front:] if ids[: 2 * front] == self.front * 2 else ids for ids in rows]
        return [ids[: -self._num_back] for ids in rows] if self._num_back else rows

    def bare(self, texts: Sequence[str]) -> list[Ids]:
        return self._encode(texts, special=False)

    def end(self) -> Ids:
        """Return the end-of-sequence token. Raises DataError if the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            rule = "the tokenizer must have an end-of-sequence token"
            raise DataError(rule, "none", "set eos_token in its tokenizer_config.json")
        return [self.tokenizer.eos_token_id]

    def _is_read(self, text: str) -> bool:
        """Return whether a text becomes tokens, none of them special."""
        (ids,) = self.bare([text])
        return bool(ids) and not {*ids} & {*self.tokenizer.all_special_ids}

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
            return [encoding.ids for encoding in encodings]
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust tokenizer if it gives the same ids, in two thirds of the time, else None."""
    # A class that overrides the encoding, for example to change the text first, is called itself.
    encode = getattr(type(tokenizer), "_encode_plus", None)
    return tokenizer.backend_tokenizer if encode is TokenizersBackend._encode_plus else None


def with_end(ids: Ids, end: Ids) -> Ids:
    """Append `end` unless the ids end with it already, as TRL does."""
    return ids if ids[-1:] == end else ids + end


def common_prefix(first: Ids, second: Ids) -> int:
    return sum(takewhile(bool, map(eq, first, second)))


def refuse_no_tokens(text: str, prompt: str, place: str) -> NoReturn:
    """Raise DataError for a text that adds no token to its prompt."""
    rule = "a candidate or completion must tokenise to at least one token after its prompt"
    remedy = "write some text"
    if prompt != prompt.rstrip() and text.strip():
        remedy = "move the blank at the end of the prompt to the start of the answer"
    raise bad_row(rule, f"{text!r:.60} after …{prompt[-20:]!r}", place, remedy)


def check_start(start: int, prompt: str, answer: str, place: str) -> None:
    """Raise DataError if no token precedes the first target, which is predicted from it."""
    if start:
        return
    if not prompt:
        got = "'', and this tokenizer adds no special token in front,"
        raise bad_row("a prompt must have at least one token", got, place, "write some text")
    got = f"{prompt!r:.40} and {answer!r:.40}, which become one token,"
    remedy = "begin the answer with a space, or lengthen the prompt"
    raise bad_row("a prompt must keep a token of its own", got, place, remedy)
