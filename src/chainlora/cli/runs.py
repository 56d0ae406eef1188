"""What verbs check of a run directory before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from chainlora.errors import RunError


def need_run(run: str) -> None:
    """Raise RunError for what is not a run directory."""
    folder = Path(run)
    if (folder / "chain.json").is_file():
        return
    if (folder / "links").is_dir():
        raise RunError(
            f"a run directory must hold chain.json (got none in {run}); the run directory is "
            "incomplete: copy it whole, or start over"
        )
    what = "holds no chain.json" if folder.exists() else "does not exist"
    raise RunError(
        f"RUN must be a run directory (got {run}, which {what}); it is the `output` of chainlora "
        "train"
    )


def check_run_or_model(run_or_model: str, links: int | None) -> None:
    """Raise RunError for half a run directory, or for --links of what is no run."""
    if (Path(run_or_model) / "links").is_dir():
        need_run(run_or_model)
    elif links is not None and not is_run(run_or_model):
        raise RunError(
            f"--links needs a run directory (got {run_or_model}, which is not one); leave --links "
            "out"
        )


def is_run(path: str) -> bool:
    """Say whether a path is a run directory."""
    return (Path(path) / "chain.json").is_file()
