"""`compare`: several methods on a user's own config and data in one go, by the same cells and
statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError
from chainlora.experiments.design.schema import Experiment, make_experiment
from chainlora.experiments.execution.runner import Listener, raise_on_failure, run_cells
from chainlora.experiments.execution.worker_pool import Workers
from chainlora.experiments.report.report import Report, report_experiment


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    learning_rates: Sequence[float] = (),
    baseline: str | None = None,
    workers: Workers = 1,
    backend: str = "local",
    listener: Listener | None = None,
) -> Report:
    """Run `methods` on a config's model and data at equal epochs or steps, and report.

    The config's `chain` says what the comparison fixes: its first rank is r, the sum of its epochs
    or steps the budget of every method; what else it sets (targets, dropout, …) all methods share.

    Every method is scored at its end: `keep_best` and `early_stop` are left out, as they would let
    a method with more points to look at choose among more.

    Args:
        config: the run config; `output` is not used. methods: names of presets; the first is the
        baseline unless `baseline` names one. seeds: training seeds, paired over methods. out:
        folder for cells, results and report; one that holds some of them is gone on with.
        learning_rates: tried for each method on validation rows; none: all run with the config's
        own rate. workers, backend, listener: as for `run_experiment`.

    Raises:
        ConfigError: unknown method, no rows to score, a rate to choose without validation rows or
        without other rows
            to score, a chain that trains nothing.
        RunError: cells failed (the report of the others is written first).
    """
    experiment = comparison(
        config, methods, seeds, learning_rates=learning_rates, baseline=baseline
    )
    outcome = run_cells(experiment, Path(out), workers=workers, backend=backend, listener=listener)
    report = report_experiment(outcome.results)
    raise_on_failure(outcome)
    return report


def comparison(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    learning_rates: Sequence[float] = (),
    baseline: str | None = None,
) -> Experiment:
    """Return the experiment that `compare` runs."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    chain, lengths = tree.get("chain", {}), config.chain.epochs or config.chain.steps
    if lengths is None:
        raise ConfigError(
            "`compare` needs a chain that trains (got no epochs or steps); e.g. chain: {ranks: "
            "[8], "
            "epochs: [3]}"
        )
    if (
        learning_rates
        and config.data.train is not None
        and not (config.data.validation and config.data.test)
    ):
        missing = "validation" if not config.data.validation else "test"
        raise ConfigError(
            "learning rates are chosen on validation rows, and methods then scored on others "
            "(got no "
            f"data.{missing}); give data.validation and data.test"
        )
    train = {
        k: v
        for k, v in tree.get("train", {}).items()
        if k not in ("keep_best", "early_stop", "select_metric")
    }
    alpha = config.chain.alpha if isinstance(config.chain.alpha, float) else config.chain.alpha[0]
    base: dict[str, Any] = {
        "model": config.model,
        "data": tree["data"],
        "train": train,
        "recipe": {
            "rank": config.chain.ranks[0],
            "epochs" if config.chain.epochs else "steps": sum(lengths),
        },
        "chain": {k: v for k, v in chain.items() if k not in ("ranks", "epochs", "steps")}
        | {"alpha": alpha},
    }
    name = Path(config.data.task).stem if config.data.task else "data"
    return make_experiment(
        {
            "name": "compare",
            "description": f"{', '.join(methods)} at equal "
            f"{'epochs' if config.chain.epochs else 'steps'}, each scored at its end "
            "(keep_best and early_stop left out).",
            "base": base,
            "tasks": {
                name: {
                    "data": {
                        key: tree["data"][key] for key in ("task", "train") if key in tree["data"]
                    }
                }
            },
            "methods": list(methods),
            "seeds": list(seeds),
            "baseline": baseline,
            "tune": {"grid": {"train.lr": list(learning_rates)} if learning_rates else {}},
        }
    )
