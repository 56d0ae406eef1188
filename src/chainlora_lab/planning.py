"""Before a run is paid for: its cells, what they could decide, which differences they could find.

The spread of paired differences is not known beforehand; it is taken from results that are there,
of a first few seeds or of an experiment like this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chainlora.errors import ConfigError
from chainlora_lab.experiment import OVERALL, Experiment, load_experiment
from chainlora_lab.report.comparisons import compare_all
from chainlora_lab.report.values import digits
from chainlora_lab.results import Results
from chainlora_lab.session import Session
from chainlora_lab.statistics.pairs import LEVEL, POWER, detectable, least_pairs, pairs_needed
from chainlora_pages import Table, number, table_of


@dataclass(frozen=True)
class Power:
    """What a comparison could find, from the spread `sd` of `num_measured` paired differences.

    `detectable` is the difference that the pairs planned find with 80 % power; `needed` the pairs
    that a difference asked for needs (None where none was, or where it needs too many).
    """

    task: str
    method: str
    rival: str
    metric: str
    sd: float
    num_measured: int
    num_pairs: int
    detectable: float
    needed: int | None


@dataclass(frozen=True)
class Plan:
    """What a run would do and could say."""

    num_cells: int
    num_done: int
    notes: list[str]
    power: list[Power]

    def table(self) -> Table:
        """Return the power of each comparison as a table."""
        rows = [
            {
                "task": p.task,
                "pair": f"{p.method} − {p.rival}",
                "sd measured": f"{number(p.sd, digits(p.metric))} (of {p.num_measured})",
                "pairs planned": str(p.num_pairs),
                "detectable": number(p.detectable, digits(p.metric)),
                "pairs needed": "–" if p.needed is None else str(p.needed),
            }
            for p in self.power
        ]
        note = (
            f"Detectable: the mean difference that is found with {POWER:.0%} power at {LEVEL:.0%}, "
            "corrected for all comparisons planned. The sd of a few pairs is itself uncertain."
        )
        return table_of("Power", rows, note)


def plan_experiment(
    path: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    reuse: Sequence[str | Path] = (),
    difference: float | None = None,
) -> Plan:
    """Return what a run of an experiment file would do and could say; nothing is run or written.

    Args:
        path: the experiment file.
        out: folder of an earlier run, whose results count as measured.
        overrides: as for `run_experiment`.
        reuse: results files that count as measured and as done.
        difference: a difference (points of a score, or a loss) to size the experiment for.

    Raises:
        ConfigError, DataError, RunError: as for `run_experiment`; scipy not installed.
    """
    experiment = load_experiment(path, overrides)
    session = Session(experiment, None if out is None else Path(out), reuse)
    num_done, num_cells = session.num_done()
    power = measured_power(session.results(), difference)
    return Plan(num_cells, num_done, _notes(experiment), power)


def measured_power(results: Results, difference: float | None = None) -> list[Power]:
    """Return the power of each comparison whose spread has been measured on two pairs or more."""
    found = []
    for each in compare_all(results):
        sd, num_measured = each.difference.sd, each.difference.num_pairs
        if num_measured < 2:
            continue
        least = detectable(sd, each.num_planned, each.num_comparisons)
        needed = pairs_needed(sd, difference or 0.0, each.num_comparisons)
        what = (each.task, each.method, each.rival, each.metric)
        found.append(Power(*what, sd, num_measured, each.num_planned, least, needed))
    return found


# --- what a run says at its start ---


def run_notes(experiment: Experiment, results: Results) -> list[str]:
    """Return what a run says at its start: what cannot be decided, and what could be found."""
    try:
        power = measured_power(results) if results.finals else []
    except ConfigError as error:  # without scipy a run still runs
        return [*_notes(experiment), str(error)]
    if experiment.primary is not None:
        power = [each for each in power if (each.method, each.rival) == experiment.primary]
    foremost = [each for each in power if each.task == OVERALL] or power
    return [*_notes(experiment), *map(_sentence, foremost)]


def _notes(experiment: Experiment) -> list[str]:
    """Return what the size and the seeds of an experiment say, before anything is run."""
    found = [undecidable(experiment), _tuned_on_compared_seeds(experiment)]
    return [note for note in found if note is not None]


def undecidable(experiment: Experiment) -> str | None:
    """Return a sentence where so few seeds and so many comparisons can decide nothing."""
    num_seeds, num_tasks = len(experiment.seeds), len(experiment.tasks)
    alone = experiment.primary is not None and num_tasks == 1
    together = num_tasks * (len(experiment.pairs) - alone)  # corrected on the tasks one by one
    by_task = least_pairs(max(1, together))
    if num_seeds >= by_task:
        return None
    num_pairs = together // num_tasks
    pooled = num_tasks > 1 and num_seeds * num_tasks >= least_pairs(num_pairs)
    place = "on any one task (over all of them together they may)" if pooled else "anything"
    can_primary = experiment.primary and num_seeds * num_tasks >= least_pairs(1)
    beside = " beside the primary comparison" if can_primary else ""
    seeds = f"{num_seeds} seed{'s' * (num_seeds != 1)}"
    of = f"{together or 1} comparison{'s' * (together > 1)}"
    return (
        f"{seeds} cannot decide {place}{beside}, however clear the results: an exact test "
        f"corrected for {of} needs {by_task} for {LEVEL:.0%}"
    )


def _tuned_on_compared_seeds(experiment: Experiment) -> str | None:
    """Return a sentence where seeds that choose hyper-parameters are compared as well."""
    grids = [experiment.grid(method) for method in experiment.methods]
    shared = [str(seed) for seed in experiment.tuning_seeds if seed in experiment.seeds]
    if not shared or all(len(values) < 2 for grid in grids for values in grid.values()):
        return None
    return (
        f"hyper-parameters are chosen by seeds that are compared too ({', '.join(shared)}); "
        "`tune.seeds` of their own keep the comparison free of that choice"
    )


def _sentence(power: Power) -> str:
    places = digits(power.metric)
    what = f"{power.method} − {power.rival} on {power.task}"
    if math.isinf(power.detectable):
        return f"{what}: {power.num_pairs} pairs cannot decide it, whatever they show"
    return (
        f"{what}: {power.num_pairs} pairs find a difference of "
        f"{number(power.detectable, places)} with {POWER:.0%} power (sd "
        f"{number(power.sd, places)}, measured on {power.num_measured} pairs)"
    )
