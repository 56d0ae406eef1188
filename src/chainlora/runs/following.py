"""A run on disk, seen by a process that must not write: the first one writes for all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.runs.directory import Progress, RunDirectory


class FollowedDirectory(RunDirectory):
    """A run directory that another process has claimed: read where a run resumes, never written."""

    def open(self, config: RunConfig, *, resume: bool, change: Collection[str] = ()) -> None:
        """Leave it to the first process to refuse and to lock."""

    def begin(
        self, config: RunConfig, base: Mapping[str, Any], *, resume: bool, rows: str | None = None
    ) -> Progress:
        """Read where the first process begins or resumes; call it after that one's `begin`."""
        self._current = self.verify()
        return deepcopy(self._current.position)

    def write_manifest(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def select(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_link(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_best(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_moments(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_model(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def save_result(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""

    def record(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process."""
