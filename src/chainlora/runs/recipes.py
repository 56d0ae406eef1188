"""The plan of a run, and the recipes of all that is computed from it (decision 43).

A *plan* says which data sets a run has, in which order, what each is trained on, and how they are
put together. It names no result. `root` gives the tree of *recipes* of what the run is:

    base       the model of the run
    start      its general rows: given ones, or texts that it writes
    stage      links that are trained on the base, or on what other stages were when it was added
    import     an adapter that was trained elsewhere
    combine    several parts, layer by layer, and the base by its general rows

Commands edit the plan; `training.reconcile` computes what is missing. A recipe is known by its
key (`runs.history.Made`), which holds the contents of its parents. So equal keys mean equal bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from chainlora.config.schema import ChainConfig, DataConfig, TrainConfig
from chainlora.config.section import Section
from chainlora.runs.documents import Count, Digest, Name, Part, short_digest

START = "start"  # the entry of rows of the base, a part of combinations
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NUMERICS = {"start": 1, "stage": 1, "import": 1, "combine": 1}
"""A part of each key: raised when the same recipe comes to other bits."""


class How(Part):
    """How stages are put together: the settings of their combination.

    `rank` is by default the sum of the ranks of all links of the parts, at least 16. `importance`
    weights the rows of a part, by its name. With `general`, the origin is a part too. With
    `keep_conflicts`, rows are used even if a later stage answers their prompt otherwise. The link
    is then trained for `steps`. A single part is combined, with the origin, only with `always`.
    """

    rank: Annotated[int, Field(gt=0)] | None = None
    importance: dict[Name, Positive] = Field(default={})
    general: bool = True
    keep_conflicts: bool = False
    steps: Count = 0
    always: bool = False


class Stage(Part):
    """A data set of a run: how its links are trained, or which adapter was added for it.

    `names` are the stages that it was trained on; `how` says how they were put together when it was
    added. Without `names` it stands on the base, beside the others. `sources` are digests of all
    files that it reads. Links are drawn by the name `draws`: by default the name of the stage,
    which can change when runs are joined.
    """

    name: Name
    kind: Literal["stage", "import"] = "stage"
    names: tuple[Name, ...] = ()
    how: How = How()
    draws: Name | None = None
    config: dict[str, Any] = Field(default={})
    sources: dict[str, list[str]] = Field(default={})  # by config key
    plugins: dict[str, str] = Field(default={})  # SHA-256 of each
    default_length: bool = False  # its epochs come from the number of its rows

    @property
    def own(self) -> dict[str, Any]:
        """Return what decides bits, beside what lies below the stage."""
        return {
            "draws": self.draws or self.name,
            "config": bits_of(self.config),
            "sources": self.sources,
            "plugins": sorted(self.plugins.values()),
        }

    @property
    def identity(self) -> Digest:
        """Return a digest of all but the places in its config."""
        below = {"names": self.names, "how": self.how.model_dump(mode="json")}
        return short_digest([self.name, self.kind, below, self.own])

    def renamed(self, names: Mapping[str, str]) -> Stage:
        """Return the stage with new names of stages; `names` maps old ones to new ones."""
        importance = {names.get(name, name): x for name, x in self.how.importance.items()}
        update = {
            "name": names.get(self.name, self.name),
            "names": tuple(names.get(name, name) for name in self.names),
            "how": self.how.model_copy(update={"importance": importance}),
            "draws": self.draws or self.name,
        }
        return self.model_copy(update=update)


_SECTIONS: Mapping[str, type[Section]] = {
    "data": DataConfig,
    "chain": ChainConfig,
    "train": TrainConfig,
}
_NO_BITS = {"train.trackers", "train.save_every", "train.log_every", "train.shard"}
_FILES = ("data.task", "data.validation", "data.test")  # their contents are in `Stage.sources`


@cache
def _defaults(part: str) -> dict[str, Any]:
    return _SECTIONS[part].model_construct().model_dump(mode="json")


def bits_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a stored config that decide bits, but those at their defaults.

    Left out are places: files are known by the digests of their contents. So a key that is added
    later changes no digest.
    """
    bits: dict[str, Any] = {}
    for part in _SECTIONS:
        for key, value in (config.get(part) or {}).items():
            if f"{part}.{key}" not in _NO_BITS and value != _defaults(part).get(key):
                bits[f"{part}.{key}"] = value
    for key in _FILES:
        if isinstance(bits.get(key), str):
            bits[key] = "a file"
    files = bits.pop("data.train", None)
    if isinstance(files, list):
        bits["data.train"] = [file.get("weight", 1.0) for file in files]
    return bits


class Plan(Part):
    """The data sets of a run in their order, which of them it is made of, and how."""

    stages: tuple[Stage, ...] = ()
    off: tuple[Name, ...] = ()
    how: How = How()

    def find(self, name: str) -> Stage | None:
        """Return the stage of a name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def names(self) -> tuple[Name, ...]:
        return tuple(stage.name for stage in self.stages)

    @property
    def active(self) -> tuple[Name, ...]:
        """Return the names of the stages that the run is made of."""
        return tuple(name for name in self.names if name not in self.off)

    def below(self, name: str) -> set[str]:
        """Return the names of a stage and of all that it stands on."""
        stage = self.find(name)
        others = () if stage is None else stage.names
        return {name}.union(*(self.below(other) for other in others))

    def parts(self, names: Collection[str]) -> list[str]:
        """Return the names in the order of the list, but none on which others of them stand."""
        below = {other for name in names for other in self.below(name) - {name}}
        return [name for name in self.names if name in names and name not in below]

    # --- edits ---

    def with_stage(self, stage: Stage) -> Plan:
        """Return the plan with one more stage."""
        return self.model_copy(update={"stages": (*self.stages, stage)})

    def with_changed(self, stages: Iterable[Stage]) -> Plan:
        """Return the plan with other stages, each in the place of the one of its name."""
        new = {stage.name: stage for stage in stages}
        stages = tuple(new.get(own.name, own) for own in self.stages)
        return self.model_copy(update={"stages": stages})

    def combined(self, names: Collection[str], how: How) -> Plan:
        """Return the plan of a run that is made of some stages and those below them."""
        needed = {below for name in names for below in self.below(name)}
        off = tuple(name for name in self.names if name not in needed)
        return self.model_copy(update={"off": off, "how": how})

    def standing_on(self, names: Collection[str]) -> list[str]:
        """Return these names and those of all stages that stand on them."""
        return [name for name in self.names if self.below(name) & {*names}]

    def without(self, names: Collection[str]) -> Plan:
        """Return the plan without some stages, and without all that stand on them."""
        gone = self.standing_on(names)
        importance = {name: x for name, x in self.how.importance.items() if name not in gone}
        update = {
            "stages": tuple(stage for stage in self.stages if stage.name not in gone),
            "off": tuple(name for name in self.off if name not in gone),
            "how": self.how.model_copy(update={"importance": importance}),
        }
        return self.model_copy(update=update)


# --- recipes ---


@dataclass(frozen=True, eq=False)  # a tree: a recipe that several need is one object
class Recipe:
    """What is computed by one kind of work from its parents."""

    kind: Literal["base", "start", "stage", "import", "combine"]
    own: Mapping[str, Any]  # JSON that decides bits, beside the parents
    parents: tuple[Recipe, ...] = ()
    stage: Stage | None = None
    place: int = -1  # of the stage in the list: the last of them has the newest answers
    how: How | None = None  # of a combination
    weights: tuple[float | None, ...] = ()  # of its parents; None: the default

    @cached_property
    def lineage(self) -> list[Recipe]:
        """Return the recipes of all stages below and of this one, in the order of the list."""
        found = dict.fromkeys(each for parent in self.parents for each in parent.lineage)
        own = [self] if self.stage is not None else []
        return sorted([*found, *own], key=lambda recipe: recipe.place)


class Recipes:
    """The recipes of a plan. `base` decides the bits of the base, `general` those of its rows."""

    def __init__(
        self, plan: Plan, base: Mapping[str, Any], general: Mapping[str, Any] | None
    ) -> None:
        self.plan, self.base = plan, Recipe("base", base)
        self.start = None if general is None else Recipe("start", general, (self.base,))
        self._stages: dict[str, Recipe] = {}
        self._wholes: dict[str, Recipe] = {}

    @cached_property
    def root(self) -> Recipe:
        """What the run is."""
        return self.whole(self.plan.active, self.plan.how)

    @property
    def wanted(self) -> list[Recipe]:
        """Return the recipes without which a run is not complete, in the order of the work."""
        start = [self.start] if self.start is not None and self.plan.stages else []
        return [*start, self.root]

    def whole(self, names: Iterable[str], how: How) -> Recipe:
        """Return what a run is that is made of these stages."""
        parts = self.plan.parts({*names})
        if not parts:
            return self.base
        if len(parts) == 1 and not (how.always and how.general and self.start is not None):
            return self.state(parts[0])
        known = short_digest([parts, how.model_dump(mode="json")])
        if known not in self._wholes:
            start = [self.start] if how.general and self.start is not None else []
            own = how.model_dump(mode="json", include={"rank", "keep_conflicts", "steps"})
            weights = tuple(how.importance.get(name) for name in (*parts, *[START] * len(start)))
            parents = (*map(self.state, parts), *start)
            self._wholes[known] = Recipe("combine", own, parents, how=how, weights=weights)
        return self._wholes[known]

    def state(self, name: str) -> Recipe:
        """Return a stage on what lies below it."""
        if name not in self._stages:
            stage = self.plan.find(name)
            assert stage is not None
            reads_general = bits_of(stage.config).get("data.replay") is not None
            read = [self.start] if reads_general and self.start is not None else []
            parents = (self.whole(stage.names, stage.how), *read)
            place = self.plan.names.index(name)
            self._stages[name] = Recipe(stage.kind, stage.own, parents, stage, place)
        return self._stages[name]
