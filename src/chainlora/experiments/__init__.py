"""Experiments: method against method over tasks and seeds, and what can be concluded from them.

    schema.py      an experiment's file             expansion.py   its cells
    choice.py      hyper-parameters, on validation  methods/       presets, one small file each
    plan.py        what a run could find            compare.py     on a user's own data and config
    runner.py      run the cells: session.py knows what is done and what is next, worker.py runs a
                   cell in a process of its own, measure.py says what it reached
    results.py     the lines of results.jsonl, written and read
    statistics/    tests, intervals, verdicts and power
    report/        tables, figures and text from a results file alone

See docs/experiments.md. Files to run are in examples/experiments, results in benchmarks/paper.
"""

from chainlora.experiments.compare import compare, comparison
from chainlora.experiments.expansion import expand
from chainlora.experiments.plan import plan_experiment
from chainlora.experiments.progress import experiment_progress
from chainlora.experiments.report.report import report_experiment
from chainlora.experiments.results import read_results
from chainlora.experiments.runner import run_cells, run_experiment
from chainlora.experiments.schema import load_experiment, make_experiment

__all__ = [
    "compare",
    "comparison",
    "expand",
    "experiment_progress",
    "load_experiment",
    "make_experiment",
    "plan_experiment",
    "read_results",
    "report_experiment",
    "run_cells",
    "run_experiment",
]
