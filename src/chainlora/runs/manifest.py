"""``chain.json``: what a run directory holds, typed, checked when read, and written in one place.

It names every file that a load or a resume depends on with its SHA-256, the files of the base model
(`models.identity`), the digest of the rows, and the point to resume from. Its own `checksum` covers
all of it.

A link has an id that is never used again in its run, the name of the stage that it was tuned in, a
strength, and the digest of the state that it was tuned on (`state_digest`). Format 2, of version
0.2, has none of these four: its links are read as ids 0, 1, … of one stage, of strength 1. Nor does
it name ``result.json``. It becomes format 3 when it is next written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import ConfigError, RunError
from chainlora.knots.numbers import Numbers

FORMAT = 3
CAUSAL = "CAUSAL_LM"  # PEFT's name of the task of causal language models
READABLE = (2, 3)
STAGE = "main"  # of links where no stage was named
START = "start"  # what a run began on: the stage of an imported adapter, and rows given for it
BASE = "base"  # the state of no links
RESULT = "result.json"
TOKENIZER = "tokenizer"  # folder of a tokenizer that is not the base's
REFERENCE = "reference.safetensors"
INCOMPLETE = "the run directory is incomplete: copy it whole, or start over"
DAMAGED = "the run directory is damaged: restore the file from a copy, or start over"

Count = Annotated[int, Field(ge=0)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
# What is printed must hold no control characters: a terminal would obey them.
Text = Annotated[str, Field(pattern=r"^\P{Cc}*$")]


class Best(TypedDict):
    """The best point of a run so far. `directory` holds its partial link, if it has one."""

    step: Count
    num_links: Count
    partial: bool
    metric: str
    value: float
    directory: NotRequired[Annotated[str, Field(pattern=r"^best/\d{8,}$")]]
    error: NotRequired[Annotated[float, Field(ge=0)]]  # of that link, as `Link.error`


@dataclass
class Progress:
    """Where a run is, and what its trainer remembers: all that a resumed run must know again."""

    step: Count = 0
    link: Count = 0
    tokens: Count = 0
    scored_tokens: Count = 0
    seconds: float = 0.0
    num_records: Count = 0
    best: Best | None = None
    evaluations_without_gain: Count = 0
    stopped: bool = False
    soft_knots: Count = 0  # in the live link so far
    memory: dict[str, float] = field(default_factory=dict)  # of the knot policy (`Position`)
    evaluation_due: bool = False  # a signal stopped the evaluation here: it is made on resume


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class LinkEntry(_Part):
    """What the manifest says of a link: enough, with its adapter, to read it back."""

    id: Count
    stage: StageName
    strength: float
    tuned_on: Text
    index: Count
    directory: Annotated[str, Field(pattern=r"^(links/\d{3,}|best/\d{8,})$")]
    rank: Count
    scaling: float
    num_steps: Count
    error: float = 0.0
    config: dict[str, Any]

    def link_config(self) -> LinkConfig:
        """Return the config that the link was tuned with."""
        try:
            return LinkConfig(**self.config)
        except (ConfigError, TypeError) as error:
            raise RunError(f"a link's config must be valid (got {error}); {DAMAGED}") from None

    def outline(self) -> Link:
        """Return the link without its tensors."""
        return Link(self.index, self.link_config(), {}, id=self.id, strength=self.strength)


class Base(_Part):
    """The model that the links belong to. `files` are hashes of all that makes it what it is; a
    chain saved without a run has none.

    `body` is the fingerprint without the parameters that the chain holds itself, which may be
    others where it is loaded: a new head.
    """

    model: Text
    fingerprint: Text
    body: Text | None = None
    task_type: Text | None = CAUSAL
    dtype: Annotated[str, Field(pattern=r"^b?float(16|32|64)$")] = "float32"
    files: dict[str, str] | None = None
    fan_in_fan_out: bool = False
    quantize: Text | None = None


class Checkpoint(_Part):
    """A point inside a link."""

    directory: Annotated[str, Field(pattern=r"^checkpoints/\d{8,}$")]
    progress: Progress


class Selection(_Part):
    """The best point, which is what the run is loaded as."""

    num_links: Count
    step: Count
    partial: LinkEntry | None = None


class Records(_Part):
    """The first `count` lines of ``metrics.jsonl``, by the hash of their bytes."""

    count: Count
    sha256: str


class Change(_Part):
    """A config key that a resume changed, and from which step on."""

    key: Annotated[str, Field(pattern=r"^(model|(data|chain|train)\.\w+)$")]
    before: Any
    after: Any
    step: Count


class Manifest(_Part):
    """All that ``chain.json`` says.

    `progress` is that of the last knot; `checkpoint` is a later point, inside a link. `next_id` is
    that of the next link. `files` maps paths in the run directory to SHA-256.

    A run that is a later `stage` begins on the `first` links, of earlier ones; the ids of its own
    begin at `first_id`. `kept` are the stages of which rows are kept, in their order. `sources` are
    digests of the task and the files of rows, by the keys that name them
    (`data.splits.source_digest`).
    """

    format: int
    base: Base
    seed: int = 0
    hold: Text
    rows: Text | None = None
    sources: dict[str, list[str]] = {}
    links: list[LinkEntry]
    next_id: Count = 0
    stage: StageName = STAGE
    first: Count = 0
    first_id: Count = 0
    pruned: Count = 0  # links of earlier stages that were deleted since
    is_pruned: bool = False  # its own were
    moments: Annotated[str, Field(pattern=r"^moments/\d{3,}\.safetensors$")] | None = None
    checkpoint: Checkpoint | None = None
    selected: Selection | None
    progress: Progress
    numbers: Numbers | None = None  # decided when the run began; None before version 0.3
    kept: list[StageName] = []
    records: Records | None = None
    changes: list[Change] = []
    plugins: dict[str, str] = {}  # SHA-256 of each when the run began
    files: dict[str, str] = {}
    versions: dict[Text, Text] = {}

    @property
    def position(self) -> Progress:
        """Return where the run resumes."""
        return self.progress if self.checkpoint is None else self.checkpoint.progress

    @property
    def has_run(self) -> bool:
        """Say whether a run wrote this, with its config; else it is a saved chain alone."""
        return "config.yaml" in self.files

    @property
    def loaded(self) -> list[LinkEntry]:
        """Return the links that the run is loaded as: up to its best point, if it was selected."""
        if self.selected is None:
            return self.links
        partial = self.selected.partial
        return [*self.links[: self.selected.num_links], *([partial] if partial else [])]

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages that links are of, in their order."""
        return list(dict.fromkeys(link.stage for link in self.loaded))

    @property
    def columns(self) -> list[str]:
        """Return what a matrix scores: the rows given for the start, and those of each stage."""
        return list(dict.fromkeys([*([START] if START in self.kept else []), *self.stages]))

    @property
    def start_links(self) -> int:
        """Return how many links a run began on: of an imported adapter, or those of another run."""
        return sum(link.stage == START for link in self.links) or self.first

    def until(self, count: int) -> Manifest:
        """Return this as it began, with its first links alone."""
        first = {"links": self.links[:count], "first": min(self.first, count)}
        return self.model_copy(update=first | {"next_id": self.first_id, "selected": None})

    @property
    def is_off(self) -> bool:
        """Say whether the run's own links are all switched off."""
        own = [link.strength for link in self.loaded if link.stage == self.stage]
        return bool(own) and not any(own)

    def at_strengths(self, strengths: Mapping[str, float]) -> Manifest:
        """Return this with the links of these stages at other strengths."""

        def changed(entry: LinkEntry) -> LinkEntry:
            strength = strengths.get(entry.stage, entry.strength)
            return entry.model_copy(update={"strength": strength})

        update: dict[str, Any] = {"links": [changed(link) for link in self.links]}
        if self.selected is not None and self.selected.partial is not None:
            partial = changed(self.selected.partial)
            update["selected"] = self.selected.model_copy(update={"partial": partial})
        return self.model_copy(update=update)

    @property
    def started_on(self) -> str:
        """Return the digest of the state that the run began on."""
        return state_digest(self.base.fingerprint, self.links[: self.first])

    @property
    def state(self) -> str:
        """Return the digest of the base with the links that the run is loaded as."""
        return state_digest(self.base.fingerprint, self.loaded)

    @property
    def named(self) -> set[str]:
        """Return the files and folders that the run needs, by their paths in the run directory."""
        named = {
            "config.yaml",
            "model",
            TOKENIZER,
            REFERENCE,
            *(link.directory for link in self.links),
        }
        named |= {kept_rows(stage) for stage in self.kept}
        points = [self.progress]
        if self.checkpoint is not None:
            named.add(self.checkpoint.directory)
            points.append(self.checkpoint.progress)
        if self.moments is not None:
            named.add(self.moments)
        if self.selected is not None and self.selected.partial is not None:
            named.add(self.selected.partial.directory)
        for point in points:
            if point.best is not None and "directory" in point.best:
                named.add(point.best["directory"])
        return named


def describe_link(link: Link, directory: str | None = None, stage: str = STAGE) -> dict[str, Any]:
    """Return what a manifest says of a link by itself, as JSON."""
    return {
        "id": link.id,
        "stage": stage,
        "strength": link.strength,
        "index": link.index,
        "directory": directory or link_directory(link.id),
        "rank": link.rank,
        "scaling": link.config.scaling,
        "num_steps": link.num_steps,
        "error": link.error,
        "config": link.config.model_dump(mode="json"),
    }


def link_entry(
    link: Link,
    fingerprint: str,
    below: Sequence[LinkEntry],
    directory: str | None = None,
    stage: str = STAGE,
) -> LinkEntry:
    """Return the entry of a link that was tuned on the base and the links `below`."""
    described = describe_link(link, directory, stage)
    return LinkEntry(**described, tuned_on=state_digest(fingerprint, below))


def link_entries(
    links: Iterable[Link], fingerprint: str, known: Sequence[LinkEntry] = (), stage: str = STAGE
) -> list[LinkEntry]:
    """Return the entries of a chain's links; what a known one was tuned on and in is kept."""
    before = {e.id: {"tuned_on": e.tuned_on, "stage": e.stage} for e in known}
    entries: list[LinkEntry] = []
    for link in links:
        entry = link_entry(link, fingerprint, entries, stage=stage)
        entries.append(entry.model_copy(update=before.get(entry.id, {})))
    return entries


def state_digest(fingerprint: str, links: Iterable[LinkEntry]) -> str:
    """Return the digest of a state: a base and the links on it, by their ids and strengths."""
    state = [fingerprint, [[link.id, link.strength] for link in links]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def link_directory(link_id: int) -> str:
    """Return where a link lies in the run directory."""
    return f"links/{link_id:03d}"


def kept_rows(stage: str) -> str:
    """Return where the rows that a stage kept lie in the run directory."""
    return f"rows/{stage}.safetensors"


# --- reading and writing ---


def encode_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON object of a manifest, its checksum last."""
    tree = manifest.model_dump(mode="json")
    return tree | {"checksum": checksum(tree)}


def decode_manifest(text: bytes, run: Path) -> Manifest:
    """Return the manifest that a file holds. Raises RunError unless it is whole and consistent."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"chain.json must be JSON (got {run}: {error}); {INCOMPLETE}") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found not in READABLE:
        raise RunError(
            f"chain.json must be of format {' or '.join(map(str, READABLE))} (got {found!r:.40} in "
            f"{run}); use the version of chainlora that wrote it"
        )
    if tree.pop("checksum", None) != checksum(tree):
        raise RunError(
            f"chain.json must be as the run wrote it (got another checksum in {run}); {DAMAGED}"
        )
    return _validated(tree, run)


def _validated(tree: dict[str, Any], run: Path) -> Manifest:
    try:
        if tree["format"] == 2:
            _upgrade(tree)
        manifest = Manifest.model_validate_json(json.dumps(tree))  # lists for tuples, as in JSON
    except (AttributeError, LookupError, TypeError) as error:
        raise RunError(
            "chain.json must hold valid values", f"{error!r} in {run}", DAMAGED
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"chain.json must hold valid values (got {first['input']!r:.60} for `{where}` in "
            f"{run}: {first['msg'][:1].lower()}{first['msg'][1:]}); {DAMAGED}"
        ) from None
    _check_consistent(manifest, run)
    return manifest


def _upgrade(tree: dict[str, Any]) -> None:
    """Give a manifest of format 2 what format 3 says of its links."""
    partial = (tree["selected"] or {}).get("partial")
    places = [[place, 1.0] for place in range(len(tree["links"]))]
    for link in [*tree["links"], *([partial] if partial else [])]:
        state = json.dumps([tree["base"]["fingerprint"], places[: link["index"]]])
        digest = hashlib.sha256(state.encode()).hexdigest()[:16]
        link |= {"id": link["index"], "stage": STAGE, "strength": 1.0, "tuned_on": digest}
    tree["next_id"] = len(tree["links"])


def _check_consistent(manifest: Manifest, run: Path) -> None:
    """Raise RunError where parts of a manifest contradict each other."""
    count = len(manifest.links)
    checkpoint, selected = manifest.checkpoint, manifest.selected
    ids = [link.id for link in manifest.links]
    if [link.directory for link in manifest.links] != [link_directory(id) for id in ids]:
        wrong = "links out of order"
    elif [link.index for link in manifest.links] != list(range(count)):
        wrong = "links numbered out of order"
    elif len(set(ids)) != count or any(id >= manifest.next_id for id in ids):
        wrong = "ids of links that are used again"
    elif manifest.first > count or manifest.first_id > manifest.next_id:
        wrong = f"{count} links, of which {manifest.first} are of earlier stages"
    elif manifest.progress.link != count:
        wrong = f"{count} links and progress of {manifest.progress.link}"
    elif checkpoint is not None and checkpoint.progress.link != count:
        wrong = f"{count} links and a checkpoint after {checkpoint.progress.link}"
    elif selected is not None and selected.num_links > count:
        wrong = f"{count} links and {selected.num_links} selected"
    elif outside := [n for n in manifest.files if n[:1] == "/" or ".." in PurePosixPath(n).parts]:
        wrong = f"a file outside, {outside[0]!r:.60}"
    else:
        return
    raise RunError(f"chain.json must agree with itself (got {wrong} in {run}); {DAMAGED}")


def checksum(tree: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a JSON file says."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
