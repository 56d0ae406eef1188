"""Entries of a run: states, and how they were computed; and the names of a run's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from chainlora.config.schema import LinkConfig
from chainlora.errors import ConfigError, RunError
from chainlora.knots.numbers import Numbers
from chainlora.runs.documents import DAMAGED, Count, Digest, Name, Part, Sums, now, short_digest
from chainlora.runs.recipes import START as START
from chainlora.runs.recipes import How, Recipe, Stage

CAUSAL = "CAUSAL_LM"  # PEFT's name of the task of causal language models
MAIN = "main"  # the name of a stage without one
BASE = "base"  # the state without links
CONFIG, RECORDS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
TOKENIZER = "tokenizer"
WEIGHTS = "adapter_model.safetensors"
COMBINED = "combined"  # the stage of the link of every combination: equal parts give equal bits
CONTENT = ("links", "rows")  # folders whose files are named by their content
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class State(Part):
    """A base and the links on it, in the order in which they are summed."""

    base: str
    links: tuple[Digest, ...] = ()

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits. States with equal digests are equal to the bit."""
        # 1.0: digests stay as they were, since sums of combinations follow their order
        return short_digest([self.base, [[link, 1.0] for link in self.links]])


class Base(Part):
    """The model that links belong to.

    `files` are the hashes of its files; they are None for a chain saved without a run.
    """

    model: str
    fingerprint: str
    task_type: str | None = CAUSAL
    dtype: Annotated[str, Field(pattern=r"^b?float(16|32|64)$")] = "float32"
    files: dict[str, str] | None = None
    fan_in_fan_out: bool = False
    quantize: str | None = None


class LinkFacts(Part):
    """The facts of a link beside its tensors; `files` are the SHA-256 of its adapter's files."""

    stage: Name
    rank: Count
    num_steps: Count
    error: float = 0.0
    config: dict[str, Any]
    files: Sums

    @property
    def digest(self) -> str:
        """Return the digest of stage, config and tensors.

        A link that was copied into another run keeps its name there, although its stage may have
        got another name; then this digest differs from its name.
        """
        return short_digest([self.stage, self.config, self.files.get(WEIGHTS)])

    def link_config(self) -> LinkConfig:
        """Return the config. Raises RunError for an invalid one."""
        try:
            return LinkConfig(**self.config)
        except (ConfigError, TypeError) as error:
            raise RunError("a link's config must be valid", error, DAMAGED) from None


class Training(Part):
    """The inputs of a stage's training."""

    rows: str | None = None  # digest of the rows in their order
    # digests of task and row files, by config key
    sources: dict[str, list[str]] = Field(default={})
    plugins: dict[str, str] = Field(default={})  # SHA-256 of each
    numbers: Numbers | None = None  # decided before the first step (`training.deciding`)
    versions: dict[str, str] = Field(default={})


class Entry(Part):
    """A state, and how it was computed.

    Its parents are the entries of its recipe's parents, without the base and its rows.
    """

    key: Name
    kind: Literal["stage", "combine", "import"]
    digest: Digest = "0" * 16  # the key of its recipe
    identity: Digest | None = None  # of its stage in the plan
    parents: tuple[Name, ...] = ()
    training: Training = Training()  # of a stage or an import
    how: How = How()  # of a combination
    state: State
    # all links of a stage; its state may end at an earlier, best point
    tied: tuple[Digest, ...] = ()
    kept: Sha | None = None  # SHA-256 of its kept rows
    files: Sums = Field(default={})  # in its folder
    folder: str = ""  # in ``stages``, if its name is not the key
    ended: str = ""  # when, in UTC
    distances: dict[Name, float] = Field(default={})  # of a combination, from each part
    seconds: float = 0.0  # that a combination took, for estimates of the next one

    @property
    def parent(self) -> str:
        """Return the entry that a stage begins on."""
        return self.parents[0] if self.parents else BASE

    @property
    def has_config(self) -> bool:
        """Say whether it is a stage, or an adapter that was added like one (`runs.adding`)."""
        return CONFIG in self.files

    @property
    def place(self) -> str:
        """Return the name of its folder in ``stages``."""
        return self.folder or self.key

    def renamed(self, names: Mapping[str, str]) -> Entry:
        """Return the entry with new names of entries; `names` maps old ones to new ones."""
        update = {
            "key": names.get(self.key, self.key),
            "parents": tuple(names.get(key, key) for key in self.parents),
            "distances": {names.get(k, k): value for k, value in self.distances.items()},
        }
        return self.model_copy(update=update)


@dataclass(frozen=True)
class Due:
    """A recipe without an entry, whose parents are made."""

    recipe: Recipe
    digest: Digest
    key: str  # of the future entry
    parents: tuple[str, ...]
    below: State  # of its first parent
    folder: str = ""  # as in `Entry`

    @property
    def place(self) -> str:
        """Return the name of its folder in ``stages``."""
        return self.folder or self.key

    @property
    def kind(self) -> str:
        return self.recipe.kind

    @property
    def stage(self) -> Stage:
        """Return the stage in the plan, of a stage or an import."""
        assert self.recipe.stage is not None
        return self.recipe.stage

    @property
    def training(self) -> Training:
        """Return the inputs that are known before the stage begins."""
        return Training(sources=self.stage.sources, plugins=self.stage.plugins)

    def entry(self, state: State, **more: Any) -> Entry:
        """Return the entry with its state, other fields, and the current time as its end."""
        kind = "import" if self.kind == "start" else self.kind
        stage, how = self.recipe.stage, self.recipe.how or How()
        identity = None if stage is None else stage.identity
        known: dict[str, Any] = {
            "kind": kind,
            "digest": self.digest,
            "identity": identity,
            "how": how,
            "folder": self.folder,
        }
        known |= {"key": self.key, "parents": self.parents, "state": state, "ended": now()}
        return Entry(**known | more)


# --- places ---


def link_folder(digest: str) -> str:
    """Return the folder of a link in a run."""
    return f"links/{digest}"


def rows_file(digest: str) -> str:
    """Return the file of kept rows in a run, by their SHA-256."""
    return f"rows/{digest[:16]}.safetensors"
