"""Rebuild an export from its lineage: the same bits from ``lineage.json``, the rows and the base.

A new run gets the plan of the lineage. Each of its entries must get the state that it had. Rows of
the base are read or written again; they are not compared, but the states that are computed from
them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from chainlora.config.reading import leave_out_helpers, make_config, set_key
from chainlora.config.staging import Stage
from chainlora.config.template_names import refuse_paths
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import stage_of
from chainlora.runs.entries import START, Entry
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.lineage import Lineage
from chainlora.runs.loading_start import NOTHING
from chainlora.runs.locks import writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base
from chainlora.runs.paths import exists_in
from chainlora.runs.resuming import general_of, need_same, source_digests
from chainlora.training.events import Listener
from chainlora.training.processes import num_launched
from chainlora.training.reconcile import Change, carry_out
from chainlora.training.refusing import StagePlan, check_due, naming
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
            stage = Stage(entry.key, make_config(configs[entry.key]))
            with naming(stage):
                _check_rows(entry, stage)
            stages.append(stage)
    if not stages or stages[0].config.output is None:
        rule = "a lineage is trained again by stages, into a new folder"
        raise ConfigError(rule, "none", "add --output" if stages else "export another state")
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
    """Compute a lineage in a run, which this process holds if it exists."""
    wanted, known = lineage.history, None
    if exists_in(run):
        known = read_history(run)
        names = [*known.plan().names, *(e.key for e in known.entries if e.key != START)]
        others = [
            key for key in names if wanted.find(key) is None and not known_combined(known, key)
        ]
        if others:
            rule, got = "`output` must be new, or of this lineage", f"{others[0]} in {run}"
            raise RunError(rule, got, "choose another output")
    change = _change(lineage, stages, run, known)
    base = OpenBase.of_config(stages[0].config, None if known is None else run)
    if change.due:
        check_due(change.stages, NOTHING, None if known is None else state_at(run, known), base)
    check = partial(_check_bits, run, wanted)
    results = carry_out(change, listener, base=base, after=check)
    return [results.get(stage.name) for stage in stages]


def known_combined(history: History, key: str) -> bool:
    """Say whether an entry is a combination, whose name may be another one in a lineage."""
    entry = history.find(key)
    return entry is not None and entry.kind == "combine"


def _change(lineage: Lineage, stages: Sequence[Stage], run: Path, known: History | None) -> Change:
    """Return the change that makes a run of the plan of a lineage."""
    plan, by_name = lineage.history.plan(), {stage.name: stage for stage in stages}
    planned = [StagePlan(stage, begun_stage(run, stage.name, known)) for stage in stages]
    configs = {stage.name: stage.config for stage in stages}
    if known is not None and known.plan().stages:
        head = state_at(run, known)
        for each in planned:
            own = known.plan().find(each.name)
            if own is not None:
                ended = each.begun is not None and each.begun.draft is None
                need_same(head, own, each.stage.config, has_ended=ended)
        return Change(run, known, tuple(planned), configs)
    new = []
    for stage in plan.stages:
        config = by_name[stage.name].config
        update = stage_of(stage.name, config, stage.names, stage.how)
        new.append(update.model_copy(update={"draws": stage.draws}))
    first = stages[0].config
    general = None if lineage.history.general is None else general_of(first)
    base = lineage.history.base.model_copy(update={"model": first.model})
    history = History(base=base, hold=first.chain.hold, seed=first.train.seed, general=general)
    history = history.model_copy(update={"tokenizer": {}})
    history = history.edited(plan.model_copy(update={"stages": tuple(new)}), "train lineage.json")
    return Change(run, history, tuple(planned), configs)


def _check_bits(run: Path, wanted: History, built: Entry) -> None:
    """Raise RunError unless an entry has the state and files of the lineage."""
    entry = wanted.find(built.key)
    if entry is None and built.kind == "combine":  # it may have another name there
        entry = next((e for e in wanted.entries if e.state == built.state), None)
    if (
        entry is None
        or entry.state != built.state
        or not entry.files.items() <= built.files.items()
    ):
        trained = [e.training.versions for e in wanted.entries if e.training.versions]
        known = (entry and entry.training.versions) or dict(*trained[:1])
        versions = ", ".join(f"{name} {value}" for name, value in known.items())
        digest = "" if entry is None else f" than {entry.state.digest}"
        raise RunError(
            f"Cannot rebuild: {built.key} came to other bits than the lineage's",
            f"another state{digest} in {run}",
            f"use a machine of the same kind, as many threads and the same versions: {versions}",
        )
