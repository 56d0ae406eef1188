"""The folder of an experiment, and which of its cells are done.

OUT/experiment.yaml      what was asked
OUT/cells/<id>/          config.yaml, run/, log.txt, result.json or error.txt
OUT/results.jsonl        one line a cell (results.py), rewritten whenever a cell ends
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainlora.config.loading import dump_config, load_config
from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError
from chainlora.experiments.expansion import Cell
from chainlora.experiments.measure import with_curve
from chainlora.experiments.results import (
    FILE,
    check_format,
    parse_object,
    results_by_id,
)
from chainlora.experiments.worker import (
    CONFIG,
    ERROR,
    RESULT,
    RUN,
    write_result,
)
from chainlora.files import make_folder, write_text

logger = logging.getLogger(__name__)


class Store:
    """The cells of a folder. Those that its results file has, and those `known`, count as done."""

    def __init__(
        self,
        out: Path | None,
        known: Mapping[str, dict[str, Any]] | None = None,
        curve_points: int = 0,
    ) -> None:
        self.out = out
        self._curve_points = curve_points
        self._results = dict(known or {})
        has_results = out is not None and (out / FILE).is_file() and (out / FILE).stat().st_size
        self._gathered = results_by_id([out / FILE]) if out is not None and has_results else {}
        self._results |= self._gathered

    @property
    def results_file(self) -> Path:
        """Where the lines of all cells are gathered."""
        assert self.out is not None
        return self.out / FILE

    def directory(self, cell: Cell) -> Path:
        """Return the cell's folder."""
        assert self.out is not None
        return self.out / "cells" / cell.id

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result; None if it has none. Raises RunError for another format."""
        if cell.id not in self._results and self.out is not None:
            found = _read(self.directory(cell) / RESULT)
            if found is None:
                return None
            self._results[cell.id] = found
        return self._results.get(cell.id)

    def is_done(self, cell: Cell) -> bool:
        """Return whether the cell has a result."""
        return self.result(cell) is not None

    def prepare(self, cell: Cell) -> Path:
        """Write the cell's config into its folder and return the folder."""
        directory = self.directory(cell)
        make_folder(directory)
        config = _as_started(with_curve(cell.config, self._curve_points), directory)
        write_text(directory / CONFIG, dump_config(config))
        for name in (ERROR, RESULT):  # a result that is not whole
            (directory / name).unlink(missing_ok=True)
        return directory

    def keep_gathered(self) -> None:
        """Give each cell that only the results file has a folder, as the file is rewritten.

        Committed results come so: without the cells that they were gathered from.
        """
        assert self.out is not None
        for name, result in self._gathered.items():
            if not (self.out / "cells" / name / RESULT).is_file():
                write_result(self.out / "cells" / name, result)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = parse_object(path.read_bytes().decode("utf-8", errors="replace"))
    except ValueError as error:
        logger.warning("%s is no result (%s): its cell is computed again", path, error)
        return None
    check_format(str(path), result)
    return result


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
