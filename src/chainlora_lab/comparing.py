"""`compare`: several methods on a user's own config and data, by the same cells and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora import RunConfig
from chainlora.config.schema import with_flat_model
from chainlora.config.staging import make_stages
from chainlora.errors import ConfigError
from chainlora.registry import load_plugins
from chainlora_lab.experiment import Experiment, make_experiment
from chainlora_lab.methods import list_methods, list_ways, load_method, merge_trees
from chainlora_lab.report.report import Report, report_experiment
from chainlora_lab.runner import run_cells
from chainlora_lab.statistics.intervals import scipy_stats

Methods = Sequence[str] | Mapping[str, Mapping[str, Any] | None]

# Keys that make a method what it is, or let it choose among its points: never the config's.
_CHOOSING = ("keep_best", "early_stop", "select_metric")
_OF_METHODS = {"data": (), "chain": ("knots",), "train": _CHOOSING}
# The same of ways to add data sets.
_OF_WAYS = {"": ("beside",), "data": ("replay", "new_rows_only"), "train": _CHOOSING}
# Keys that some presets set, and that all other methods take from the config.
_SHARED = {"schedule", "warmup_steps"}


def compare(
    config: RunConfig | Mapping[str, Any],
    methods: Methods,
    seeds: Sequence[int],
    out: str | Path,
    *,
    learning_rates: Sequence[float] = (),
    extend: int = 0,
    **options: Any,
) -> Report:
    """Run `methods` on a config's model and data at equal epochs or steps, and report.

    The config's `chain` says what the comparison fixes: its first rank is r, the sum of its epochs
    or steps the budget of every method; what else it sets (targets, dropout, …) all methods share.
    Left out are soft knots and what else a preset of `methods` sets, so that each is what its
    preset says: under `knots: auto`, `lora` and `soft` would be one method.

    Every method is scored at its end: `keep_best` and `early_stop` are left out, as they would let
    a method with more points to look at choose among more.

    Args:
        config: the run config; `output` is not used.
        methods: names of presets, or a mapping as `methods` of an experiment file: a name of your
            own to the `preset` (`lora` if it is left out) and the keys that it changes. The first
            is the baseline.
        seeds: training seeds, paired over methods.
        out: folder for cells, results and report; one that holds some of them is resumed.
        learning_rates: tried for each method on validation rows; none: all run with the config's.
        extend: rates added beyond each end of `learning_rates` while the best is that end.
        options: workers, backend and listener, as for `run_cells`.

    Raises:
        ConfigError: unknown method, one alone and no rates to choose, no rows to score, a rate to
            choose without validation rows or without other rows to score, a chain that trains
            nothing, scipy not installed.
        RunError: cells failed (the report of the others is written first).
    """
    experiment = comparison(config, methods, seeds, learning_rates=learning_rates, extend=extend)
    scipy_stats()  # the report needs it: say so before hours are spent
    outcome = run_cells(experiment, Path(out), **options)
    report = report_experiment(outcome.results)
    outcome.check()
    return report


def comparison(
    config: RunConfig | Mapping[str, Any],
    methods: Methods,
    seeds: Sequence[int],
    *,
    learning_rates: Sequence[float] = (),
    extend: int = 0,
) -> Experiment:
    """Return the experiment that `compare` runs."""
    chooses = bool(learning_rates)
    if isinstance(methods, Mapping) and chooses:
        _need_no_rate(methods)
    if isinstance(config, RunConfig):
        tree = _of_run(config, methods, chooses)
    else:
        tree = _of_sequence(config, methods, chooses)
    tree |= {"name": "compare", "seeds": list(seeds)}
    if learning_rates:
        grown, rates = {"train.lr": extend} if extend else {}, {"train.lr": list(learning_rates)}
        tree["tune"] = {"grid": rates, "extend": grown}
        for keys in tree["methods"].values():
            if isinstance(keys.get("grid"), Mapping):  # of the method's own, in place of `tune`'s
                keys["grid"] = rates | keys["grid"]
    experiment = make_experiment(tree)
    if len(experiment.methods) < 2 and not learning_rates:
        raise ConfigError("`compare` needs two methods", ", ".join(methods), "name a rival")
    return experiment


def _need_no_rate(methods: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Raise ConfigError for a method with a rate of its own, which the chosen one would replace."""
    for name, keys in methods.items():
        if (((keys or {}).get("train") or {}).get("lr")) is not None:
            rule = "`learning_rates` are tried for every method"
            raise ConfigError(rule, f"{name} with train.lr of its own", "leave one of them out")


def _of_run(config: RunConfig, methods: Methods, chooses: bool) -> dict[str, Any]:
    """Return description, base, tasks and methods of a comparison on one data set."""
    rows = None if config.start_data == "none" else config.start_data
    begun_on: dict[str, Any] = {"start": config.start, "start_data": rows}
    begun_on["data.replay"] = config.data.replay
    if given := [key for key, value in begun_on.items() if value is not None]:
        raise ConfigError("`compare` trains from the bare base", ", ".join(given), "leave it out")
    if chooses:
        _check_rows(config)
    data = config.model_dump(mode="json", exclude_defaults=True)["data"]
    task = {"data": {key: data[key] for key in ("task", "train") if key in data}}
    name = Path(config.data.task).stem if config.data.task else "data"
    unit = "epochs" if config.chain.epochs else "steps"
    named = {name: _method(name, methods, "lora") for name in methods}
    presets = [str(keys.get("preset", name)) for name, keys in named.items()]
    if config.data.task is None and "in_context" in presets:
        rule = "`in_context` puts demonstrations of a task before each prompt"
        raise ConfigError(rule, "no data.task", "leave in_context out of the methods")
    base, left_out = _base(config, unit, presets)
    said = f"{', '.join(methods)} at equal {unit}, each scored at its end"
    return _described(said, left_out) | {"base": base, "tasks": {name: task}, "methods": named}


def _of_sequence(config: Mapping[str, Any], methods: Methods, chooses: bool) -> dict[str, Any]:
    """Return the same of ways to add the data sets of a config with stages."""
    config = with_flat_model(config)
    if config.get("start") is not None:
        raise ConfigError("`compare` trains from the bare base", "start", "leave it out")
    stages = make_stages({**config, "output": "-"})  # refuses what is wrong in them
    for stage in stages if chooses else ():
        _check_rows(stage.config)
    load_plugins(stages[0].config.plugins)  # which may add ways
    base, left_out = _decided_by_ways(config)
    names = ", ".join(stage.name for stage in stages)
    said = f"{', '.join(methods)} on {names}, one after the other, scored at the end"
    named = {name: _method(name, methods, "combine") for name in methods}
    tasks: dict[str, Any] = {"sequence": {}}
    return _described(said, sorted(left_out)) | {"base": base, "tasks": tasks, "methods": named}


def _described(said: str, left_out: Sequence[str]) -> dict[str, Any]:
    said += f"; of the config left out: {', '.join(left_out)}" * bool(left_out)
    return {"description": f"{said}."}


def _decided_by_ways(config: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return a config with stages without the keys that ways decide instead, and these."""
    base = merge_trees({key: value for key, value in config.items() if key != "output"})
    base["stages"] = [merge_trees(section) for section in base["stages"]]
    left_out = set[str]()
    for tree in (base, *base["stages"]):
        for section, keys in _OF_WAYS.items():
            own = tree if not section else tree.get(section) or {}
            for key in [key for key in keys if key in own]:
                del own[key]
                left_out.add(f"{section}.{key}" if section else key)
    return base, left_out


def _method(name: str, methods: Methods, preset: str) -> dict[str, Any]:
    """Return the keys of a method; one of the user's own is `preset` unless it names another."""
    keys = dict(methods[name] or {}) if isinstance(methods, Mapping) else {}
    is_known = name in list_methods() or name in list_ways()
    return {"preset": preset} | keys if keys and not is_known else keys


def _check_rows(config: RunConfig) -> None:
    """Refuse to choose rates on the rows that methods are scored on."""
    data = config.data
    if not (data.validation and data.test):
        missing = "validation" if not data.validation else "test"
        raise ConfigError(
            "learning rates are chosen on validation rows, and methods then scored on others "
            f"(got no data.{missing}); give data.validation and data.test"
        )


def _base(config: RunConfig, unit: str, methods: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what all methods share, and the keys of the config that methods decide instead."""
    lengths = getattr(config.chain, unit)
    if lengths is None:
        raise ConfigError(
            "`compare` needs a chain that trains",
            "no epochs or steps",
            "e.g. chain: {ranks: [8], epochs: [3]}",
        )
    tree = config.model_dump(mode="json", exclude_defaults=True)
    presets = [load_method(name).keys for name in methods]
    left_out = list[str]()
    for section, keys in _OF_METHODS.items():
        set_by_presets = {key for preset in presets for key in preset.get(section, {})} - _SHARED
        decided = set_by_presets.union(keys).intersection(tree.get(section, {}))
        left_out += sorted(f"{section}.{key}" for key in decided)
        tree[section] = {k: v for k, v in tree.get(section, {}).items() if k not in decided}
    for key in ("ranks", unit):
        tree["chain"].pop(key, None)
    alpha = config.chain.alpha
    tree["chain"]["alpha"] = alpha if isinstance(alpha, float) else alpha[0]
    tree["recipe"] = {"rank": config.chain.ranks[0], unit: sum(lengths)}
    for key in ("output", "start_data"):  # of a run: cells have their own
        tree.pop(key, None)
    return tree, left_out
