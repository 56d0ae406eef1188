"""What a line of results must hold for reports to read it: names, numbers and shapes, all checked.

Only what code relies on is listed; other keys pass, so that later versions may add some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Name = Annotated[str, Field(max_length=200, pattern=r"^[^\n]*$")]
Pair = Annotated[list[Name], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0)]
Metrics = dict[str, float]


class Line(BaseModel):
    """The keys that reports rely on."""

    model_config = ConfigDict(extra="allow", strict=True)


class ExperimentLine(Line):
    """The first line."""

    name: Name
    description: str
    model: Name | None
    tasks: list[Name] = Field(min_length=1)
    methods: dict[str, str] = Field(min_length=1)
    pairs: list[Pair]
    primary: Pair | None = None
    seeds: list[int] = Field(min_length=1)
    seed_keys: list[Name] = ["train.seed"]
    tuning_seeds: list[int]
    figures: list[Name]
    paper: Name | None

    @model_validator(mode="after")
    def _check(self) -> ExperimentLine:
        named = [name for pair in self.pairs for name in pair]
        unknown = [name for name in named if name not in self.methods]
        if unknown:
            raise ValueError(f"`pairs` must name `methods` (got {unknown[0]!r})")
        if self.primary is not None and self.primary not in self.pairs:
            raise ValueError(f"`primary` must be one of `pairs` (got {self.primary})")
        for key in ("tasks", "seeds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"`{key}` must differ from each other")
        return self


class Tried(Line):
    """A point of a grid and what it scored."""

    point: dict[str, Any]
    mean: float | None
    runs: Count
    values: list[float | None] | None = None


class ChoiceLine(Line):
    """A choice."""

    task: Name
    method: Name
    metric: Name
    chosen: dict[str, Any] | None
    tried: list[Tried] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ChoiceLine:
        points = [each.point for each in self.tried]
        if any(point.keys() != points[0].keys() for point in points):
            raise ValueError("`tried` must have points of the same keys")
        if self.chosen is not None and self.chosen not in points:
            raise ValueError(f"`chosen` must be one of `tried` (got {self.chosen})")
        return self


class CellConfig(Line):
    """A cell's config."""

    model: Name | None = None
    data: dict[str, Any] = {}
    chain: dict[str, Any] = {}
    train: dict[str, Any] = {}


class CellLine(Line):
    """A cell that diverged, or what is common to all."""

    cell: str = Field(pattern=r"^[0-9a-f]{12}$")
    phase: Literal["tune", "final"]
    task: Name
    method: Name
    seed: int
    point: dict[str, Any]
    status: Literal["done", "diverged"]
    metric: Name
    ranks: list[Annotated[int, Field(ge=1)]]
    config: CellConfig
    rows_digest: Name | None = None
    base_fingerprint: Name | None = None
    base_file: Name | None = None
    commit: Name | None = None


class CurvePoint(Line):
    """A point of a curve."""

    step: Count
    loss: float | None = None


class DoneLine(CellLine):
    """A cell that trained to its end."""

    score_split: Literal["validation", "test"]
    score: FiniteFloat
    validation: Metrics | None
    test: Metrics | None
    majority: float | None
    train_loss: float | None
    steps: Count
    tokens: Count
    trainable_parameters: Count
    wall_s: FiniteFloat
    peak_rss_mb: FiniteFloat | None
    link_steps: list[Count] = []
    curve: list[CurvePoint] = []
    versions: dict[str, str]
    hardware: dict[str, Any]


def model_of(line: dict[str, Any]) -> type[Line] | None:
    """Return what a line must be, by its kind and status; None for a kind that is not known."""
    models: dict[str, type[Line]] = {
        "experiment": ExperimentLine,
        "choice": ChoiceLine,
        "cell": DoneLine if line.get("status") == "done" else CellLine,
    }
    return models.get(str(line.get("kind")))
