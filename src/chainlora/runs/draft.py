"""``stages/NAME/stage.json``: how far a stage is that is trained, and where it resumes.

The history declares what the stage is. Only code that resumes or shows a stage reads this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from chainlora.runs.documents import Count, Digest, Document, Part, Sums, read_part
from chainlora.runs.history import (
    CONFIG,
    Entry,
    History,
    LinkFacts,
    Term,
    Training,
    Unbuilt,
)
from chainlora.runs.paths import stage_folder

DRAFT = "stage.json"
REFERENCE = "reference.safetensors"
GROWING = ("checkpoints", "moments", "best")  # folders whose entries ``stage.json`` names
PASSING = (DRAFT, *GROWING, REFERENCE)  # what of a stage goes when it has ended


class Best(TypedDict):
    """The best point of a stage so far. `directory` holds its partial link, if it has one."""

    step: Count
    num_links: Count  # of the stage
    partial: bool
    metric: str
    value: float
    directory: NotRequired[Annotated[str, Field(pattern=r"^best/\d{8,}$")]]
    error: NotRequired[Annotated[float, Field(ge=0)]]  # of that link, as `Link.error`


@dataclass
class Progress:
    """Where a stage is, and what its trainer remembers: all that a resume must know again."""

    step: Count = 0
    link: Count = 0  # of the stage
    tokens: Count = 0
    scored_tokens: Count = 0
    seconds: float = 0.0
    num_records: Count = 0
    best: Best | None = None
    evaluations_without_gain: Count = 0
    stopped: bool = False
    soft_knots: Count = 0  # in the live link so far
    memory: dict[str, float] = field(default_factory=dict)  # of the knot policy (`Position`)
    evaluation_due: bool = False  # a signal stopped the evaluation here: it is made on resume


class Checkpoint(Part):
    """A point inside a link."""

    directory: Annotated[str, Field(pattern=r"^checkpoints/\d{8,}$")]
    progress: Progress


class Records(Part):
    """The first `count` lines of ``metrics.jsonl``, by the hash of their bytes."""

    count: Count
    sha256: str


class Draft(Document):
    """All that ``stage.json`` says.

    `training` and `kept` are what the entry gets, `tied` are the links so far, `links` their facts.
    `progress` is that of the last knot; `checkpoint` is a later point, inside a link. `files` are
    hashes of what a resume needs.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    training: Training = Training()
    kept: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    tied: tuple[Digest, ...] = ()
    links: dict[Digest, LinkFacts] = Field(default_factory=dict)
    progress: Progress = Progress()
    moments: Annotated[str, Field(pattern=r"^moments/\d{3,}\.safetensors$")] | None = None
    checkpoint: Checkpoint | None = None
    records: Records
    files: Sums = Field(default_factory=dict)

    @property
    def has_learned(self) -> bool:
        """Say whether a resume would go on from a link or a checkpoint."""
        return bool(self.tied) or self.checkpoint is not None

    def entry(self, declared: Unbuilt, history: History, own: Sequence[str], **more: Any) -> Entry:
        """Return the entry of a declared stage that ends in these links; it has read the rows that
        entries below it kept: what they held out is left out of its own rows."""
        below = history.state_of(declared.parent)
        terms = (*below.terms, *(Term(link=digest) for digest in own))
        return declared.built(
            below.model_copy(update={"terms": terms}),
            reads=tuple(history.keepers([declared.parent])),
            tied=self.tied,
            kept=self.kept,
            training=self.training,
            **more,
        )

    @property
    def position(self) -> Progress:
        """Return where the stage resumes."""
        return self.progress if self.checkpoint is None else self.checkpoint.progress

    def has_checkpoint(self, progress: Progress) -> bool:
        """Say whether there is a checkpoint of exactly this progress."""
        if self.checkpoint is None:
            return False
        found = self.checkpoint.progress
        return (found.step, found.link) == (progress.step, progress.link)

    def with_training(self, **changed: Any) -> Draft:
        """Return this with other facts of `Training`."""
        training = self.training.model_copy(update=changed)
        return self.model_copy(update={"training": training})

    @property
    def named(self) -> set[str]:
        """Return the files and folders that the stage needs, by their names in its folder."""
        named = {CONFIG, REFERENCE}
        points = [self.progress]
        if self.checkpoint is not None:
            named.add(self.checkpoint.directory)
            points.append(self.checkpoint.progress)
        if self.moments is not None:
            named.add(self.moments)
        for point in points:
            if point.best is not None and "directory" in point.best:
                named.add(point.best["directory"])
        return named


def read_draft(run: Path, stage: str) -> Draft:
    return read_part(stage_folder(run, stage) / DRAFT, Draft)


def drafts_in(run: Path, history: History) -> dict[str, Path]:
    """Return the folders of the stages that were begun and have not ended, by their names."""
    folders = {entry.key: stage_folder(run, entry.key) for entry in history.unbuilt}
    return {key: folder for key, folder in folders.items() if (folder / DRAFT).is_file()}


def ended_leftovers(run: Path, history: History) -> Iterator[Path]:
    """Yield what a kill left of the training of stages that have ended."""
    for entry in history.entries:
        folder = stage_folder(run, entry.key)
        yield from (folder / name for name in PASSING if (folder / name).exists())
