"""The plan of a run, and the recipes of all that is computed from it (decision 43).

A *plan* says which data sets a run has, in which order, what each is trained on, and how they are
put together. It names no result. `root` gives the tree of *recipes* of what the run is:

    base       the model of the run
    general    rows of the origin: given ones, or texts that it writes
    train      a stage, on the base or on what other stages were when it was added
    add        an adapter that was trained elsewhere
    combine    several parts, layer by layer, and the origin by its general rows

Commands edit the plan; `runs.reconcile` computes what is missing. A recipe is known by its key
(`runs.products`), which holds the contents of its parents. So equal keys mean equal bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from chainlora.runs.documents import Count, Digest, Name, Part, short_digest

START = "start"  # the name of the origin among the parts of a combination
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NUMERICS: Mapping[str, int] = {"general": 1, "train": 1, "add": 1, "combine": 1}
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
    """A data set of a run: how its link is trained, or which adapter was added for it.

    `names` are the stages that it was trained on; `how` says how they were put together when it was
    added. Without `names` it stands on the origin, beside the others. `keys` are the keys of its
    config that decide bits; those in `places` do not. Links are drawn by the name `draws`: by
    default the name of the stage, which can change when runs are joined.
    """

    name: Name
    kind: Literal["train", "add"] = "train"
    names: tuple[Name, ...] = ()
    how: How = How()
    draws: Name | None = None
    keys: dict[str, Any] = Field(default={})
    sources: dict[str, list[str]] = Field(default={})  # SHA-256 of its files, by config key
    plugins: dict[str, str] = Field(default={})  # SHA-256 of each
    places: dict[str, Any] = Field(default={})  # never sent to others

    @property
    def identity(self) -> Digest:
        """Return a digest of all but the places."""
        return short_digest(self.model_dump(mode="json", exclude={"places"}, exclude_defaults=True))

    @property
    def own(self) -> dict[str, Any]:
        """Return what decides bits, beside what lies below the stage."""
        own = {"draws": self.draws or self.name, "keys": self.keys, "sources": self.sources}
        return own | {"plugins": sorted(self.plugins.values())}

    @property
    def reads_general(self) -> bool:
        """Say whether general rows are read again while it is trained."""
        return self.keys.get("data.replay") is not None


class Plan(Part):
    """The data sets of a run in their order, which of them it is made of, and how."""

    stages: tuple[Stage, ...] = ()
    off: tuple[Name, ...] = ()
    how: How = How()
    general: dict[str, Any] | None = None  # how rows of the origin are got; None: there are none
    origin: Stage | None = None  # an adapter without rows, on which all stages stand

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

    kind: Literal["base", "general", "train", "add", "combine"]
    own: Mapping[str, Any]  # JSON that decides bits, beside the parents
    parents: tuple[Recipe, ...] = ()
    stage: Stage | None = None  # of `train` and `add`
    place: int = -1  # of the stage in the list: the last of them has the newest answers
    weights: tuple[float | None, ...] = ()  # of the parents of `combine`; None: the default

    @cached_property
    def lineage(self) -> list[Recipe]:
        """Return the recipes of all stages below and of this one, in the order of the list."""
        found = dict.fromkeys(each for parent in self.parents for each in parent.lineage)
        own = [self] if self.stage is not None else []
        return sorted([*found, *own], key=lambda recipe: recipe.place)

    def __iter__(self) -> Iterator[Recipe]:
        """Yield the recipes of the tree, parents first."""
        seen = set[Recipe]()
        for parent in self.parents:
            for recipe in parent:
                if recipe not in seen:
                    seen.add(recipe)
                    yield recipe
        yield self


class Recipes:
    """The recipes of a plan."""

    def __init__(self, plan: Plan, base: Mapping[str, Any]) -> None:
        self.plan, self.base = plan, Recipe("base", base)
        self._stages: dict[str, Recipe] = {}
        self._wholes: dict[str, Recipe] = {}

    @cached_property
    def origin(self) -> Recipe:
        """The base, or an adapter without rows on it."""
        stage = self.plan.origin
        return self.base if stage is None else Recipe("add", stage.own, (self.base,), stage)

    @cached_property
    def general(self) -> Recipe | None:
        """The rows of the origin, None if the run keeps none."""
        own = self.plan.general
        return None if own is None else Recipe("general", own, (self.origin,))

    @cached_property
    def root(self) -> Recipe:
        """What the run is."""
        return self.whole(self.plan.active, self.plan.how)

    @property
    def wanted(self) -> list[Recipe]:
        """Return the recipes without which a run is not complete, in the order of the work."""
        return [*([] if self.general is None else [self.general]), self.root]

    def whole(self, names: Iterable[str], how: How) -> Recipe:
        """Return what a run is that is made of these stages."""
        parts = self.plan.parts({*names})
        if not parts:
            return self.origin
        if len(parts) == 1 and not how.always:
            return self.state(parts[0])
        known = short_digest([parts, how.model_dump(mode="json")])
        if known not in self._wholes:
            self._wholes[known] = self._combination(parts, how)
        return self._wholes[known]

    def state(self, name: str) -> Recipe:
        """Return a stage on what lies below it."""
        if name not in self._stages:
            stage = self.plan.find(name)
            assert stage is not None
            below = self.whole(stage.names, stage.how) if stage.names else self.origin
            read = [self.general] if stage.reads_general and self.general is not None else []
            place = self.plan.names.index(name)
            recipe = Recipe(stage.kind, stage.own, (below, *read), stage, place)
            self._stages[name] = recipe
        return self._stages[name]

    def _combination(self, parts: Sequence[str], how: How) -> Recipe:
        general = [self.general] if how.general and self.general is not None else []
        own = how.model_dump(mode="json", include={"rank", "keep_conflicts", "steps"})
        weights = [how.importance.get(name) for name in (*parts, *[START] * len(general))]
        parents = (*map(self.state, parts), *general)
        return Recipe("combine", own, parents, weights=tuple(weights))
