"""``history.json``: the versions of a run's plan, and the products that were computed for them.

    RUN/history.json                this file; it is replaced as a whole
    RUN/links/DIGEST/               a link: an ordinary PEFT adapter, stored once
    RUN/rows/DIGEST.safetensors     kept rows of a stage, or of the origin
    RUN/stages/NAME-KEY/            config, records and result of a stage; in training, its
                                    checkpoint

A *version* is a plan (`runs.recipes`), and the command that made it out of the version `before`.
A *product* is a state with its rows and files. Its key is the digest of its recipe with the
contents of its parents: their states, and the SHA-256 of the rows that they kept. A plan names no
product, so it can change without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chainlora import files
from chainlora.errors import FileError
from chainlora.runs.documents import (
    Digest,
    Document,
    Name,
    Part,
    Sums,
    need_file,
    now,
    read_part,
    short_digest,
    write_part,
)
from chainlora.runs.history import (
    CONTENT,
    Base,
    LinkFacts,
    State,
    Training,
    link_folder,
    rows_file,
)
from chainlora.runs.paths import HISTORY
from chainlora.runs.recipes import NUMERICS, How, Plan, Recipe, Recipes, Stage

Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Version(Part):
    """A plan as it is stored, each stage by its identity, and how it came about.

    `marks` are stages to erase, with all that was computed from them, once the plan is built.
    """

    stages: tuple[Digest, ...] = ()
    off: tuple[Name, ...] = ()
    how: How = How()
    general: dict[str, Any] | None = None
    origin: Digest | None = None
    before: int = -1  # the place of the version that it was made from
    command: str = ""
    time: str = ""
    marks: tuple[Digest, ...] = ()
    is_built: bool = False  # it was complete once; a combination may have been dropped since


class Product(Part):
    """What was computed by a recipe; `parents` are the keys of what it was computed from."""

    kind: Literal["general", "train", "add", "combine"]
    name: Name
    identity: Digest | None = None  # of the stage
    parents: tuple[Digest, ...] = ()
    state: State
    tied: tuple[Digest, ...] = ()  # all links of a stage; its state may end at an earlier point
    kept: Sha | None = None  # SHA-256 of its kept rows
    files: Sums = Field(default={})  # in its folder
    training: Training = Training()
    distances: dict[Name, float] = Field(default={})  # of a combination, from each part
    ended: str = ""


class Versions(Document):
    """The versions and products of a run. Methods return changed copies."""

    base: Base
    tokenizer: Sums = Field(default={})
    links: dict[Digest, LinkFacts] = Field(default={})
    stages: dict[Digest, Stage] = Field(default={})
    versions: tuple[Version, ...] = (Version(is_built=True),)
    at: int = 0
    products: dict[Digest, Product] = Field(default={})  # by key
    unsent: tuple[Sha, ...] = ()  # kept rows that this copy of the run has not got

    @model_validator(mode="after")
    def _checked(self) -> Versions:
        known = [version.before < place for place, version in enumerate(self.versions)]
        used = {link for p in self.products.values() for link in (*p.state.links, *p.tied)}
        stages = {identity for version in self.versions for identity in version.stages}
        parents = {key for product in self.products.values() for key in product.parents}
        lost = (used - self.links.keys()) | (stages - self.stages.keys())
        lost |= parents - self.products.keys()
        if lost:
            raise ValueError(f"{min(lost)} must be there")
        if not all(known) or not 0 <= self.at < len(known):
            raise ValueError("a version must be made from an earlier one")
        return self

    # --- versions ---

    def plan(self, at: int | None = None) -> Plan:
        """Return the plan of a version, by default of the current one."""
        version = self.versions[self.at if at is None else at]
        stages = tuple(self.stages[identity] for identity in version.stages)
        origin = None if version.origin is None else self.stages[version.origin]
        keys: Any = {"off": version.off, "how": version.how, "general": version.general}
        return Plan(stages=stages, origin=origin, **keys)

    def recipes(self, at: int | None = None) -> Recipes:
        """Return the recipes of a version."""
        base = {"files": self.base.files, "tokenizer": self.tokenizer}
        base |= {"dtype": self.base.dtype, "quantize": self.base.quantize}
        return Recipes(self.plan(at), base)

    def edited(self, plan: Plan, command: str, marks: Collection[Digest] = ()) -> Versions:
        """Return the history with one more version, or as it is if the plan is the current one."""
        if plan == self.plan():
            return self
        named = [*plan.stages, *([] if plan.origin is None else [plan.origin])]
        origin = None if plan.origin is None else plan.origin.identity
        stages = tuple(stage.identity for stage in plan.stages)
        keys: Any = {"off": plan.off, "how": plan.how, "general": plan.general, "origin": origin}
        keys |= {"before": self.at, "command": command, "time": now(), "marks": tuple(marks)}
        update = {
            "stages": self.stages | {stage.identity: stage for stage in named},
            "versions": (*self.versions, Version(stages=stages, **keys)),
            "at": len(self.versions),
        }
        return self.model_copy(update=update)

    def ancestors(self, at: int | None = None) -> Iterator[int]:
        """Yield the place of a version and of all that it was made from, the newest first."""
        place = self.at if at is None else at
        while place >= 0:
            yield place
            place = self.versions[place].before

    def moved(self, at: int) -> Versions:
        """Return the history at another version."""
        return self.model_copy(update={"at": at})

    def dropped(self) -> Versions:
        """Return the history without its last version, at the one before."""
        *versions, last = self.versions
        assert self.at == len(versions)
        return self.model_copy(update={"versions": tuple(versions), "at": last.before})._tidied()

    # --- products ---

    def with_product(
        self, key: Digest, product: Product, links: Mapping[Digest, LinkFacts]
    ) -> Versions:
        """Return the history with one more product."""
        update = {"products": self.products | {key: product}, "links": {**self.links, **links}}
        return self.model_copy(update=update)

    def without_products(self, keys: Collection[Digest]) -> Versions:
        """Return the history without some products, all computed from them, and their links."""
        gone = {*keys}
        while more := {k for k, p in self.products.items() if gone & {*p.parents}} - gone:
            gone |= more
        left = {key: product for key, product in self.products.items() if key not in gone}
        return self.model_copy(update={"products": left})._tidied()

    def _tidied(self) -> Versions:
        """Return the history without links and stages that nothing names."""
        used = {link for p in self.products.values() for link in (*p.state.links, *p.tied)}
        named = {identity for v in self.versions for identity in (*v.stages, v.origin)}
        update = {
            "links": {link: facts for link, facts in self.links.items() if link in used},
            "stages": {key: stage for key, stage in self.stages.items() if key in named},
        }
        return self.model_copy(update=update)

    def erased(self, stages: Collection[Digest]) -> Versions:
        """Return the history as if some stages, by identity, had never been there.

        All that stands on them goes too. Versions that become equal are one, and a command that
        names such a stage is cut to its verb.
        """
        names = {self.stages[identity].name for identity in stages}
        versions, places = list[Version](), dict[int, int]()
        for place, version in enumerate(self.versions):
            plan = self.plan(place)
            marked = [stage.name for stage in plan.stages if stage.identity in stages]
            before = places.get(version.before, -1)
            new = _stored(plan.without(marked), version, before, names)
            if before >= 0 and _is_same_plan(new, versions[before]):
                places[place] = before
            else:
                places[place] = len(versions)
                versions.append(new)
        gone = [key for key, product in self.products.items() if product.identity in stages]
        standing = {stage for stage in self.stages if stage not in _stages_of(versions)}
        gone += [key for key, product in self.products.items() if product.identity in standing]
        update = {"versions": tuple(versions), "at": places[self.at]}
        return self.model_copy(update=update).without_products(gone)

    @property
    def files(self) -> dict[str, str]:
        """Return all files that the history names, each with its SHA-256 or its first digits."""
        named = {f"tokenizer/{name}": digest for name, digest in self.tokenizer.items()}
        for link, facts in self.links.items():
            named |= {f"{link_folder(link)}/{name}": d for name, d in facts.files.items()}
        for key, product in self.products.items():
            folder = folder_of(product.name, key)
            named |= {f"{folder}/{name}": digest for name, digest in product.files.items()}
            if product.kept is not None and product.kept not in self.unsent:
                named[rows_file(product.kept)] = product.kept
        return named


def folder_of(name: str, key: Digest) -> str:
    """Return the folder of a product in a run."""
    return f"stages/{name}-{key[:8]}"


def _stored(plan: Plan, version: Version, before: int, erased: Collection[str]) -> Version:
    """Return a version with another plan; its command is cut if it has an erased name."""
    command = version.command
    if any(name in command for name in erased):
        command = command.partition(" ")[0]
    update = {
        "stages": tuple(stage.identity for stage in plan.stages),
        "off": plan.off,
        "how": plan.how,
        "before": before,
        "command": command,
        "marks": (),
    }
    return version.model_copy(update=update)


def _is_same_plan(one: Version, other: Version) -> bool:
    keys = ("stages", "off", "how", "general", "origin")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _stages_of(versions: Collection[Version]) -> set[Digest]:
    return {identity for version in versions for identity in version.stages}


# --- keys ---


class Made:
    """The keys and products of recipes in a history."""

    def __init__(self, history: Versions) -> None:
        self.history = history
        self._keys: dict[Recipe, Digest | None] = {}

    def key(self, recipe: Recipe) -> Digest | None:
        """Return the key of a recipe; None before all its parents are made."""
        if recipe not in self._keys:
            contents = [self._content(parent) for parent in recipe.parents]
            is_open = any(content is None for content in contents)
            self._keys[recipe] = None if is_open else self._digest(recipe, contents)
        return self._keys[recipe]

    def product(self, recipe: Recipe) -> Product | None:
        """Return the product of a recipe, None if it is not made, and for the base."""
        key = None if recipe.kind == "base" else self.key(recipe)
        return None if key is None else self.history.products.get(key)

    def is_made(self, recipe: Recipe) -> bool:
        """Say whether a recipe has its product; the base is always there."""
        return recipe.kind == "base" or self.product(recipe) is not None

    def due(self, recipes: Collection[Recipe]) -> Recipe | None:
        """Return the first recipe, parents first, that is needed for some others and not made."""
        return next((r for of in recipes for r in self._unmade(of)), None)

    def _unmade(self, recipe: Recipe) -> Iterator[Recipe]:
        if not self.is_made(recipe):  # else nothing below it is needed
            for parent in recipe.parents:
                yield from self._unmade(parent)
            yield recipe

    def _content(self, recipe: Recipe) -> Any:
        """Return what a recipe has come to: its state, and the kept rows of its stages."""
        if recipe.kind == "base":
            return short_digest(dict(recipe.own))
        product = self.product(recipe)
        if product is None:
            return None
        rows = [self.product(stage) for stage in recipe.lineage]
        kept = [None if each is None else each.kept for each in rows]
        return [product.state.digest, kept if recipe.kind != "general" else product.kept]

    def _digest(self, recipe: Recipe, contents: list[Any]) -> Digest:
        inside: Any = [recipe.kind, NUMERICS.get(recipe.kind), dict(recipe.own), contents]
        if recipe.kind == "combine":
            # the order of parts is that of their states; that of the rows says which is newest
            pairs = sorted(zip(contents, recipe.weights, strict=True), key=repr)
            rows = [self.product(stage) for stage in recipe.lineage]
            order = [None if each is None else each.kept for each in rows]
            inside = [*inside[:3], pairs, None if recipe.own["keep_conflicts"] else order]
        return short_digest(inside)


# --- files ---


def read_versions(run: Path) -> Versions:
    """Read and check ``history.json``. Raises RunError for a missing or damaged one."""
    return read_part(run / HISTORY, Versions)


def write_versions(run: Path, history: Versions) -> None:
    """Replace ``history.json``. The caller holds the lock of the run."""
    files.remove_scratch(run, HISTORY)
    write_part(run / HISTORY, history)


def unnamed(run: Path, history: Versions, spared: Collection[str] = ()) -> Iterator[Path]:
    """Yield links, rows and folders of stages that a history does not name, but for `spared`."""
    named = {"/".join(name.split("/")[:2]) for name in history.files} | {*spared}
    named |= {folder_of(product.name, key) for key, product in history.products.items()}
    for folder in (*CONTENT, "stages"):
        for path in sorted((run / folder).glob("*")):
            if f"{folder}/{path.name}" not in named:
                yield path


def delete(paths: Collection[Path]) -> None:
    """Delete files and folders durably. Raises FileError for one that stays."""
    for path in paths:
        files.remove(path)
        if path.exists():
            remedy = "check its permissions and the free space, and repeat the command"
            raise FileError("a file must be deleted", path, remedy)
        with files.reported(path.parent, "deleted"):
            files.remove_scratch(path.parent)
            files.sync_folder(path.parent)


def copy_products(source: Path, target: Path, history: Versions) -> list[str]:
    """Copy the files that a history names into another run, each checked; return their names."""
    copied = []
    for name, digest in history.files.items():
        place = target / name
        if not (place.is_file() and files.sha256(place).startswith(digest)):
            files.copy_file(need_file(source, name, digest), place)
            copied.append(name)
    return copied
