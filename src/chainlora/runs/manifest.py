"""``chain.json``: what a run directory holds, typed, checked when read, and written in one place.

Format 2 names every file that a load or a resume depends on with its SHA-256, the files of the base
model (`models.identity`), the digest of the rows, and the point to resume from. Its own `checksum`
covers all of it. Format 1, of version 0.1, has none of these; it is read, resumed and exported
without the checks, and becomes format 2 when it is next written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import ConfigError, RunError
from chainlora.knots.numbers import Numbers

FORMAT = 2
CAUSAL = "CAUSAL_LM"  # PEFT's name of the task of causal language models
READABLE = (1, 2)
INCOMPLETE = "the run directory is incomplete: copy it whole, or start over"
DAMAGED = "the run directory is damaged: restore the file from a copy, or start over"

Count = Annotated[int, Field(ge=0)]


class Best(TypedDict):
    """The best point of a run so far. `directory` holds its partial link, if it has one."""

    step: Count
    num_links: Count
    partial: bool
    metric: str
    value: float
    directory: NotRequired[Annotated[str, Field(pattern=r"^best(/\d{8})?$")]]


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
    planned: list[Count] = field(default_factory=list)  # steps of links, of 0.2 and by minutes
    memory: dict[str, float] = field(default_factory=dict)  # of the knot policy (`Position`)
    evaluation_due: bool = False  # a signal stopped the evaluation here: it is made on resume


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class LinkEntry(_Part):
    """What the manifest says of a link: enough, with its adapter, to read it back."""

    index: Count
    directory: Annotated[str, Field(pattern=r"^(links/\d{3,}|best(/\d{8})?)$")]
    rank: Count
    scaling: float
    num_steps: Count
    error: float = 0.0
    id: Count | None = None  # in runs of 0.2 the index
    strength: float = 1.0
    config: dict[str, Any]

    def link_config(self) -> LinkConfig:
        """Return the config that the link was tuned with."""
        try:
            return LinkConfig(**self.config)
        except (ConfigError, TypeError) as error:
            raise RunError(f"a link's config must be valid (got {error}); {DAMAGED}") from None


class Base(_Part):
    """The model that the links belong to. `files` are hashes of all that makes it what it is.

    `body` is the fingerprint without the parameters that the chain holds itself, which may be
    others where it is loaded: a new head.
    """

    model: str
    fingerprint: str
    body: str | None = None
    task_type: str | None = CAUSAL
    dtype: Annotated[str, Field(pattern=r"^b?float(16|32|64)$")] = "float32"
    files: dict[str, str] | None = None
    fan_in_fan_out: bool = False
    quantize: str | None = None


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
    """A config key that a resume changed by name, and from which step on."""

    key: Annotated[str, Field(pattern=r"^(data|chain|train)\.\w+$")]
    before: Any
    after: Any
    step: Count


class Manifest(_Part):
    """All that ``chain.json`` says.

    `progress` is that of the last knot; `checkpoint` is a later point, inside a link. `files` maps
    paths in the run directory to SHA-256; it is None in format 1, which has no checksums.
    """

    format: int
    base: Base
    seed: int = 0
    hold: Annotated[str, Field(pattern=r"^(tied|carried)$")]
    rows: str | None = None
    links: list[LinkEntry]
    next_id: Count | None = None  # of the link after the last, or the live one; None: their number
    moments: Annotated[str, Field(pattern=r"^moments(/\d{3,})?\.safetensors$")] | None = None
    checkpoint: Checkpoint | None = None
    selected: Selection | None
    progress: Progress
    numbers: Numbers | None = None  # decided when the run began; None before version 0.3
    records: Records | None = None
    changes: list[Change] = []
    files: dict[str, str] | None = None
    versions: dict[str, str] = {}

    @property
    def position(self) -> Progress:
        """Return where the run resumes."""
        return self.progress if self.checkpoint is None else self.checkpoint.progress

    @property
    def has_run(self) -> bool:
        """Say whether a run wrote this, with its config; else it is a saved chain alone."""
        return self.files is None or "config.yaml" in self.files

    @property
    def named(self) -> set[str]:
        """Return the files and folders that the run needs, by their paths in the run directory."""
        named = {"config.yaml", "model", *(link.directory for link in self.links)}
        points = [self.progress]
        if self.checkpoint is not None:
            named.add(self.checkpoint.directory)
            points.append(self.checkpoint.progress)
        if self.moments is not None:
            named.add(self.moments)
        if self.selected is not None and self.selected.partial is not None:
            named.add(self.selected.partial.directory)
        for point in points:
            if point.best is not None and point.best["partial"]:
                named.add(point.best.get("directory", "best"))
        return named


def describe_link(link: Link, directory: str | None = None) -> dict[str, Any]:
    """Return what a manifest says of a link, as JSON."""
    return {
        "index": link.index,
        "directory": directory or link_directory(link.index),
        "rank": link.rank,
        "scaling": link.config.scaling,
        "num_steps": link.num_steps,
        "error": link.error,
        "id": link.id,
        "strength": link.strength,
        "config": link.config.model_dump(mode="json"),
    }


def link_directory(index: int) -> str:
    """Return where a link lies in the run directory."""
    return f"links/{index:03d}"


# --- reading and writing ---


def encode_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON object of a manifest, its checksum last."""
    tree = manifest.model_dump(mode="json")
    return tree | {"checksum": _checksum(tree)}


def decode_manifest(text: bytes, run: Path) -> Manifest:
    """Return the manifest that a file holds. Raises RunError unless it is whole and consistent."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"chain.json must be JSON (got {run}: {reason}); {INCOMPLETE}") from None
    keys = ("format", "base", "links", "selected", "hold", "progress")
    missing = [key for key in keys if not isinstance(tree, dict) or key not in tree]
    if "format" not in missing and tree["format"] not in READABLE:
        raise RunError(
            f"chain.json must be of format {' or '.join(map(str, READABLE))} (got "
            f"{tree['format']!r:.40} in {run}); use the version of chainlora that wrote it"
        )
    if missing:
        raise RunError(
            f"chain.json must hold {', '.join(keys)} (got no `{missing[0]}` in {run}); {INCOMPLETE}"
        )
    _check_sum(tree, run)
    return _validated(tree, run)


def _check_sum(tree: dict[str, Any], run: Path) -> None:
    stated = tree.pop("checksum", None)
    if tree["format"] != 1 and stated != _checksum(tree):
        raise RunError(
            f"chain.json must be as the run wrote it (got another checksum in {run}); {DAMAGED}"
        )


def _validated(tree: dict[str, Any], run: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(json.dumps(tree))  # lists for tuples, as in JSON
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"chain.json must hold valid values (got {first['input']!r:.60} for `{where}` in "
            f"{run}: {first['msg'][:1].lower()}{first['msg'][1:]}); {DAMAGED}"
        ) from None
    _check_consistent(manifest, run)
    return manifest


def _check_consistent(manifest: Manifest, run: Path) -> None:
    """Raise RunError where parts of a manifest contradict each other."""
    count = len(manifest.links)
    checkpoint, selected = manifest.checkpoint, manifest.selected
    if [link.directory for link in manifest.links] != [link_directory(k) for k in range(count)]:
        wrong = "links out of order"
    elif [link.index for link in manifest.links] != list(range(count)):
        wrong = "links numbered out of order"
    elif manifest.progress.link != count:
        wrong = f"{count} links and progress of {manifest.progress.link}"
    elif checkpoint is not None and checkpoint.progress.link != count:
        wrong = f"{count} links and a checkpoint after {checkpoint.progress.link}"
    elif selected is not None and selected.num_links > count:
        wrong = f"{count} links and {selected.num_links} selected"
    elif manifest.format != 1 and manifest.files is None:
        wrong = "no checksums of files"
    elif outside := [name for name in manifest.files or () if not _is_inside(name)]:
        wrong = f"a file outside, {outside[0]!r:.60}"
    else:
        return
    raise RunError(f"chain.json must agree with itself (got {wrong} in {run}); {DAMAGED}")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _checksum(tree: Mapping[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
