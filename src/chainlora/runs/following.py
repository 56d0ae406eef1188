"""A run on disk, seen by a process that must not write: the first one writes for all."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from chainlora.runs.directory import RunDirectory
from chainlora.runs.manifest import Progress


class FollowedDirectory(RunDirectory):
    """A run directory that another process has claimed: read where a run resumes, never written."""

    def begin(self, *_: Any, **__: Any) -> Progress:
        """Read where the first process begins or resumes; call it after that one's `begin`."""
        self._current = self.verify()
        return deepcopy(self.current.position)

    def _leave_to_the_first(self, *_: Any, **__: Any) -> None:
        """Leave it to the first process to refuse, to lock and to write."""

    open = _leave_to_the_first
    write_manifest = select = record = _leave_to_the_first
    save_link = save_best = save_moments = save_checkpoint = _leave_to_the_first
    save_model = save_result = save_reference = _leave_to_the_first
