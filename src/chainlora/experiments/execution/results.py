"""Reading a results file: every line checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chainlora.config.messages import problems
from chainlora.errors import RunError
from chainlora.experiments.execution.checksums import is_whole
from chainlora.experiments.execution.digests import definition
from chainlora.experiments.execution.lines import Line, model_of
from chainlora.experiments.execution.migration import migrate
from chainlora.experiments.execution.records import FORMAT, result_of

FILE = "results.jsonl"
_REBUILD = "run `chainlora experiment run` on its folder again: it is rebuilt from the cells"


@dataclass(frozen=True)
class Results:
    """What a results file holds."""

    experiment: dict[str, Any]
    choices: list[dict[str, Any]]
    cells: list[dict[str, Any]]

    @property
    def finals(self) -> list[dict[str, Any]]:
        """Cells of the final phase that trained to their end."""
        return [
            cell for cell in self.cells if cell["phase"] == "final" and cell["status"] == "done"
        ]


def read_results(path: str | Path) -> Results:
    """Read a results file, or ``results.jsonl`` in a folder.

    Raises RunError: no such file, a line that is not whole, or a format of another version.
    """
    path = results_file(path)
    lines = _read_lines(path, on_damage=None)
    heads = [line for line in lines if line["kind"] == "experiment"]
    if len(heads) != 1:
        raise RunError(
            f"results file must have one line of kind experiment (got {len(heads)} in {path}); "
            f"{_REBUILD}"
        )
    return Results(heads[0], _of_kind(lines, "choice"), _of_kind(lines, "cell"))


def read_whole_cells(path: Path, on_damage: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the cell lines that are whole, and report the others to `on_damage`.

    Raises RunError for a format of another version: that is no damage.
    """
    return _of_kind(_read_lines(path, on_damage), "cell")


def results_file(path: str | Path) -> Path:
    """Return the results file that a path means: itself, or the one in that folder."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _read_lines(path: Path, on_damage: Callable[[str], None] | None) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunError(
            f"results file must be readable (got {path}: {error.strerror}); it is what "
            "`chainlora experiment run` writes"
        ) from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            lines.append(_read_line(f"{path} line {number}", line))
        except DamageError as error:
            if on_damage is None:
                raise
            on_damage(error.what)
    return lines


class DamageError(RunError):
    """A result that is torn, or no longer what its checksum says; `what` is it without a remedy."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; {_REBUILD}")
        self.what = what


def _read_line(where: str, text: str) -> dict[str, Any]:
    line = parse_object(where, text)
    model = model_of(line)
    if model is None:
        raise DamageError(
            "a line of results must be of kind experiment, choice or cell "
            f"(got {line.get('kind')!r} in {where})"
        )
    if line["kind"] == "cell":
        labels = {key: value for key, value in line.items() if key not in result_of(line)}
        line = labels | check_result(where, result_of(line))
    _check(where, line, model)
    return line


def parse_object(where: str, text: str) -> dict[str, Any]:
    """Parse one JSON object. Raises DamageError: it is none."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates can be read, not written
    except (ValueError, RecursionError) as error:
        raise DamageError(f"results must hold whole JSON objects (got {where}: {error})") from None
    if not isinstance(value, dict):
        raise DamageError(f"results must hold JSON objects (got {type(value).__name__} in {where})")
    return value


def check_result(where: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result in today's format, verified.

    Raises RunError: another format. Raises DamageError: not what its checksum says.
    """
    if result.get("format") not in (1, FORMAT) or result.get("format") is True:
        raise RunError(
            f"results must be of format 1 or {FORMAT} (got {result.get('format')!r} in {where}); "
            "read them with the version of chainlora that wrote them, or run the experiment again"
        )
    moved = migrate(result)
    if not is_whole(moved):
        raise DamageError(
            f"a result must be what its checksum says (got other content in {where}: it was "
            "edited or damaged)"
        )
    return moved


def _check(where: str, line: Mapping[str, Any], model: type[Line]) -> None:
    if line.get("format") not in (1, FORMAT):
        check_result(where, line)
    try:
        model.model_validate(line)
    except ValidationError as error:
        raise DamageError(
            f"a line of results must have what reports read ({problems(error, model)}; got {where})"
        ) from None


def check_alike(cells: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where cells of the same settings are of different rows or weights.

    A cell's id knows places by name only; what was found there is in its digests (missing in the
    oldest results). Digests of different definitions cannot be compared and are not.
    """
    first: dict[tuple[str, str, str], tuple[str, str]] = {}
    for cell in cells:
        name = f"{cell['task']} {cell['method']} seed {cell['seed']}"
        for field, what, settings in _identities(cell):
            found = cell.get(field)
            if found is None:
                continue
            key = (field, definition(found), settings)
            before, of = first.setdefault(key, (found, name))
            if found != before:
                raise RunError(
                    f"cells of one experiment must be of the same {what} (got {before} in {of}, "
                    f"{found} in {name}): they have changed in between; use a new output folder, "
                    "without --reuse"
                )


def _identities(cell: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (field, what it names, the settings that decide it)."""
    config = cell["config"]
    cuts = ("max_length", "truncation")  # rows are cut after they are digested
    data = {k: v for k, v in config.get("data", {}).items() if k not in cuts}
    model = {"model": config.get("model"), "dtype": config.get("train", {}).get("dtype")}
    return [
        ("rows_digest", "rows", json.dumps(data, sort_keys=True)),
        ("base_fingerprint", "base model", json.dumps(model, sort_keys=True)),
    ]


def definitions_mixed(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the digests (`rows_digest`, …) that cells have by several definitions, or lack."""
    found: dict[tuple[str, str], set[str | None]] = {}
    for cell in cells:
        for field, _, settings in _identities(cell):
            value = cell.get(field)
            version = None if value is None else definition(value)
            found.setdefault((field, settings), set()).add(version)
    return sorted({field for (field, _), versions in found.items() if len(versions) > 1})


def _of_kind(lines: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]
