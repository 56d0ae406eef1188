"""Whether a folder can become a run's, and whether there is a run in it to resume."""

from __future__ import annotations

from chainlora import files
from chainlora.errors import RunError
from chainlora.runs.reading import RunReader

_BEFORE_THE_MANIFEST = {".lock", "config.yaml", "links"}


def refuse_if_taken(run: RunReader) -> None:
    """Raise RunError where something else than an empty directory is."""
    if not run.path.is_dir():
        return
    with files.reported(run.path, "read"):
        entries = {entry.name for entry in run.path.iterdir()}
    if entries <= {".lock"}:
        return
    what, remedy = (
        ("holds a run", "pass --resume to resume it, or ")
        if run.exists
        else ("is not empty and not a whole run", "")
    )
    raise RunError(
        f"`output` must be a new or empty directory (got {run.path}, which {what}); "
        f"{remedy}choose another output"
    )


def refuse_if_nothing(run: RunReader) -> None:
    """Raise RunError where there is nothing to resume.

    A run that was killed before it had a manifest starts over: nothing in it is worth keeping.
    """
    if not run.path.is_dir():
        raise RunError(
            f"--resume needs a run directory (got {run.path}, which does not exist); check "
            "`output`, or leave --resume out to start"
        )
    names = {entry.name for entry in run.path.iterdir() if not files.is_scratch(entry.name)}
    if not run.exists and not names <= _BEFORE_THE_MANIFEST:
        refuse_if_taken(run)
