"""What a report says of a run, read and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chainlora.config.schema import RunConfig
from chainlora.config.stages import split_address
from chainlora.evaluation.stages import BASE, NOW, StageMatrix, stage_matrix
from chainlora.runs.inspection import inspect_run
from chainlora.runs.manifest import Manifest
from chainlora.runs.reading import RunReader
from chainlora.runs.records import Record, of_event, score_names
from chainlora.runs.stages import read_stages, reader_of, readers_of_stages


@dataclass(frozen=True)
class RunFacts:
    """A run, or a saved chain: then without a config, a result and records.

    Of a run of several stages these are those of its last one; `stages` has the same of each, as it
    was trained, and `matrix` their scores, as far as there are any.
    """

    name: str
    reader: RunReader
    manifest: Manifest
    config: RunConfig | None
    result: Record
    records: Sequence[Record]
    inspection: Record
    matrix: StageMatrix | None = None
    is_as_trained: bool = True  # what its records scored is what it is loaded as
    stages: Sequence[RunFacts] = ()

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def parts(self) -> Sequence[RunFacts]:
        """Return what was trained on one data set each: the stages, or the run itself."""
        return self.stages or [self]

    @property
    def steps(self) -> list[Record]:
        return of_event(self.records, "step")

    @property
    def evaluations(self) -> list[Record]:
        return of_event(self.records, "eval")

    @property
    def links(self) -> list[Record]:
        return list(self.inspection["links"])

    @property
    def score(self) -> str | None:
        """Return the metric that its validation is judged by; the loss where there is no other."""
        names = [*score_names(self.evaluations), "loss"]
        return next((name for name in names if any(name in r for r in self.evaluations)), None)


def read_runs(runs: Sequence[str | Path]) -> list[RunFacts]:
    """Read runs and check their files. Raises RunError for one that is damaged or not there."""
    return [_read(run, name) for run, name in zip(runs, run_names(runs), strict=True)]


def _read(run: str | Path, name: str) -> RunFacts:
    inspection = inspect_run(run)
    reader = reader_of(run)
    manifest = reader.manifest()
    return RunFacts(
        name=name,
        reader=reader,
        manifest=manifest,
        config=reader.config() if manifest.has_run else None,
        result=reader.result() or {},
        records=reader.records(),
        inspection=inspection,
        matrix=stage_matrix(run, compute=False) if _has_stages(run, manifest) else None,
        is_as_trained=reader.is_as_trained(),
        stages=_stages(run, manifest),
    )


def _stages(run: str | Path, manifest: Manifest) -> list[RunFacts]:
    """Return the stages that a state has been trained on; nothing for one stage."""
    readers = readers_of_stages(run) if manifest.has_run else {}
    if manifest.stage not in readers:  # before the first stage, which was pruned
        return []
    names = list(readers)[: list(readers).index(manifest.stage) + 1]
    return [_part(name, readers[name]) for name in names] if len(names) > 1 else []


def _part(name: str, reader: RunReader) -> RunFacts:
    config, result = reader.config(), reader.result() or {}
    return RunFacts(name, reader, reader.manifest(), config, result, reader.records(), {})


def _has_stages(run: str | Path, manifest: Manifest) -> bool:
    """Return whether a run went on, or began on stages of another."""
    if not manifest.has_run:
        return False
    ended = read_stages(split_address(run)[0]).names
    return len({*ended, *manifest.columns}) > 1


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """Return the last parts of the paths: as many as tell them apart.

    None begins with ``_``: matplotlib leaves such lines out of a legend.
    """
    parts = [Path(run).resolve().parts for run in runs]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names) and not any(name.startswith("_") for name in names):
            return names
    return [f"({place}) {each[-1]}" for place, each in enumerate(parts, 1)]


def state_names(states: Sequence[str]) -> list[str]:
    """Return states of a run in words: before training, after each stage, now."""
    words = {BASE: "before training", NOW: "now"}
    return [words.get(state, f"after {state}") for state in states]


def is_share(metric: str, value: float) -> bool:
    """Say whether the value of a metric is a share of rows, to be shown as per cent."""
    return metric not in ("loss", "perplexity", "margin") and 0 <= value <= 1
