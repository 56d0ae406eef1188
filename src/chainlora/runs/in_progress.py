"""A run that a process goes on with: what it needs of the state that it began on or resumes from.

`runs.directory` writes such states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.runs.links import read_checkpoint, read_partial
from chainlora.runs.manifest import DAMAGED, REFERENCE, Manifest, Progress
from chainlora.runs.reading import RunReader, check_base


class RunInProgress(RunReader):
    """One run on disk, and the state of it that this process is at."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._current: Manifest | None = None

    @property
    def current(self) -> Manifest:
        """The state that this process has read or written last. There is one once it began."""
        assert self._current is not None
        return self._current

    def check_base_files(self, found: Mapping[str, str]) -> None:
        """Refuse to resume on another base than the run's, before it is loaded."""
        if self._current is not None:
            check_base(self._current.base, self.path, files=found)

    def has_checkpoint(self, progress: Progress) -> bool:
        """Whether there is a checkpoint of exactly this progress."""
        found = self.current.checkpoint
        here = (progress.step, progress.link)
        return found is not None and (found.progress.step, found.progress.link) == here

    def load_checkpoint(
        self, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the live link's and the optimizer's state at this progress, None at a knot."""
        found = self.current.checkpoint
        if found is None or not self.has_checkpoint(progress):
            return None
        return read_checkpoint(self / found.directory)

    def load_moments(self) -> dict[str, Tensor]:
        """Read the optimizer state that the last link's knot kept."""
        assert self.current.moments is not None
        return load_file(self / self.current.moments)

    def load_reference(self) -> dict[str, Tensor] | None:
        """Read what the pairs of each split scored before the first step; None where it is due."""
        if REFERENCE not in self.current.files and not self.current.position.step:
            return None
        self.check_files(self.current, REFERENCE)
        with safe_open(self / REFERENCE, "pt") as file:
            found = file.metadata()
        if found != begun_on(self.current):
            raise RunError(
                f"{REFERENCE} must be of the rows and the state that its run began on",
                f"those of {found} in {self.path}",
                DAMAGED,
            )
        return load_file(self / REFERENCE)

    def load_best(self, index: int, config: LinkConfig, directory: str) -> Link:
        """Read the partial link of the best point."""
        self.check_files(self.current, directory)
        return read_partial(self / directory, index, config)


def begun_on(manifest: Manifest) -> dict[str, str]:
    """Return what a reference is bound to: under one key, since safetensors orders them anyhow."""
    return {"begun_on": f"rows {manifest.rows}, state {manifest.started_on}"}
