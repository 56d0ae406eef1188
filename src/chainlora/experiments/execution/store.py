"""The folder of an experiment: which of its cells are done, and what is damaged.

    OUT/experiment.yaml      what was asked
    OUT/cells/<id>/          config.yaml, run/, log.txt, rows.safetensors, result.json or error.txt
    OUT/results.jsonl        one line a cell (records.py), rewritten whenever a cell ends

A result that is torn or edited is set aside, never used and never lost; its cell is computed again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chainlora.config.loading import dump_config, load_config
from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError
from chainlora.experiments.design.expansion import Cell
from chainlora.experiments.execution.cells import (
    CONFIG,
    ERROR,
    RESULT,
    RUN,
    STATUS,
    write_result,
)
from chainlora.experiments.execution.curves import with_curve
from chainlora.experiments.execution.records import result_of
from chainlora.experiments.execution.results import (
    FILE,
    DamageError,
    check_result,
    parse_object,
    read_results,
    read_whole_cells,
)
from chainlora.files import make_folder, write_text

logger = logging.getLogger(__name__)


class Store:
    """The cells of one folder. `known` has results of other folders, by id, that count as done."""

    def __init__(
        self, out: Path, known: Mapping[str, dict[str, Any]] | None = None, curve_points: int = 0
    ) -> None:
        self.out = out
        self._known = dict(known or {})
        self._curve_points = curve_points
        self._results = dict[str, dict[str, Any]]()

    @property
    def results_file(self) -> Path:
        """Where the lines of all cells are gathered."""
        return self.out / FILE

    def directory(self, cell: Cell) -> Path:
        """Return the cell's folder."""
        return self.out / "cells" / cell.id

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result; None if it has none that is whole.

        A result known from elsewhere gets a folder here. Raises RunError for another format.
        """
        if cell.id not in self._results:
            found = self._read(self.directory(cell))
            if found is None and cell.id in self._known:
                found = self._known[cell.id]
                write_result(self.prepare(cell), found)
            if found is None:
                return None
            self._results[cell.id] = found
        return self._results[cell.id]

    def is_done(self, cell: Cell) -> bool:
        """Return whether the cell has a whole result."""
        return self.result(cell) is not None

    def prepare(self, cell: Cell) -> Path:
        """Write the cell's config into its folder and return the folder."""
        directory = self.directory(cell)
        make_folder(directory)
        config = _as_started(with_curve(cell.config, self._curve_points), directory)
        write_text(directory / CONFIG, dump_config(config))
        (directory / ERROR).unlink(missing_ok=True)
        return directory

    def share_done(self, cell: Cell) -> float:
        """Return how far a running cell is, from 0 to 1."""
        try:
            status = json.loads((self.directory(cell) / STATUS).read_text(encoding="utf-8"))
            return float(status["step"] / max(status["num_steps"], 1))
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def adopt_results(self) -> None:
        """Give each cell of ``results.jsonl`` that has no folder one, so that none is lost.

        Committed results come so: without the cells that they were gathered from. A file with torn
        lines is kept beside as ``results.jsonl.damaged``.
        """
        if not self.results_file.is_file():
            return
        damage: list[str] = []
        for line in read_whole_cells(self.results_file, damage.append):
            if not (self.out / "cells" / line["cell"]).is_dir():
                write_result(self.out / "cells" / line["cell"], result_of(line))
        if damage:
            kept = _set_aside(self.results_file)
            logger.warning(
                "damaged lines (%d) are left out of %s, which is rebuilt from the cells; "
                "the old file is kept as %s (first: %s)",
                len(damage),
                self.results_file,
                kept.name,
                damage[0],
            )

    @staticmethod
    def _read(directory: Path) -> dict[str, Any] | None:
        path = directory / RESULT
        if not path.is_file():
            return None
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
            raw = parse_object(str(path), text)
            result = check_result(str(path), raw)
            _check_against_run(directory, raw)
        except DamageError as error:
            kept = _set_aside(path)
            logger.warning("%s; it is kept as %s, the cell is computed again", error.what, kept)
            return None
        return result


def results_by_id(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Return the results of cells in other results files, by id. Raises RunError: damaged."""
    return {line["cell"]: result_of(line) for path in paths for line in read_results(path).cells}


def _as_started(config: RunConfig, directory: Path) -> RunConfig:
    """Return the config with the evaluations that the run in `directory` started with."""
    if not (directory / RUN).exists():
        return config
    try:
        before = load_config(directory / CONFIG).train.eval_every
    except ConfigError:
        return config
    return config.model_copy(
        update={"train": config.train.model_copy(update={"eval_every": before})}
    )


def _set_aside(path: Path) -> Path:
    kept, number = path.with_name(f"{path.name}.damaged"), 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.damaged{number}")
    path.replace(kept)
    return kept


def _check_against_run(directory: Path, result: Mapping[str, Any]) -> None:
    """Raise DamageError where a result of format 1, which has no checksum, is not its run's."""
    path = directory / RUN / RESULT
    if result.get("format") != 1 or result.get("status") != "done" or not path.is_file():
        return
    metrics = parse_object(str(path), path.read_text(encoding="utf-8")).get("metrics", {})
    split, metric = result.get("score_split"), result.get("metric")
    if metrics.get(split, {}).get(metric) != result.get("score"):
        raise DamageError(
            f"a result must be that of its run (got score {result.get('score')!r} in "
            f"{directory / RESULT}, {metrics.get(split, {}).get(metric)!r} in {path})"
        )
