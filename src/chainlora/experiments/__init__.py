"""Experiments: method against method over tasks and seeds, and what can be concluded from them.

    runner.py      run the cells of an experiment      plan.py     what a run could find, beforehand
    compare.py     the same on a user's own data and config

    design/        what an experiment asks: its file, its cells, the choice of hyper-parameters
    methods/       methods as presets, one small file each
    execution/     how cells are computed, recorded and read back
    statistics/    tests, intervals, verdicts and power
    report/        tables, figures and text from a results file alone

See docs/experiments.md. Files to run are in examples/experiments, results in benchmarks/paper.
"""

from chainlora.experiments.compare import compare, comparison
from chainlora.experiments.design.expansion import Cell, expand
from chainlora.experiments.design.loading import load_experiment, make_experiment
from chainlora.experiments.design.schema import Experiment
from chainlora.experiments.execution.progress import experiment_progress
from chainlora.experiments.execution.results import Results, read_results
from chainlora.experiments.execution.rows import read_rows
from chainlora.experiments.plan import Plan, plan_experiment
from chainlora.experiments.report.report import Report, report_experiment
from chainlora.experiments.runner import Outcome, run_cells, run_experiment

__all__ = [
    "Cell",
    "Experiment",
    "Outcome",
    "Plan",
    "Report",
    "Results",
    "compare",
    "comparison",
    "expand",
    "experiment_progress",
    "load_experiment",
    "make_experiment",
    "plan_experiment",
    "read_results",
    "read_rows",
    "report_experiment",
    "run_cells",
    "run_experiment",
]
