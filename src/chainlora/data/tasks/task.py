"""`Task`: a task file with what is done with its rows, found by name or path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chainlora.config.messages import problems
from chainlora.config.reading import read_tree
from chainlora.data.tasks.rendering import Rendered, render_rows
from chainlora.data.tasks.task_file import TaskFile
from chainlora.errors import ConfigError, nearest


class Task(TaskFile):
    """One task: what its file says, and its rows as text."""

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render rows. Raises DataError that names the first bad one."""
        return render_rows(self, rows)

    def demonstrations(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return solved rows as text to put before a prompt; empty for no rows."""
        return "".join(
            (shown.prompt + shown.completion).strip() + self.separator
            for shown in render_rows(self, rows)
        )


def list_tasks() -> list[str]:
    """Return the names of the shipped tasks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """Load a shipped task by name, or any task file by path.

    Raises:
        ConfigError: unknown name (nearest named), unreadable file, unknown key (nearest named),
        wrong value.
    """
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if str(name_or_path) not in list_tasks():
            raise ConfigError(
                f"task must be a shipped one or a .yaml file (got {str(name_or_path)!r}"
                f"{nearest(str(name_or_path), list_tasks())})"
            )
        path = Path(__file__).parent / f"{name_or_path}.yaml"
    try:
        return Task.model_validate(read_tree(path, "task file"))
    except ValidationError as error:
        raise ConfigError(f"task file {path}: {problems(error, Task)}") from None
