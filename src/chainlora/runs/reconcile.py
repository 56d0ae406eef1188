"""Make the products of a run agree with its plan: `command` edits, `reconcile` computes.

`reconcile` is the only builder. It computes what the current version lacks, parents first, and
saves each product by itself, so a kill loses only the work at hand; that is resumed from its own
checkpoint. Old files are deleted last: until then the run is what it was.

    command      settle what an earlier command left; write the new version; reconcile
    reconcile    compute, save; … ; then delete what the version marks, and old combinations
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chainlora import files
from chainlora.errors import RunError
from chainlora.runs.documents import Digest
from chainlora.runs.draft import DRAFT, PASSING
from chainlora.runs.history import CONTENT, LinkFacts
from chainlora.runs.locks import writing
from chainlora.runs.products import (
    Made,
    Product,
    Versions,
    copy_products,
    delete,
    folder_of,
    read_versions,
    unnamed,
    write_versions,
)
from chainlora.runs.recipes import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Due:
    """A recipe to be computed, all of whose parents are made."""

    run: Path
    history: Versions
    made: Made
    recipe: Recipe
    key: Digest

    @property
    def name(self) -> str:
        """Return the name of its product: of a stage, else of its kind."""
        return self.recipe.kind if self.recipe.stage is None else self.recipe.stage.name

    @property
    def folder(self) -> Path:
        """Return the folder of its product."""
        return self.run / folder_of(self.name, self.key)

    @property
    def parents(self) -> dict[Digest, Product]:
        """Return the products of its parents, by key."""
        keys = (self.made.key(parent) for parent in self.recipe.parents if parent.kind != "base")
        return {key: self.history.products[key] for key in keys if key is not None}


Execute = Callable[[Due], tuple[Product, Mapping[Digest, LinkFacts]]]
"""Computes a recipe, or resumes it: returns the product and the facts of its links. Its files are
written by then, under names by their content and into its folder."""


def command(
    run: Path,
    words: str,
    edit: Callable[[Versions], Versions],
    execute: Mapping[str, Execute],
    *,
    finishes: bool = False,
) -> Versions:
    """Edit the plan of a run and compute what it lacks; return the new history.

    A stage in training is finished first if the command `finishes` it, otherwise the command is
    refused. If the work fails before it has a checkpoint, the new version is taken back.
    """
    with writing(run):
        settle(run)
        if (begun := stage_in_training(run, read_versions(run))) is not None:
            if not finishes:
                place = shlex.quote(str(run))
                rule = f"Cannot {words.split()[0]}: stage {begun.name} is unfinished"
                remedy = (
                    f"finish it by chainlora train {place}, or drop it by chainlora undo {place}"
                )
                raise RunError(rule, begun.folder, remedy)
            reconcile(run, execute)
        before = read_versions(run)
        after = edit(before)
        if after != before:
            write_versions(run, after)
        try:
            return reconcile(run, execute)
        except BaseException:
            if after != before:
                settle(run)
            raise


def settle(run: Path) -> None:
    """Finish or withdraw what a killed command has left, under the lock of the run.

    A version that was never built, and of which nothing was computed, goes: its command, given
    again, makes it again.
    """
    history = read_versions(run)
    version, made = history.versions[history.at], Made(history)
    recipes = history.recipes()
    if made.due(recipes.wanted) is None:
        finish(run)
    elif not version.is_built and history.at == len(history.versions) - 1:
        earlier = {stage.identity for stage in history.plan(version.before).stages}
        new = [recipe for recipe in recipes.root.lineage if _identity(recipe) not in earlier]
        if not any(made.is_made(recipe) or _draft(run, made, recipe) for recipe in new):
            write_versions(run, history.dropped())


def _identity(recipe: Recipe) -> Digest | None:
    return None if recipe.stage is None else recipe.stage.identity


def _draft(run: Path, made: Made, recipe: Recipe) -> Path | None:
    """Return the folder of a stage in training, None without a checkpoint in it."""
    key, stage = made.key(recipe), recipe.stage
    if key is None or stage is None:
        return None
    folder = run / folder_of(stage.name, key)
    return folder if (folder / DRAFT).is_file() else None


@dataclass(frozen=True)
class InTraining:
    """A stage with a checkpoint and without a product."""

    name: str
    folder: Path


def stage_in_training(run: Path, history: Versions) -> InTraining | None:
    """Return the stage of the current version that has begun and not ended, or None."""
    made = Made(history)
    for recipe in history.recipes().root.lineage:
        folder = None if made.is_made(recipe) else _draft(run, made, recipe)
        if folder is not None and recipe.stage is not None:
            return InTraining(recipe.stage.name, folder)
    return None


def reconcile(run: Path, execute: Mapping[str, Execute]) -> Versions:
    """Compute what the current version of a run lacks; return the new history."""
    while (due := next_due(run)) is not None:
        for folder in (due.folder, *(run / name for name in CONTENT)):
            with files.reported(folder):
                files.remove_scratch(folder)  # left by a kill
        product, links = execute[due.recipe.kind](due)
        write_versions(run, read_versions(run).with_product(due.key, product, links))
        _tidy(due.folder)
    return finish(run)


def _tidy(folder: Path) -> None:
    """Delete what only the training of a stage needed."""
    if (folder / DRAFT).is_file():
        delete([folder / name for name in reversed(PASSING) if (folder / name).exists()])


def next_due(run: Path) -> Due | None:
    """Return what is to be computed next, None if the current version is complete."""
    history = read_versions(run)
    made = Made(history)
    recipe = made.due(history.recipes().wanted)
    key = None if recipe is None else made.key(recipe)
    return None if recipe is None or key is None else Due(run, history, made, recipe, key)


def finish(run: Path) -> Versions:
    """Note that the current version is built; delete what it marks, and old combinations."""
    history = read_versions(run)
    for key, product in history.products.items():
        _tidy(run / folder_of(product.name, key))  # left by a kill
    version = history.versions[history.at]
    versions = list(history.versions)
    versions[history.at] = version.model_copy(update={"is_built": True})
    after = history.model_copy(update={"versions": tuple(versions)})
    if version.marks:
        after = after.erased(version.marks)
        delete([*unnamed(run, after)])  # first: a kill leaves the marks, and they are deleted again
        write_versions(run, after)
        return after
    after = after.without_products(old_combinations(after))
    if after != history:
        write_versions(run, after)
    if after.products != history.products:
        delete([*unnamed(run, after)])
    return after


def old_combinations(history: Versions) -> list[Digest]:
    """Return the keys of combinations on which nothing stands, but for the latest.

    These are what the run is, what `undo` goes back to, and what `redo` goes to.
    """
    near = [history.at, history.versions[history.at].before, *list(successors(history))[-1:]]
    made = Made(history)
    kept = {made.key(history.recipes(place).root) for place in near if place >= 0}
    used = {key for product in history.products.values() for key in product.parents}
    combined = (key for key, product in history.products.items() if product.kind == "combine")
    return [key for key in combined if key not in kept | used]


def successors(history: Versions) -> Iterator[int]:
    """Yield the places of versions that were made from the current one, the newest last."""
    for place, version in enumerate(history.versions):
        if version.before == history.at:
            yield place


def current(history: Versions) -> int:
    """Return the place of the version that the run is: the newest that is complete."""
    made = Made(history)
    return next(p for p in history.ancestors() if made.is_made(history.recipes(p).root))


# --- undo and redo ---


def undo(run: Path, execute: Mapping[str, Execute], to: int | None = None) -> Versions:
    """Go back to the version before, or to another one. A stage in training is dropped."""
    with writing(run):
        settle(run)
        history = read_versions(run)
        if (begun := stage_in_training(run, history)) is not None and to is None:
            write_versions(run, history.dropped())
            delete([begun.folder])
            return reconcile(run, execute)
        at = history.versions[history.at].before if to is None else to
        if at < 0:
            raise RunError(f"Nothing to undo in {run}. chainlora log {shlex.quote(str(run))}.")
        write_versions(run, history.moved(at))
        return reconcile(run, execute)


def redo(run: Path, execute: Mapping[str, Execute]) -> Versions:
    """Go to the version that was made last from the current one."""
    with writing(run):
        settle(run)
        history = read_versions(run)
        later = [*successors(history)]
        if not later:
            raise RunError(f"Nothing to redo in {run}. chainlora log {shlex.quote(str(run))}.")
        write_versions(run, history.moved(later[-1]))
        return reconcile(run, execute)


# --- copies ---


def send(source: Path, target: Path, *, rows: bool) -> list[str]:
    """Copy the versions and products of a run that a target lacks; return the names of new files.

    Paths are not sent. Raises RunError if the source is not complete, or if the target is no
    earlier copy of it.
    """
    history = read_versions(source)
    version = history.versions[history.at]
    if version.marks or next_due(source) is not None:
        rule, remedy = "a run that is sent must be complete", "chainlora train RUN completes it"
        raise RunError(rule, source, remedy)
    stages = {k: s.model_copy(update={"places": {}}) for k, s in history.stages.items()}
    kept = {p.kept for p in history.products.values() if p.kept is not None} if not rows else set()
    before = read_versions(target) if (target / "history.json").is_file() else None
    if before is not None:
        count = len(before.versions)
        if history.versions[:count] != before.versions or before.base != history.base:
            rule, remedy = "the target must be an earlier copy", "choose a new target"
            raise RunError(rule, target, remedy)
        kept -= {p.kept for p in before.products.values()} - {*before.unsent}
    unsent = tuple(sorted({*kept, *(history.unsent if rows else ())}))
    sent = history.model_copy(update={"stages": stages, "unsent": unsent})
    with writing(target):
        names = copy_products(source, target, sent)
        target.mkdir(parents=True, exist_ok=True)
        write_versions(target, sent)
    return names
