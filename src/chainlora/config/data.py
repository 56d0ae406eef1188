"""The keys of `data` and `start_data` in a config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from chainlora.config.section import LARGEST, Count, Number, Section, refuse_if
from chainlora.config.template_names import Argument, checked_arguments, resolved_template

ROW_FIELDS: Mapping[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages", "tools", "chat_template_kwargs"),
    "text": ("text",),
    "question": ("question", "answer"),
    "sharegpt": ("conversations", "system", "tools", "chat_template_kwargs"),
    "alpaca": ("instruction", "input", "output", "system"),
    "conversational": ("prompt", "completion", "tools", "chat_template_kwargs"),
}
"""Fields of a row that are read, by format; preference pairs also have `chosen` and `rejected`."""
FIELDS_KEY = "--data.fields '{question: COLUMN, answer: COLUMN}'"
"""The key that names columns, as an example for messages."""


Home = AfterValidator(lambda value: expanduser(value) if isinstance(value, str) else value)
"""A path; ``~`` becomes the user's home."""
Arguments = Annotated[dict[str, Argument], AfterValidator(checked_arguments)]


class TrainFile(Section):
    """A file of training rows and its weight."""

    path: Annotated[str, Home]
    """File, folder or Hub dataset."""
    weight: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    """Copies of each row per epoch."""


Format = Literal[
    "auto", "completion", "chat", "text", "question", "sharegpt", "alpaca", "conversational"
]


class DataConfig(Section):
    """Where the rows come from, and how they are read. Files are JSONL, JSON, CSV or Parquet."""

    task: Annotated[str | None, Home] = None
    """Path of a [task file](tasks.md), whose prompt and answers the rows of all files get."""
    train: Annotated[str | list[TrainFile] | None, Home] = None
    """File with the training rows, or a list of files, each a path or `{path: …, weight: …}`.
    `weight: 2` reads every row twice per epoch; `weight: 0.5` reads half of the rows, and the other
    half in the next epoch."""
    validation: Annotated[str | Count | Annotated[float, Field(gt=0, lt=1)] | None, Home] = None
    """Rows that choose the best point: a file; or a share (`0.05`) or
    number (`500`) of the prompts in `data.train`, drawn by a hash of their tokens: equal prompts
    stay together. With a share, rows that are added later never move others to the other side; with
    a number they can."""
    test: Annotated[str | None, Home] = None
    """File with the rows to report on."""
    format: Format = "auto"
    """[Format of a row](rows.md#formats): `completion` (loss on the completion), `chat` (loss on
    the assistant's turns), `text` (loss on everything), `question` (a chat of `question` and
    `answer`; without a chat template, a line break between them), and those of other tools:
    `sharegpt`, `alpaca`, `conversational` (TRL). `auto` decides by the first row, and also reads
    [usual columns](rows.md#usual-columns) as `question`."""
    fields: dict[str, str] = Field(default={})
    """Columns for the fields of the format, e.g. `{question: title, answer: body}`; for
    every file of this section."""
    chat_template: Annotated[str, AfterValidator(resolved_template)] | None = None
    """Chat template: a name (`alpaca`, `chatml`, `llama3`, `zephyr`), a file, or Jinja text; `null`
    is the tokenizer's own ([rows](rows.md#chat-templates))."""
    template_arguments: Arguments = Field(default={})
    """Arguments of the chat template, e.g. `{enable_thinking: false}`."""
    num_train: Count | None = None
    """Number of training rows, the first of each file; `null` is all."""
    num_validation: Count | None = None
    """The same for validation."""
    num_test: Count | None = None
    """The same for test."""
    max_length: Annotated[int, Field(ge=2, lt=LARGEST)] | None = None
    """Longest sequence in tokens; `null` is the model's context."""
    truncation: Literal["drop", "cut", "error", "left"] | None = None
    """Treatment of a [longer row](rows.md#rows-that-are-too-long): `drop`, `cut` (the oldest
    tokens of the prompt) or `error`. `null` is the task's own choice, or `error` for files; rows of
    `text` then become several examples."""
    shots: Number = 0
    """Number of demonstrations before each prompt: training rows of a task with their answers, left
    out of training."""
    replay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of every batch to add from kept rows of earlier stages and of `start_data`: 0.1 adds
    one row to a batch of 10. Lengths count only the stage's own rows."""
    new_rows_only: bool = False
    """Leave out training rows that an earlier stage was trained on. Rows are compared by their
    tokens, so a row cut by another `max_length` counts as new."""
    keep_conflicts: bool = False
    """Read rows of earlier stages again also if this stage or a later one has another answer to
    their prompt. `false` leaves them out of `replay` and combinations: the newest
    answer counts ([changed facts](changed-facts.md))."""
    keep_rows: bool | Count = True
    """Keep [a sample of the rows](run-directory.md#what-is-in-it), up to 1,000 training rows or
    this number, and hashes of all rows, in the run directory. Later stages need them for `replay`,
    `new_rows_only`, held-out rows, combining and scores on this stage."""

    @field_validator("train", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        """Accept one file for a list; store a single file without a weight as its path."""
        files = [value] if isinstance(value, Mapping) else value
        if not isinstance(files, list | tuple):
            return value
        refuse_if(not files, "`data.train` must name a file", "an empty list", "e.g. [my.jsonl]")
        files = [{"path": p} if isinstance(p, str | PathLike) else p for p in files]
        is_plain = len(files) == 1 and isinstance(files[0], Mapping) and files[0].keys() == {"path"}
        return files[0]["path"] if is_plain else files

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_number(cls, value: Any) -> Any:
        is_share = isinstance(value, float) and 0 < value < 1
        is_number = type(value) is int and 1 <= value < LARGEST
        refuse_if(
            isinstance(value, int | float) and not (is_share or is_number),
            "`data.validation` must be a file, a share between 0 and 1, or a number from 1",
            f"{value!r:.60}",
            "e.g. 0.05 or 500",
        )
        return value

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        got = "none" if self.task is None else f"only task: {self.task}"
        refuse_if(
            self.train is None, "`data` must name a `train` file", got, "e.g. train: my.jsonl"
        )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> DataConfig:
        task = self.task
        refuse_if(
            self.shots and task is None,
            "`data.shots` needs a task, whose rows are the demonstrations",
            f"{self.shots} without a task",
            "name a task, or leave it out",
        )
        refuse_if(
            self.fields and task is not None,
            "`data.fields` cannot be used with a task, whose file names the columns",
            f"task: {task}",
            "leave one out",
        )
        check_fields(self.fields, self.format)
        refuse_if(
            self.format != "auto" and task is not None,
            "`data.format` cannot be used with a task, whose file describes its rows",
            f"format: {self.format} and task: {task}",
            "leave one out",
        )
        return self

    @model_validator(mode="after")
    def _check_files(self) -> DataConfig:
        paths = [file.path for file in self.train_files]
        refuse_if(
            len(set(paths)) < len(paths),
            "`data.train` must name different files",
            ", ".join(paths),
            "to read a file twice per epoch, set its weight: 2",
        )
        refuse_if(
            self.holds_out and self.num_validation,
            "`data.validation` as a share or number already sets the number of rows",
            f"also num_validation: {self.num_validation}",
            "leave one out",
        )
        return self

    @property
    def train_files(self) -> list[TrainFile]:
        """The files of training rows."""
        return [TrainFile(path=self.train)] if isinstance(self.train, str) else self.train or []

    @property
    def holds_out(self) -> bool:
        """Whether validation rows are held out of the training files."""
        return isinstance(self.validation, int | float)


class StartData(Section):
    """Rows that measure the abilities of the model before its first stage.

    They count as rows of an earlier stage named `start`. Keys are as in `data`, whose `max_length`,
    `truncation` and chat template they share.
    """

    task: Annotated[str | None, Home] = None
    """Path of a task file."""
    train: Annotated[str | list[str] | None, Home] = None
    """File or files with rows that combinations and `data.replay` read."""
    validation: Annotated[str | Count | Annotated[float, Field(gt=0, lt=1)] | None, Home] = None
    """Rows to score, left out of all training: a file, or a share or number of the prompts in
    `start_data.train`."""
    test: Annotated[str | None, Home] = None
    """File with the rows to report on."""
    format: Format = "auto"
    """Format of a row."""
    fields: dict[str, str] = Field(default={})
    """Columns for the fields of the format."""

    @model_validator(mode="after")
    def _check(self) -> StartData:
        refuse_if(
            not (self.train or isinstance(self.validation, str) or self.test),
            "`start_data` must name rows",
            "none" if self.task is None else f"only task: {self.task}",
            "e.g. start_data: {validation: general.jsonl}",
        )
        refuse_if(
            isinstance(self.validation, int | float) and self.train is None,
            "`start_data.validation` as a share or number needs start_data.train",
            f"{self.validation} without it",
            "add start_data.train, or name a file",
        )
        try:
            self.as_data()
        except ValidationError as error:
            (first, *_) = error.errors()
            text = str(first.get("ctx", {}).get("error", first["msg"]))
            raise ValueError(text.replace("data.", "start_data.")) from None
        return self

    def as_data(self, own: DataConfig | None = None) -> DataConfig:
        """Return these rows as a `data` section, with shared keys from the run's section `own`."""
        tree = self.model_dump()
        if self.train is None:
            tree["train"] = ""  # no file
        shared = ("chat_template", "template_arguments", "max_length", "truncation")
        update = {} if own is None else {key: getattr(own, key) for key in shared}
        return DataConfig(**tree).model_copy(update=update)


def check_fields(fields: Iterable[str], kind: str) -> None:
    """Raise ValueError for a field that the format, or with `auto` every format, lacks."""
    kinds = ROW_FIELDS if kind == "auto" else [kind]
    known = dict.fromkeys(field for kind in kinds for field in ROW_FIELDS[kind])
    known |= dict.fromkeys(("chosen", "rejected"))
    refuse_if(
        wrong := [field for field in fields if field not in known],
        f"`data.fields` must name fields of format {kind}: {', '.join(known)}",
        ", ".join(wrong),
        f"write FIELD: NAME IN THE FILE, e.g. {FIELDS_KEY}",
    )
