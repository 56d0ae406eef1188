"""Methods as presets: one small YAML file each, and the chain that a preset's `recipe` stands for.

A method is a few config keys over the config of the comparison, never a fork of the training loop;
what differs between two methods is the diff of their files.

A recipe says what the *comparison* fixes (the rank r, the total epochs or steps) and what a
*method* makes of it (how many links, which ranks), so that all methods get equally many steps. The
paper's splits follow: 5 epochs are 3 + 2 over two links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from chainlora.config.reading import read_tree
from chainlora.errors import ConfigError, nearest
from chainlora_lab.outputs import Keys, checked

_FOLDER = Path(__file__).parent
_WAYS = _FOLDER / "ways"  # presets that add data sets
_SECTIONS = ("plugins", "recipe", "data", "chain", "train", "loop", "way", "settings")


@dataclass(frozen=True)
class Method:
    """A preset: a name, what it is, where it comes from, and the keys it sets."""

    name: str
    description: str
    source: str
    keys: Mapping[str, Any]


def list_methods() -> list[str]:
    """Return the names of the presets that train on one data set."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped_ways() -> set[str]:
    """Return the names of the ways to add data sets that have a preset."""
    return {path.stem for path in _WAYS.glob("*.yaml")}


def list_ways() -> list[str]:
    """Return the names of the ways to add data sets: presets, and what plug-ins have added."""
    from chainlora_lab.ways import COMBINERS, REGULARISERS  # which import torch

    return sorted({*shipped_ways(), *COMBINERS, *REGULARISERS})


@cache
def load_method(name: str) -> Method:
    """Read a shipped method. Raises ConfigError for an unknown name (nearest named)."""
    if name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"a method must be a preset's name (got the file {name!r}); write your own under "
            "`methods` of an experiment file, e.g. mine: {preset: chain, recipe: {links: 4}}, "
            "and call `chainlora experiment run`"
        )
    known = [*list_methods(), *list_ways()]
    if name not in known:
        remedy = "; if a file of yours registers it, name that file in `plugins`"
        raise ConfigError(f"unknown method {name!r}{nearest(name, known)}{remedy}")
    path = next(_FOLDER.rglob(f"{name}.yaml"), None)
    if path is None:
        return Method(name, "", "of a plug-in", {"way": name})
    tree = read_tree(path)
    keys = {section: tree[section] for section in _SECTIONS if section in tree}
    return Method(name, tree["description"], tree["source"], keys)


def merge_trees(*trees: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge nested mappings into a new one; later ones win, lists and values are replaced. Only
    plug-ins are added to each other."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in (tree or {}).items():
            if isinstance(value, Mapping):
                before = merged.get(key)
                merged[key] = merge_trees(before if isinstance(before, Mapping) else None, value)
            elif key == "plugins":
                named = [value] if isinstance(value, str) else value
                merged[key] = [*dict.fromkeys([*merged.get(key, ()), *named])]
            else:
                merged[key] = value
    return merged


# --- recipes ---

_Rank = Annotated[int, Field(ge=1, lt=2**31)]


class Recipe(Keys):
    """How a method spends the budget that all methods share.

    `rank`, and one of `epochs` and `steps`, belong to the comparison; the rest to the method.
    `scaling` sets ``chain.alpha = scaling · rank`` so that one scaling serves every rank; None
    leaves `chain.alpha` alone.
    """

    rank: _Rank = 8
    epochs: float | None = Field(default=None, gt=0)  # of the whole chain, as `steps`
    steps: int | None = Field(default=None, ge=1, lt=2**63)
    scaling: float | None = Field(default=None, gt=0)
    links: int = Field(default=1, ge=0, le=10_000)  # 0 trains nothing
    rank_times: _Rank = 1  # ranks are multiplied by it, their scaling unchanged
    ranks: tuple[_Rank, ...] | None = None  # rank of each link, instead of links · rank
    shares: tuple[float, ...] | None = None  # proportions; None: as equal as can be

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.epochs is None) == (self.steps is None):
            got = "both" if self.epochs is not None else "neither"
            raise ValueError(f"`recipe` must give epochs or steps of the whole chain (got {got})")
        if self.ranks is not None and not self.ranks:
            raise ValueError(
                "`recipe.ranks` must name a rank per link (got none); use links: 0 instead"
            )
        if self.steps is not None and self.steps < self.length:
            got = f"{self.steps} for {self.length} links"
            raise ValueError(f"`recipe.steps` must have at least one step a link (got {got})")
        if self.shares is not None and (
            len(self.shares) != self.length or min(self.shares, default=1) <= 0
        ):
            got = f"{list(self.shares)} for {self.length} links"
            raise ValueError(f"`recipe.shares` must be one positive number a link (got {got})")
        return self

    @property
    def length(self) -> int:
        return self.links if self.ranks is None else len(self.ranks)


def apply_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a config's section `recipe` by the `chain` keys it stands for.

    Raises ConfigError: unknown key (nearest named), wrong value, or keys that `chain` sets as well.
    """
    tree = dict(tree)
    if "recipe" not in tree:
        return tree
    recipe = checked(Recipe, tree.pop("recipe") or {}, "recipe.")
    chain = dict(tree.get("chain") or {})
    twice = [key for key in ("ranks", "epochs", "steps") if key in chain]
    if twice:
        rule, got = "`recipe` sets ranks and lengths", f"chain.{twice[0]} beside it"
        remedy = "give recipe.ranks or recipe.rank_times" if twice[0] == "ranks" else "leave it out"
        raise ConfigError(rule, got, remedy)
    ranks = recipe.ranks or (recipe.rank,) * recipe.links
    chain["ranks"] = [rank * recipe.rank_times for rank in ranks]
    if ranks:
        unit = "epochs" if recipe.steps is None else "steps"
        total = recipe.epochs if recipe.steps is None else recipe.steps
        assert total is not None
        chain[unit] = split_total(total, len(ranks), recipe.shares)
        chain |= _alpha(recipe, chain)
    return tree | {"chain": chain}


def _alpha(recipe: Recipe, chain: Mapping[str, Any]) -> dict[str, Any]:
    """Alpha of the first link; later links follow `chain.alpha_policy`."""
    if recipe.scaling is not None:
        return {"alpha": recipe.scaling * chain["ranks"][0]}
    if recipe.rank_times == 1:
        return {}
    alpha = chain.get("alpha", 16.0)
    if not isinstance(alpha, int | float):
        raise ConfigError(
            f"`rank_times` needs one chain.alpha for all links (got {alpha}); give one number"
        )
    times = recipe.rank_times ** (0.5 if chain.get("rslora") else 1)  # scaling: alpha / √rank
    return {"alpha": alpha * times}


def split_total(total: float, links: int, shares: Sequence[float] | None = None) -> list[float]:
    """Split epochs or steps over links; the parts sum to the total.

    Whole totals are split into whole parts as equal as can be, the earlier the longer (5 over 2 is
    3 + 2, over 3 is 2 + 2 + 1: the paper's split where it states one). Where there are more links
    than whole units, parts are equal fractions. `shares` are proportions; their parts stay whole if
    the total is an integer number of steps.
    """
    if shares is not None:
        ends = [total * sum(shares[: k + 1]) / sum(shares) for k in range(len(shares))]
        if isinstance(total, int):
            ends = [round(end) for end in ends]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if total == int(total) and total >= links:
        whole, rest = divmod(int(total), links)
        return [whole + (index < rest) for index in range(links)]
    return [total / links] * links
