"""What encoders share: a row on its way to tokens, and texts to ids with one tokenizer."""

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
    """A row on its way to an example.

    `content` is what was read of the row, as JSON takes it: the digest of the rows is taken of it,
    before anything is cut. `scored` holds, per sequence, the spans ``[start, end)`` of its targets,
    `prompt` the tokens of the prompt read alone, without demonstrations before it, whose last may
    melt into an answer's first.
    """

    index: int
    place: str
    content: Any
    sequences: Sequence[Ids] = ()
    scored: Sequence[list[Span]] = ()
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    prompt: Ids = field(default_factory=list)
    prompt_hash: int = 0

    def example(self) -> Example:
        return Example(
            self.index,
            tuple(map(tuple, self.sequences)),
            tuple(map(tuple, self.scored)),
            self.label,
            self.references,
            self.names if self.label is not None else (),
            prompt_hash=self.prompt_hash,
        )


class Encoder(Protocol):
    """How one objective reads rows.

    A new one is a class, entered in `make_encoder`.
    """

    truncation: str
    """What happens to a row that is too long unless the user says otherwise (`Fit.truncation`)."""
    keeps_targets: bool
    """Whether a cut may take tokens of the prompt only."""

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        """Return the rows as tokens. Raises DataError that names a row that cannot be used."""
        ...

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row that are not read."""
        ...


class TokenReader:
    """A tokenizer that knows which special tokens it adds in front and behind."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokenizer("a")  # this also ends any truncation or padding
        self._backend = _backend(tokenizer)
        # a vocabulary of digits, or of another script, has no "a"
        texts = ["a"] if self._is_read("a") else tokenizer.get_vocab()
        text = next(filter(self._is_read, texts), "a")
        (whole,), (plain,) = self._encode([text], special=True), self.bare([text])
        size = len(plain)
        starts = [at for at in range(len(whole) - size + 1) if whole[at : at + size] == plain]
        self.front = whole[: starts[0]] if starts else []  # special tokens, such as BOS
        self._num_back = len(whole) - size - len(self.front) if starts else 0

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise with the special tokens in front, once if a text has them too, none behind."""
        found, front = self._encode(texts, special=True), len(self.front)
        if front:
            found = [ids[front:] if ids[: 2 * front] == self.front * 2 else ids for ids in found]
        return [ids[: -self._num_back] for ids in found] if self._num_back else found

    def bare(self, texts: Sequence[str]) -> list[Ids]:
        return self._encode(texts, special=False)

    def end(self) -> Ids:
        """Return the end-of-sequence token. Raises DataError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer must have an end-of-sequence token to end rows with (got none); "
                "name one as eos_token in its tokenizer_config.json"
            )
        return [self.tokenizer.eos_token_id]

    def _is_read(self, text: str) -> bool:
        """Say whether a text is tokens of its own, none of them special."""
        (ids,) = self.bare([text])
        return bool(ids) and not {*ids} & {*self.tokenizer.all_special_ids}

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        if self._backend is not None:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
            return [encoding.ids for encoding in found]
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust tokenizer where calling it is what calling `tokenizer` is, else None.

    It skips a third of the time (offsets, masks, checks). A class with an encoding of its own, such
    as one that changes the text first, is left to it.
    """
    own = getattr(type(tokenizer), "_encode_plus", None)
    return tokenizer.backend_tokenizer if own is TokenizersBackend._encode_plus else None


def with_end(ids: Ids, end: Ids) -> Ids:
    """Return ids that end with `end`, once if the text has it too, as TRL does."""
    return ids if ids[-1:] == end else ids + end


def common_prefix(first: Ids, second: Ids) -> int:
    return sum(takewhile(bool, map(eq, first, second)))


def refuse_nothing(text: str, prompt: str, place: str) -> NoReturn:
    """Refuse a text that is no token after its prompt."""
    rule = "a candidate or completion must tokenise to at least one token after its prompt"
    remedy = "write some text"
    if prompt != prompt.rstrip() and text.strip():
        remedy = "move the prompt's last blank to the start of what follows"
    raise bad_row(rule, f"{text!r:.60} after …{prompt[-20:]!r}", place, remedy)


def check_start(start: int, prompt: str, answer: str, place: str) -> None:
    """Refuse a prompt of no token where one is needed to predict the first target from."""
    if start:
        return
    if not prompt:
        got = "'', and this tokenizer puts none in front,"
        raise bad_row("a prompt must be a token at least", got, place, "write some text")
    got = f"{prompt!r:.40} and {answer!r:.40}, which become one token,"
    remedy = "begin the answer with a space, or lengthen the prompt"
    raise bad_row("a prompt must keep a token of its own", got, place, remedy)
