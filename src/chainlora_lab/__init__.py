"""The lab: methods compared over tasks and seeds, and what can be concluded from them.

    experiment.py  an experiment's file             expansion.py   its cells
    choice.py      hyper-parameters, on validation  methods/       presets, one small file each
    planning.py    what a run could find            comparing.py   on a user's own data and config
    protocol.py    the paper's tasks (tasks/), and the rows that a cell draws of one
    runner.py      runs the cells: session.py knows what is done and what is next, worker.py runs a
                   cell in a process of its own, measure.py says what it reached, loops.py
                   trains what chainlora does not
    sequences.py   data sets one after the other, learned in ways: those of chainlora, and two
                   tables of names in ways/; in_turn.py trains one LoRA through all of them
    results.py     the lines of results.jsonl, written and read
    statistics/    tests, intervals, verdicts and power
    report/        tables, figures and text from a results file alone
    cli.py         the verbs `compare` and `experiment`

But for what trains and merges it uses public names of chainlora alone, which never imports it
(tests/test_architecture.py).
See docs/experiments.md. Files to run are in examples/experiments, results in benchmarks/paper.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {
    "compare": "chainlora_lab.comparing",
    "comparison": "chainlora_lab.comparing",
    "expand": "chainlora_lab.expansion",
    "plan_experiment": "chainlora_lab.planning",
    "experiment_progress": "chainlora_lab.tally",
    "report_experiment": "chainlora_lab.report.report",
    "read_results": "chainlora_lab.results",
    "run_cells": "chainlora_lab.runner",
    "run_experiment": "chainlora_lab.runner",
    "load_experiment": "chainlora_lab.experiment",
    "make_experiment": "chainlora_lab.experiment",
}

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from chainlora_lab.comparing import compare as compare
    from chainlora_lab.comparing import comparison as comparison
    from chainlora_lab.expansion import expand as expand
    from chainlora_lab.experiment import load_experiment as load_experiment
    from chainlora_lab.experiment import make_experiment as make_experiment
    from chainlora_lab.planning import plan_experiment as plan_experiment
    from chainlora_lab.report.report import report_experiment as report_experiment
    from chainlora_lab.results import read_results as read_results
    from chainlora_lab.runner import run_cells as run_cells
    from chainlora_lab.runner import run_experiment as run_experiment
    from chainlora_lab.tally import experiment_progress as experiment_progress


def __getattr__(name: str) -> Any:
    """Return a public name on first use, so that the command line reads the verbs quickly."""
    if name not in _WHERE:
        raise AttributeError(f"module 'chainlora_lab' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
