"""Products without a model: a link is a text that says how it was computed, rows are a text too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.errors import RunError, TrainingError
from chainlora.runs.documents import now
from chainlora.runs.draft import DRAFT
from chainlora.runs.history import RESULT, WEIGHTS, Base, LinkFacts, State, link_folder, rows_file
from chainlora.runs.paths import HISTORY
from chainlora.runs.products import Product, Versions, read_versions, write_versions
from chainlora.runs.recipes import How, Plan, Stage
from chainlora.runs.reconcile import Due

FINGERPRINT = "base"


def begin(run: Path, general: bool = True) -> Path:
    """Write a run without stages."""
    run.mkdir(parents=True)
    base = Base(model="m", fingerprint=FINGERPRINT, files={"model.safetensors": "0"})
    history = Versions(base=base)
    plan = Plan(general={"source": "written"} if general else None)
    first = history.edited(plan, "train").versions[-1:]
    first = tuple(v.model_copy(update={"before": -1, "is_built": True, "time": ""}) for v in first)
    write_versions(run, history if not general else history.model_copy(update={"versions": first}))
    return run


def stage(name: str, names: Sequence[str] = (), how: How | None = None, **keys: Any) -> Stage:
    """Return a stage; the key `fails` makes its training fail, `early` or `late`."""
    place = {"data.train": f"/data/{name}.jsonl"}
    sources = {"data.train": [f"digest of {name}.jsonl"]}
    own: Any = {"name": name, "names": tuple(names), "how": how or How(), "keys": keys}
    return Stage(**own, sources=sources, places=place)


def text_of(run: Path, state: State) -> list[str]:
    """Return the links of a state, in the order in which they are summed."""
    return [(run / link_folder(link) / WEIGHTS).read_text() for link in state.links]


def _link(due: Due, stage: str, text: str) -> tuple[str, LinkFacts]:
    files.make_folder(due.run / "links")
    with files.new_folder(due.run / "links", stage) as scratch:
        files.write_text(scratch / WEIGHTS, text)
        sums = {WEIGHTS: files.sha256(scratch / WEIGHTS)}
        facts = LinkFacts(stage=stage, rank=1, num_steps=1, config={}, files=sums)
        files.put_folder(scratch, due.run / link_folder(facts.digest))
    return facts.digest, facts


def _rows(due: Due, text: str) -> str:
    files.make_folder(due.run / "rows")
    with files.new_folder(due.run / "rows", due.name) as scratch:
        files.write_text(scratch / "rows", text)
        digest = files.sha256(scratch / "rows")
        (scratch / "rows").replace(due.run / rows_file(digest))
        files.sync_folder(due.run / "rows")
    return digest


def _below(due: Due) -> State:
    """Return the state of the first parent."""
    first = due.recipe.parents[0]
    product = due.made.product(first)
    return State(base=FINGERPRINT) if product is None else product.state


def general(due: Due) -> tuple[Product, Mapping[str, LinkFacts]]:
    kept = _rows(due, "rows of the origin")
    return Product(kind="general", name="general", state=_below(due), kept=kept), {}


def train(due: Due) -> tuple[Product, Mapping[str, LinkFacts]]:
    own, below = due.recipe.stage, _below(due)
    assert own is not None
    if own.keys.get("fails") == "early":
        raise RunError("Cannot train: it was to fail.")
    if not (due.folder / DRAFT).is_file():
        files.make_folder(due.folder)
        files.write_text(due.folder / "config.yaml", f"places: {own.places}")  # never sent
        files.write_text(due.folder / RESULT, f"result of {own.name}")
        files.write_text(due.folder / DRAFT, own.name)
    if own.keys.get("fails") == "late":
        raise TrainingError("it was to fail in training")
    kept = _rows(due, f"rows of {own.name}")
    text = json.dumps(["train", own.name, text_of(due.run, below)])
    link, facts = _link(due, own.draws or own.name, text)
    state = below.model_copy(update={"links": (*below.links, link)})
    sums = {RESULT: files.sha256(due.folder / RESULT)}
    made: Any = {"state": state, "tied": (link,), "kept": kept, "files": sums, "ended": now()}
    keys: Any = {"identity": own.identity, "parents": tuple(due.parents)}
    return Product(kind="train", name=own.name, **keys, **made), {link: facts}


def combine(due: Due) -> tuple[Product, Mapping[str, LinkFacts]]:
    parts, rows = [], []
    for parent, weight in zip(due.recipe.parents, due.recipe.weights, strict=True):
        product = due.made.product(parent)
        assert product is not None
        own = text_of(due.run, product.state)
        parts.append([own if parent.kind != "general" else "origin", weight])
    for below in due.recipe.lineage:
        product = due.made.product(below)
        assert product is not None
        rows.append((due.run / rows_file(str(product.kept))).read_text())
    text = json.dumps(["combine", dict(due.recipe.own), sorted(parts, key=str), rows])
    link, facts = _link(due, "combined", text)
    state = State(base=FINGERPRINT, links=(link,))
    keys: Any = {"parents": tuple(due.parents), "name": "combined"}
    return Product(kind="combine", state=state, **keys), {link: facts}


EXECUTE = {"general": general, "train": train, "combine": combine}


# --- the same, worked out from a list ---


@dataclass(frozen=True)
class Wanted:
    """What a run should be: stages as (name, names below, rank of these), and how they are put
    together."""

    stages: tuple[tuple[str, tuple[str, ...], int | None], ...] = ()
    off: frozenset[str] = frozenset()
    rank: int | None = None
    always: bool = False

    def below(self, name: str) -> set[str]:
        (names,) = [names for own, names, _ in self.stages if own == name]
        return {name}.union(*map(self.below, names))

    def without(self, name: str) -> Wanted:
        gone = {own for own, _, _ in self.stages if name in self.below(own)}
        left = tuple(stage for stage in self.stages if stage[0] not in gone)
        return replace(self, stages=left, off=self.off - gone)

    def texts(self) -> list[str]:
        names = [name for name, _, _ in self.stages if name not in self.off]
        return self.whole(names, self.rank, self.always)

    def whole(self, names: Sequence[str], rank: int | None, always: bool = False) -> list[str]:
        covered = {below for name in names for below in self.below(name) - {name}}
        parts = [name for name, _, _ in self.stages if name in {*names} - covered]
        if not parts:
            return []
        if len(parts) == 1 and not always:
            return self.state(parts[0])
        needed = {below for name in parts for below in self.below(name)}
        rows = [f"rows of {name}" for name, _, _ in self.stages if name in needed]
        both = [[self.state(name), None] for name in parts] + [["origin", None]]
        own = {"rank": rank, "keep_conflicts": False, "steps": 0}
        return [json.dumps(["combine", own, sorted(both, key=str), rows])]

    def state(self, name: str) -> list[str]:
        ((names, rank),) = [(names, rank) for own, names, rank in self.stages if own == name]
        below = self.whole(names, rank) if names else []
        return [*below, json.dumps(["train", name, below])]


def everything_in(run: Path) -> dict[str, bytes]:
    """Return the files of a run, without its history and lock."""
    found = (path for path in run.rglob("*") if path.is_file() and path.parent != run)
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def names_in(run: Path, word: str) -> list[str]:
    """Return the files of a run that hold a word, in their names or contents."""
    inside = {**everything_in(run), HISTORY: (run / HISTORY).read_bytes()}
    return [name for name, content in inside.items() if word in name or word.encode() in content]


def products_of(run: Path) -> dict[str, Any]:
    """Return the products of a run but for their times."""
    history = read_versions(run)
    return {k: p.model_copy(update={"ended": ""}) for k, p in history.products.items()}
