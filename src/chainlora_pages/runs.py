"""The facts of a run that a report shows, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chainlora.config.schema import RunConfig
from chainlora.evaluation.stage_scores import StageMatrix, stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.draft import Progress
from chainlora.runs.entries import BASE
from chainlora.runs.inspection import inspect_run
from chainlora.runs.records import Record, of_event, score_names
from chainlora.runs.state import OpenState


@dataclass(frozen=True)
class RunFacts:
    """A state of a run, or a saved chain, which has no config, result and records.

    For a run of several stages, config, result and records are those of its last stage; a
    combination has no result and records. `stages` has the facts of each stage as it was trained,
    and `matrix` their scores, if there are any.
    """

    name: str
    state: OpenState
    config: RunConfig | None
    result: Record
    records: Sequence[Record]
    inspection: Record
    matrix: StageMatrix | None = None
    stages: Sequence[RunFacts] = ()

    @property
    def path(self) -> Path:
        return self.state.run

    @property
    def parts(self) -> Sequence[RunFacts]:
        """Return the stages, or the run itself if that is its only stage."""
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
    def validation(self) -> Mapping[str, float]:
        """Return the final metrics of the validation rows, if they were measured."""
        return dict(self.result.get("metrics", {}).get("validation", {}))

    @property
    def score(self) -> str | None:
        """Return the main validation metric; the loss if there is no other."""
        names = [*score_names(self.evaluations), "loss"]
        return next((name for name in names if any(name in r for r in self.evaluations)), None)

    @property
    def position(self) -> Progress:
        if self.state.draft is not None:
            return self.state.draft.position
        keys = {"step": "steps", "tokens": "tokens", "scored_tokens": "scored_tokens"}
        counts = {name: self.result.get(key, 0) for name, key in keys.items()}
        return Progress(**counts, seconds=self.result.get("wall_s", 0.0))


def read_runs(runs: Sequence[str | Path]) -> list[RunFacts]:
    """Read runs and check their files. Raises RunError for a damaged or missing run."""
    named = zip(runs, run_names(runs), strict=True)
    return [read_state(open_run(run), name) for run, name in named]


def read_state(state: OpenState, name: str) -> RunFacts:
    """Read the facts of a state and check its files."""
    facts = _part(state, name)
    parts = [entry for entry in state.lineage if entry.has_config]
    is_one = len({*state.columns, *(entry.key for entry in parts)}) < 2
    stages = [_part(state.at(entry.key), entry.key) for entry in parts]
    if state.draft is not None and stages:
        stages[-1] = replace(facts, name=state.key)
    is_plain = is_one and not state.is_combined  # its scores are records
    return replace(
        facts,
        inspection=inspect_run(state),
        matrix=None if is_plain or not state.has_run else stage_matrix(state, compute=False),
        stages=stages if len(stages) > 1 or state.is_combined else (),
    )


def _part(state: OpenState, name: str) -> RunFacts:
    is_trained = state.entry is not None and state.entry.kind == "stage"
    config = state.config() if state.has_run else None
    result = (state.result() or {}) if is_trained else {}
    return RunFacts(name, state, config, result, state.records() if is_trained else [], {})


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different.

    No name begins with ``_``, because matplotlib omits such lines from a legend.
    """
    paths = [Path(run).resolve().parts for run in runs]
    for count in range(1, max(map(len, paths), default=1)):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names) and not any(name.startswith("_") for name in names):
            return names
    return [f"({place}) {parts[-1]}" for place, parts in enumerate(paths, 1)]


def state_names(states: Sequence[str]) -> list[str]:
    """Return labels for the states of a run: before training, after each stage, combined."""
    words = {BASE: "before training"}
    words |= {state: state for state in states if state.startswith("after-")}  # combinations
    return [words.get(state, f"after {state}") for state in states]


def is_share(metric: str, value: float) -> bool:
    """Return whether a metric is a share of rows, which is shown in per cent."""
    return metric not in ("loss", "perplexity", "margin") and 0 <= value <= 1


def score_text(name: str, value: float) -> str:
    """Format the value of a metric; shares in per cent."""
    return together(f"{100 * value:.1f} %") if is_share(name, value) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format a time, with spaces that never break over two lines."""
    if seconds < 60:
        return together(f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return together(f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s")


def together(text: str) -> str:
    """Replace spaces by no-break spaces."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")
