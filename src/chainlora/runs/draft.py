"""``stages/NAME/stage.json``: the progress of a stage in training, and where it resumes.

Only code that resumes or shows a stage reads this file. The stage itself is in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from chainlora.runs.documents import Count, Digest, Document, Part, Sums, read_part
from chainlora.runs.entries import CONFIG, Due, Entry, LinkFacts, Training
from chainlora.runs.history import History
from chainlora.runs.paths import stage_folder

DRAFT = "stage.json"
REFERENCE = "reference.safetensors"
GROWING = ("checkpoints", "moments", "best")  # folders whose entries ``stage.json`` names
PASSING = (DRAFT, *GROWING, REFERENCE)  # deleted when the stage has ended


class Best(TypedDict):
    """The best point of a stage so far."""

    step: Count
    num_links: Count  # whole links of the stage
    partial: bool  # it lies inside the next link
    metric: str
    value: float
    directory: NotRequired[Annotated[str, Field(pattern=r"^best/\d{8,}$")]]  # of the partial link
    error: NotRequired[Annotated[float, Field(ge=0)]]  # of the partial link, as `Link.error`


@dataclass
class Progress:
    """The progress of a stage, and the memory of its loop; a resume restores both."""

    step: Count = 0  # steps done
    link: Count = 0  # links tied, of the stage
    tokens: Count = 0
    scored_tokens: Count = 0
    seconds: float = 0.0
    num_records: Count = 0
    best: Best | None = None
    evaluations_without_gain: Count = 0
    stopped: bool = False
    soft_knots: Count = 0  # in the live link so far
    memory: dict[str, float] = field(default_factory=dict)  # of the knot policy (`Position`)
    evaluation_due: bool = False  # a signal stopped the evaluation here; the resume evaluates


class Checkpoint(Part):
    """A point inside a link."""

    directory: Annotated[str, Field(pattern=r"^checkpoints/\d{8,}$")]
    progress: Progress


class Records(Part):
    """The first `count` lines of ``metrics.jsonl``, and the SHA-256 of their bytes."""

    count: Count
    sha256: str


class Draft(Document):
    """The content of ``stage.json``."""

    model_config = ConfigDict(allow_inf_nan=True)

    digest: Digest = "0" * 16  # and the next two: of the future entry
    training: Training = Training()
    kept: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    tied: tuple[Digest, ...] = ()  # links so far
    links: dict[Digest, LinkFacts] = Field(default_factory=dict)
    progress: Progress = Progress()  # at the last knot
    moments: Annotated[str, Field(pattern=r"^moments/\d{3,}\.safetensors$")] | None = None
    checkpoint: Checkpoint | None = None  # a later point, inside a link
    records: Records
    files: Sums = Field(default_factory=dict)  # that a resume needs

    def entry(self, due: Due, links: Sequence[str], **fields: Any) -> Entry:
        """Return the entry of a stage that ends in these links."""
        state = due.below.model_copy(update={"links": (*due.below.links, *links)})
        known = {"tied": self.tied, "kept": self.kept, "training": self.training}
        return due.entry(state, **known | fields)

    @property
    def position(self) -> Progress:
        """Return the progress at which the stage resumes."""
        return self.progress if self.checkpoint is None else self.checkpoint.progress

    def has_checkpoint(self, progress: Progress) -> bool:
        """Say whether the checkpoint has exactly this step and link."""
        point = self.position
        is_here = (point.step, point.link) == (progress.step, progress.link)
        return is_here and self.checkpoint is not None

    def with_training(self, **changed: Any) -> Draft:
        """Return a copy with changed fields of `Training`."""
        training = self.training.model_copy(update=changed)
        return self.model_copy(update={"training": training})

    @property
    def named(self) -> set[str]:
        """Return the names of the files and folders that a resume needs, in the stage's folder."""
        bests = [point.best for point in (self.progress, self.position)]
        named = [best.get("directory") for best in bests if best is not None]
        named += [self.moments, None if self.checkpoint is None else self.checkpoint.directory]
        return {CONFIG, REFERENCE, *(name for name in named if name is not None)}


def read_draft(folder: Path) -> Draft:
    """Read the ``stage.json`` of a stage's folder. Raises RunError for a damaged one."""
    return read_part(folder / DRAFT, Draft)


def drafts_in(run: Path, history: History) -> dict[str, Path]:
    """Return the folders of stages in training, by name."""
    unbuilt = map(history.due_stage, history.plan().names)
    folders = {due.key: stage_folder(run, due.place) for due in unbuilt if due is not None}
    return {name: folder for name, folder in folders.items() if (folder / DRAFT).is_file()}


def ended_leftovers(run: Path, history: History) -> Iterator[Path]:
    """Yield training files of finished stages that a kill has left."""
    for entry in history.entries:
        folder = stage_folder(run, entry.place)
        yield from (folder / name for name in PASSING if (folder / name).exists())
