"""``lineage.json``: the origin of an export, and the checksums of its files.

It has the history of the exported state, the config and hardware of each stage, and the arguments
of the export. So `runs.exported` can export it again from the run, and `training.rebuilding` can
train it again from the rows. It contains no rows, and only the last part of each path.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from chainlora import files
from chainlora.runs.cards import Naming, public_name
from chainlora.runs.costs import versions
from chainlora.runs.documents import Document, Name, Part, Sums, checksum, read_part, write_part
from chainlora.runs.entries import BASE, START, State
from chainlora.runs.history import History
from chainlora.runs.state import OpenState

LINEAGE = "lineage.json"

Target = Literal["merged", "adapter", "gguf", "gguf-adapter"]
_OF_A_PLACE: Any = {"output": True, "start": True, "plugins": True, "train": {"trackers"}}


class StageFacts(Part):
    """The config of a stage, and the hardware of its training."""

    config: dict[str, Any]
    hardware: dict[str, Any] = Field(default={})


@with_config(ConfigDict(extra="forbid"))
class Exported(TypedDict, total=False):
    """Arguments of the exporters; `verify_export` checks which exporter takes which."""

    num_links: int | None
    rank: int | None
    tolerance: float | None
    kind: str | None


class Lineage(Document):
    """The content of ``lineage.json``."""

    remedy: ClassVar[str] = "the export is damaged: export the run again"
    to: Target
    exported: Exported  # arguments of the exporter
    naming: dict[Literal["name", "base", "licence"], str | None]
    versions: dict[str, str] = Field(default={})
    revision: str | None = None  # of a base from the Hub
    state: State  # the exported one
    head: Name = BASE  # its entry
    history: History  # its entry and all ancestors
    stages: dict[Name, StageFacts] = Field(default={})
    files: Sums = Field(default={})  # of the export, without this file

    def write(self, folder: Path) -> None:
        """Write the file into an export, with checksums of all other files, which must exist."""
        whole = self.model_copy(update={"files": files.checksums(folder)})
        write_part(folder / LINEAGE, whole, indent=1)

    @property
    def base_digest(self) -> str | None:
        """Return a SHA-256 of the hashes of the base's files, None if these are unknown."""
        hashes = self.history.base.files
        return None if hashes is None else checksum(hashes)

    @property
    def places(self) -> list[tuple[int, str]]:
        """Return the number (as in `inspect`) and stage of each link, in the order of summation."""
        order, facts = self.history.in_order(self.state.links), self.history.links
        return [(order.index(link), facts[link].stage) for link in self.state.links]

    @property
    def picture(self) -> str:
        """Return a line for each entry: its parents, name and kind."""
        return "\n".join(
            f"{' + '.join(entry.parents) or BASE} --> {entry.key} ({entry.kind})"
            for entry in self.history.entries
        )

    @property
    def table(self) -> list[list[str]]:
        """Return the name, digest of rows, and links of each stage."""
        links = self.history.links.items()
        return [
            [
                entry.key,
                entry.training.rows or "",
                " ".join(digest for digest, facts in links if facts.stage == entry.key),
            ]
            for entry in self.history.entries
            if entry.kind in ("stage", "import") and (entry.key != START or entry.state.links)
        ]

    @property
    def is_trained_again(self) -> bool:
        """Say whether `chainlora train` can repeat it: an imported adapter cannot be."""
        return all(e.kind != "import" or not e.state.links for e in self.history.entries)


def lineage_of(
    state: OpenState, base: Path | None, naming: Naming, to: Target, **exported: Any
) -> Lineage:
    """Return the lineage of an export of a state.

    `base` is the folder of the base, None if it is not on this machine. `to` and `exported` are the
    target and the arguments of the export.
    """
    history, links = state.history.only(state.key), tuple(state.summed(exported["num_links"]))
    configured = [e.key for e in history.entries if e.has_config and state.draft is None]
    stages = {
        key: {
            "config": state.at(key).config().model_dump(mode="json", exclude=_OF_A_PLACE),
            "hardware": (state.at(key).result() or {}).get("hardware", {}),
        }
        for key in configured
    }
    # Leave out times, since a rebuild has others, and kept rows, since a copy may not have them.
    left_out: Any = {"entries": {"__all__": {"kept", "ended", "seconds"}}, "unsent": True}
    left_out |= {"stages": {"__all__": {"config"}}, "general": {"start_data"}}  # they name places
    facts = history.model_dump(mode="json", exclude=left_out)
    facts["base"]["model"] = public_name(state.base.model)
    for entry in facts["entries"]:
        entry["files"] = {name: sha for name, sha in entry["files"].items() if "/" in name}
    tree = {
        "to": to,
        "exported": exported,
        "naming": vars(naming),
        "versions": versions(),
        "revision": base.name if base is not None and base.parent.name == "snapshots" else None,
        "state": State(base=state.state.base, links=links).model_dump(mode="json"),
        "head": state.key,
        **without_places({"history": facts, "stages": stages}),
    }
    return Lineage.model_validate_json(json.dumps(tree))


def without_places(value: Any) -> Any:
    """Return a JSON tree in which each absolute path, also as a key, is cut to its last part."""
    if isinstance(value, dict):
        return {without_places(key): without_places(child) for key, child in value.items()}
    if isinstance(value, list):
        return [without_places(child) for child in value]
    if isinstance(value, str) and "\n" not in value:
        windows = PureWindowsPath(value)  # accepts / and \ as separators
        if windows.is_absolute() or PurePosixPath(value).is_absolute():
            return windows.name
    return value


def read_lineage(path: str | Path) -> Lineage:
    """Read the lineage of an export: its folder, or the file. Raises RunError if it is damaged."""
    path = Path(path).expanduser()
    return read_part(path / LINEAGE if path.is_dir() else path, Lineage)
