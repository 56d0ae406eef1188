"""Events of a run: listeners get them, and ``metrics.jsonl`` stores them.

An event can be read as a mapping, ``event["step"]``. A listener must ignore unknown types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, eq=False)
class Event(Mapping[str, Any]):
    """An event; read its attributes, or use it as a mapping."""

    name: ClassVar[str]
    step: int  # optimizer steps done

    def record(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"event": self.name} | values

    def __getitem__(self, key: str) -> Any:
        return self.record()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.record())

    def __len__(self) -> int:
        return len(self.record())


Listener = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class RowsEncoded(Event):
    """Rows of a large split have been tokenised; before `Planned`, not in ``metrics.jsonl``."""

    name = "rows"
    split: str
    rows: int  # so far
    share: float  # of the split's source, in 0…1


@dataclass(frozen=True, eq=False)
class ReferenceScored(Event):
    """Pairs of a split have been scored before the first step; not in ``metrics.jsonl``."""

    name = "reference"
    split: str
    rows: int  # so far
    share: float  # of the split


@dataclass(frozen=True, eq=False)
class KeptRowsRead(Event):
    """Kept rows have been scored, after the last step, or the model has written general rows; not
    in ``metrics.jsonl``."""

    name = "kept"
    rows: int  # so far
    share: float  # of the task, in 0…1
    doing: str = "scoring kept rows"
    what: str = ""  # whose rows, in which state


@dataclass(frozen=True, eq=False)
class LayerSolved(Event):
    """A layer of a combination was solved, or a step made; not in ``metrics.jsonl``."""

    name = "layer"
    parts: str  # names of the combined entries, joined, and the unit: "a + b: layer"
    layer: int  # number of solved layers or finished steps; 0 at the beginning
    layers: int  # in total


@dataclass(frozen=True, eq=False)
class StageBegins(Event):
    """A stage begins, resumes, or was finished before; not in ``metrics.jsonl``."""

    name = "stage"
    stage: str
    state: Literal["finished", "stopped", "new"]
    beside: bool = False  # beside the others: it is combined with them when it has ended


@dataclass(frozen=True, eq=False)
class EntryBuilt(Event):
    """An entry was built: trained, combined or imported; not in ``metrics.jsonl``."""

    name = "built"
    entry: str
    kind: str  # of the entry: stage, combine, import
    seconds: float
    told: str = ""  # of a combination: its rank, and its distances from the parts


@dataclass(frozen=True, eq=False)
class ForgettingHeld(Event):
    """The check of `max_forgetting` passed, or a combination restored general ability; not in
    ``metrics.jsonl``."""

    name = "held"
    told: str  # the scores before and after, as a sentence


@dataclass(frozen=True, eq=False)
class Planned(Event):
    """A run starts or resumes; not in ``metrics.jsonl``."""

    name = "plan"
    num_steps: int
    lengths: list[int]  # steps of each link
    rows: int
    path: str  # how batches run through the model
    threads: int
    notes: list[str]  # which fast paths are used, and why the others are not
    data: Mapping[str, Mapping[str, Any]]  # counts of rows by split (`Splits.report`)
    evaluations: Sequence[int] = ()  # steps, in order, after which the validation rows are scored
    log_every: int | None = None  # `train.log_every`
    estimate: float | None = None  # seconds to the end, at the speed of the stage before
    work_after: float = 0.0  # combining and scoring behind the last step, in tokens of training


@dataclass(frozen=True, eq=False)
class StepDone(Event):
    """The optimizer has made a step."""

    name = "step"
    link: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True, eq=False)
class GradientMeasured(Event):
    """A link's gradient initialization has read some batches."""

    name = "gradient"
    link: int
    tokens: int


@dataclass(frozen=True, eq=False)
class ShareTied(Event):
    """A share of the live link was tied: a soft knot."""

    name = "soft_knot"
    link: int
    share: float


@dataclass(frozen=True, eq=False)
class KnotTied(Event):
    """A link was tied. `function_change` is relative, of the hidden states of two rows."""

    name = "knot"
    link: int
    function_change: float


@dataclass(frozen=True, eq=False)
class Evaluated(Event):
    """The validation rows were scored; each metric is a key of the record."""

    name = "eval"
    link: int
    where: Literal["start", "step", "knot"]
    metrics: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        values = super().record()
        return {k: v for k, v in values.items() if k != "metrics"} | dict(self.metrics)


@dataclass(frozen=True, eq=False)
class Scored(Event):
    """A split was scored at the end; not in ``metrics.jsonl``."""

    name = "scored"
    split: str
    predictions: list[dict[str, Any]]  # one for each row (`Evaluation.predictions`)


@dataclass(frozen=True, eq=False)
class AlreadyFinished(Event):
    """A run to resume was finished before: nothing is computed, and no other event follows."""

    name = "finished"
    run: str  # its directory
