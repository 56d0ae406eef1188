"""Experiments: method against method over tasks and seeds, and what can be concluded from them.

    schema.py      what an experiment file says          expansion.py   task × method × grid × seed
    → cells runner.py      run cells, skip what is done          cells.py, worker.py: one cell, in a
    process of its own execution.py   here, in processes, or on Ray         room.py         how many
    at a time choice.py      hyper-parameters by validation only   ray_backend.py the same cells on
    a cluster (extra) records.py     results.jsonl, one line a cell        measure.py     what a run
    cost; flops.py counts statistics.py  pairs, intervals, exact test, Holm    analysis.py
    results → summaries, differences report.py      Markdown, CSV, LaTeX; figures.py,
    report_tables.py; compare.py the same on a user's own data paper.py, paper.yaml: the paper's own
    numbers        progress.py    what a person sees meanwhile power.py       what so few seeds
    cannot decide

See docs/experiments.md.
"""

from chainlora.experiments.compare import compare, comparison
from chainlora.experiments.design.expansion import Cell, expand
from chainlora.experiments.design.schema import Experiment, load_experiment, make_experiment
from chainlora.experiments.execution.progress import experiment_progress
from chainlora.experiments.execution.records import Results, read_results
from chainlora.experiments.execution.runner import Outcome, run_cells, run_experiment
from chainlora.experiments.report.report import Report, report_experiment

__all__ = [
    "Cell",
    "Experiment",
    "Outcome",
    "Report",
    "Results",
    "compare",
    "comparison",
    "expand",
    "experiment_progress",
    "load_experiment",
    "make_experiment",
    "read_results",
    "report_experiment",
    "run_cells",
    "run_experiment",
]
