"""Rebuild an export from its lineage: the same bits from ``lineage.json``, the rows and the base.

The entries of the lineage are declared in a new run, and built. Each must get the state that it
had. Rows of the start are read or written again; they are not compared, but the states that are
computed from them are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from chainlora.config.data import StartData
from chainlora.config.reading import leave_out_helpers, make_config, set_key
from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage
from chainlora.config.template_names import refuse_paths
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import history_of_start, stage_entry
from chainlora.runs.history import START, Base, Declared, Entry, History, Unbuilt
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.lineage import Lineage
from chainlora.runs.loading_start import NOTHING
from chainlora.runs.locks import writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base
from chainlora.runs.paths import exists_in
from chainlora.runs.resuming import compare, source_digests
from chainlora.training.building import carry_out
from chainlora.training.events import Listener
from chainlora.training.placement import StagePlan
from chainlora.training.plan import Plan
from chainlora.training.processes import num_launched
from chainlora.training.refusing import check_due, naming
from chainlora.training.result import TrainResult

_PLACES = {"output", "model", "task", "train", "validation", "test"}
_PLACES |= {"plugins", "trackers"}  # never taken from a lineage: the user names them again


def stages_of(lineage: Lineage, overrides: Sequence[tuple[str, Any]] = ()) -> list[Stage]:
    """Return the stages of a lineage; check their rows and the base.

    `overrides` name the places of the run, rows and base: ``output``, ``model``, ``data.train`` of
    all stages, ``stages.NAME.data.train`` of one.
    """
    configs = _configs(lineage, overrides)
    stages = []
    for entry in lineage.history.entries:
        _need_rebuildable(lineage, entry)
        if entry.kind == "stage":
            stage = Stage(entry.key, make_config(configs[entry.key]), after=entry.parent)
            with naming(stage):
                _check_rows(entry, stage)
            stages.append(stage)
    if not stages or stages[0].config.output is None:
        rule = "a lineage is trained again by stages, into a new folder"
        raise ConfigError(rule, "none", "add --output" if stages else "export another state")
    start = lineage.history.find(START)
    from_files = start is not None and start.training.sources
    if from_files and not isinstance(stages[0].config.start_data, StartData):
        rule = "Cannot train a lineage again without the stage that names the rows of the start"
        raise RunError(rule, f"{stages[0].name}, its first one", "export a state with that stage")
    for model in {stage.config.model for stage in stages}:
        check_base(lineage.history.base, "the lineage", files=base_files(resolve_model(model)))
    return stages


def _configs(lineage: Lineage, overrides: Sequence[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the config of each stage of a lineage, with the places in `overrides`."""
    trees: dict[str, dict[str, Any]] = {}
    for name, facts in lineage.stages.items():
        refuse_paths(facts.config, Path("lineage.json"))  # a lineage may come from somebody else
        left_out = ("output", "start")
        trees[name] = {k: deepcopy(v) for k, v in facts.config.items() if k not in left_out}
        leave_out_helpers(trees[name], "lineage.json")
    for key, value in overrides:
        first, _, rest = key.partition(".")
        name, _, inner = rest.partition(".") if first == "stages" else ("", "", key)
        section, _, last = inner.rpartition(".")
        if last not in _PLACES or (name and name not in trees):
            rule = "only places may change when a lineage is trained again"
            remedy = f"leave it out; places are {', '.join(sorted(_PLACES))} of {', '.join(trees)}"
            raise ConfigError(rule, key, remedy)
        for tree in [trees[name]] if name else trees.values():
            # a key of all stages is skipped in a stage without such files
            if name or section != "data" or (tree.get(section) or {}).get(last):
                set_key(tree, inner, value)
    return trees


def _need_rebuildable(lineage: Lineage, entry: Entry) -> None:
    """Raise RunError for an entry that cannot get the same bits again."""
    links = [(d, facts) for d, facts in lineage.history.links.items() if facts.stage == entry.key]
    reasons = {
        "it was imported": links and entry.kind == "import",
        "it was exported in training": entry.kind == "stage" and entry.key not in lineage.stages,
        "links below it were pruned": entry.pruned,
        "its run had another name for it": any(facts.digest != d for d, facts in links),
    }
    if true := [reason for reason, is_true in reasons.items() if is_true]:
        raise RunError(f"Cannot train {entry.key} of the lineage again: {true[0]}")


def _check_rows(entry: Entry, stage: Stage) -> None:
    """Raise DataError unless the files of rows have the content that the lineage names."""
    known, now = entry.training.sources, source_digests(stage.config)
    for key in known.keys() | now.keys():
        if known.get(key) != now.get(key):
            raise DataError(
                f"`{key}` must be the rows that the lineage names",
                "other content",
                f"name that file, as in --stages.{stage.name}.{key} FILE",
            )


def rebuild(
    lineage: Lineage, stages: Sequence[Stage], *, listener: Listener | None = None
) -> list[TrainResult | None]:
    """Declare the entries of a lineage in a new run, build them, and return the stages' results.

    Repeat a call that was stopped to resume it. Raises RunError at the first entry with other bits.
    """
    run = Path(stages[0].config.output or "").expanduser()
    if num_launched() > 1:
        raise ConfigError("a lineage is trained again by one process", num_launched())
    with writing(run):
        return _rebuilt(lineage, stages, run, listener or (lambda event: None))


def _rebuilt(
    lineage: Lineage, stages: Sequence[Stage], run: Path, listener: Listener
) -> list[TrainResult | None]:
    """Build a lineage in a run, which this process holds if it exists."""
    wanted, known = lineage.history, None
    if exists_in(run):
        known = read_history(run)
        keys = [entry.key for entry in (*known.entries, *known.unbuilt)]
        if others := [key for key in keys if wanted.find(key) is None]:
            rule, got = "`output` must be new, or of this lineage", f"{others[0]} in {run}"
            raise RunError(rule, got, "choose another output")
    plan = _plan(lineage, stages, run, known)
    base = OpenBase.of_config(stages[0].config, None if known is None else run)
    if plan.due:
        check_due(plan.stages, NOTHING, None if known is None else state_at(run, known), base)
    check = partial(_check_bits, run, wanted)
    results = carry_out(plan, listener, base=base, after=check)
    update_history(run, methodcaller("moved", wanted.head))
    return [results.get(stage.name) for stage in stages]


def _plan(lineage: Lineage, stages: Sequence[Stage], run: Path, known: History | None) -> Plan:
    """Return a plan that declares the entries of a lineage; `known` is the run's history."""
    wanted, by_name = lineage.history, {stage.name: stage for stage in stages}
    first = stages[0].config
    planned = [StagePlan(stage, begun_stage(run, stage.name, known)) for stage in stages]
    for stage_plan in planned:
        if stage_plan.begun is not None:
            compare(stage_plan.begun, stage_plan.stage.config, stage_plan.name)
    if wanted.find(START) is None:
        first = first.model_copy(update={"start_data": "none"})
    history = known or history_of_start(
        NOTHING, Base(model=first.model, fingerprint=""), first, stages[0].name
    )
    new = [
        _declared(entry, by_name, wanted, first)
        for entry in wanted.entries
        if history.known(entry.key) is None
    ]
    keys = tuple(entry.key for entry in wanted.entries)
    configs = {stage.name: stage.config for stage in stages}
    target = wanted.head if new else None
    return Plan(tuple(planned), NOTHING, run, history, tuple(new), keys, configs, target)


def _declared(
    entry: Entry, stages: Mapping[str, Stage], wanted: History, first: RunConfig
) -> Unbuilt:
    """Return the declaration of an entry; `first` is the config of the run's first stage."""
    if entry.kind == "stage":
        declared = stage_entry(entry.key, stages[entry.key].config, entry.parent, entry.key)
        return declared.model_copy(update={"unit": entry.unit})
    known = {name: getattr(entry, name) for name in Declared.model_fields}
    config = first.model_dump(mode="json") if entry.kind == "import" else {}
    return Unbuilt(**known, config=config)


def _check_bits(run: Path, wanted: History, built: Entry) -> None:
    """Raise RunError unless a built entry has the state and files of the lineage."""
    entry = wanted.find(built.key)
    assert entry is not None
    if entry.state != built.state or not entry.files.items() <= built.files.items():
        trained = [e.training.versions for e in wanted.entries if e.training.versions]
        known = entry.training.versions or dict(*trained[:1])
        versions = ", ".join(f"{name} {value}" for name, value in known.items())
        raise RunError(
            f"Cannot rebuild: {entry.key} came to other bits than the lineage's",
            f"another state than {entry.state.digest} in {run}",
            f"use a machine of the same kind, as many threads and the same versions: {versions}",
        )
