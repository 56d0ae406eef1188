"""The keys of recipes: digests by which a plan finds what was computed for it (decision 43)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from chainlora.runs.documents import Digest, short_digest
from chainlora.runs.recipes import NUMERICS, Recipe

if TYPE_CHECKING:
    from chainlora.runs.entries import Entry
    from chainlora.runs.history import History


class Made:
    """The keys and entries of recipes in a history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._by_digest = {entry.digest: entry for entry in history.entries}
        self._keys: dict[Recipe, Digest | None] = {}

    def key(self, recipe: Recipe) -> Digest | None:
        """Return the key of a recipe; None before all its parents are made."""
        if recipe not in self._keys:
            contents = [self._content(parent) for parent in recipe.parents]
            is_open = any(content is None for content in contents)
            self._keys[recipe] = None if is_open else self._digest(recipe, contents)
        return self._keys[recipe]

    def entry(self, recipe: Recipe) -> Entry | None:
        """Return the entry of a recipe, None if it is not made, and for the base."""
        key = None if recipe.kind == "base" else self.key(recipe)
        return None if key is None else self._by_digest.get(key)

    def is_made(self, recipe: Recipe) -> bool:
        """Say whether a recipe has its entry; the base is always there."""
        return recipe.kind == "base" or self.entry(recipe) is not None

    def due(self, recipes: Iterable[Recipe]) -> Recipe | None:
        """Return the first recipe, parents first, that is needed for others and not made."""
        return next((recipe for each in recipes for recipe in self.unmade(each)), None)

    def unmade(self, recipe: Recipe) -> Iterator[Recipe]:
        """Yield the recipes that are still to be computed for one, parents first."""
        if not self.is_made(recipe):  # else nothing below it is needed
            for parent in recipe.parents:
                yield from self.unmade(parent)
            yield recipe

    def _content(self, recipe: Recipe) -> Any:
        """Return what a recipe has come to: its state, and the kept rows of its stages."""
        if recipe.kind == "base":
            return short_digest(dict(recipe.own))
        entry = self.entry(recipe)
        if entry is None:
            return None
        # of the rows of the base only those to train on: others are for scores, and replaceable
        kept = entry.training.rows if recipe.kind == "start" else self._rows(recipe)
        return [entry.state.digest, kept]

    def _rows(self, recipe: Recipe) -> list[str | None]:
        entries = [self.entry(stage) for stage in recipe.lineage]
        return [None if entry is None else entry.kept for entry in entries]

    def _digest(self, recipe: Recipe, contents: Sequence[Any]) -> Digest:
        inside: Any = [recipe.kind, NUMERICS.get(recipe.kind), dict(recipe.own), contents]
        if recipe.kind == "combine":
            # parts are summed in the order of their states; rows are read in that of the list
            pairs = sorted(zip(contents, recipe.weights, strict=True), key=repr)
            rows = None if recipe.own["keep_conflicts"] else self._rows(recipe)
            inside = [*inside[:3], pairs, rows]
        return short_digest(inside)
