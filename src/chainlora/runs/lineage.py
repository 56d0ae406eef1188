"""``lineage.json``: where an export comes from, and the checksums of its files.

It holds the part of the run's history that the exported state was computed from, the config and
hardware of each stage, and how it was exported. So `runs.recomputing` can export it again from the
run, and `training.rebuilding` can train it again from its rows. It has no rows, and of places on
this machine only the last part.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from chainlora import files
from chainlora.runs.beginning import closure
from chainlora.runs.cards import Naming, public_name
from chainlora.runs.costs import versions
from chainlora.runs.documents import (
    Document,
    Name,
    Part,
    Sums,
    checksum,
    read_part,
    write_part,
)
from chainlora.runs.history import COMBINED, Entry, History, State
from chainlora.runs.state import OpenState

LINEAGE = "lineage.json"

Target = Literal["merged", "adapter", "gguf", "gguf-adapter"]
_OF_A_PLACE: Any = {"output": True, "start": True, "plugins": True, "train": {"trackers"}}


class StageFacts(Part):
    """The config of a stage, and the hardware that it was trained on."""

    config: dict[str, Any]
    hardware: dict[str, Any] = Field(default={})


@with_config(ConfigDict(extra="forbid"))
class Exported(TypedDict, total=False):
    """Arguments of the exporters; which one takes which is known by `verify_export`."""

    num_links: int | None
    rank: int | None
    tolerance: float | None
    kind: str | None
    each: bool


class Lineage(Document):
    """What an export says of itself. `exported` are the arguments of the exporter, `state` is what
    was exported, `history` all that it was computed from, `revision` that of a base from the Hub,
    `files` are those beside this one."""

    remedy: ClassVar[str] = "the export is damaged: export the run again"
    to: Target
    exported: Exported
    naming: dict[Literal["name", "base", "licence"], str | None]
    versions: dict[str, str] = Field(default={})
    revision: str | None = None
    state: State
    history: History
    stages: dict[Name, StageFacts] = Field(default={})
    files: Sums = Field(default={})

    def write(self, folder: Path) -> None:
        """Write it into an export, the last of its files."""
        whole = self.model_copy(update={"files": files.checksums(folder)})
        write_part(folder / LINEAGE, whole, indent=1)

    @property
    def base_digest(self) -> str | None:
        """Return the SHA-256 of the hashes of the base's files; None where these are unknown."""
        found = self.history.base.files
        return None if found is None else checksum(found)

    @property
    def places(self) -> list[tuple[int, str]]:
        """Return the number and stage of each exported link, in the order of their sums. Numbers
        count as `inspect` does, stages in the order in which they ended."""
        order = [term.link for term in self.history.in_order(self.state.terms)]
        links = [term.link for term in self.state.terms]
        return [(order.index(link), self.history.links[link].stage) for link in links]

    @property
    def picture(self) -> str:
        """Return a line for each entry: what it was computed from, its name and kind."""

        def line(entry: Entry) -> str:
            own = self.history.strengths_of(entry.state) if entry.kind == "mix" else {}
            shown = "".join(f" {stage}={value:g}" for stage, value in own.items())
            return f"{' + '.join(entry.parents) or 'base'} --> {entry.key} ({entry.kind}{shown})"

        return "\n".join(map(line, self.history.entries))

    @property
    def table(self) -> list[list[str]]:
        """Return of each stage its name, strength, rows and links."""
        links, strengths = self.history.links.items(), self.history.strengths_of(self.state)
        otherwise = strengths.get(COMBINED, 0)  # of stages that are parts of a combination
        return [
            [
                entry.key,
                f"{strengths.get(entry.key, otherwise):g}",
                entry.training.rows or "",
                " ".join(digest for digest, facts in links if facts.stage == entry.key),
            ]
            for entry in self.history.entries
            if entry.kind in ("stage", "import")
        ]


def lineage_of(
    state: OpenState, base: Path | None, naming: Naming, to: Target, **exported: Any
) -> Lineage:
    """Return where an export comes from: `to` and `exported` are what was asked for, `base` is the
    folder of the base, where it is at hand."""
    history, terms = closure(state), tuple(state.terms(exported["num_links"]))
    own = [e.key for e in history.entries if e.has_config and state.draft is None]
    stages = {
        key: {
            "config": state.at(key).config().model_dump(mode="json", exclude=_OF_A_PLACE),
            "hardware": (state.at(key).result() or {}).get("hardware", {}),
        }
        for key in own
    }
    # Without times, of which a rebuild has others, and files of rows, which a copy may lack.
    known = history.model_dump(mode="json", exclude={"entries": {"__all__": {"kept", "ended"}}})
    known["base"]["model"] = public_name(history.base.model)
    for entry in known["entries"]:
        entry["files"] = {name: sha for name, sha in entry["files"].items() if "/" in name}
    tree = {
        "to": to,
        "exported": exported,
        "naming": vars(naming),
        "versions": versions(),
        "revision": base.name if base is not None and base.parent.name == "snapshots" else None,
        "state": State(base=state.state.base, terms=terms).model_dump(mode="json"),
        **without_places({"history": known, "stages": stages}),
    }
    return Lineage.model_validate_json(json.dumps(tree))


def without_places(value: Any) -> Any:
    """Return a tree with the last part of each absolute path in it, keys included."""
    if isinstance(value, dict):
        return {without_places(key): without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str) and "\n" not in value:
        windows = PureWindowsPath(value)  # knows the separators of all systems
        if windows.is_absolute() or PurePosixPath(value).is_absolute():
            return windows.name
    return value


def read_lineage(path: str | Path) -> Lineage:
    """Read and check the lineage in the folder of an export, or in a file of that kind.

    Raises RunError for none, a damaged one, another format.
    """
    path = Path(path).expanduser()
    return read_part(path / LINEAGE if path.is_dir() else path, Lineage)
