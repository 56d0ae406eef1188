"""Refuse stages that cannot be trained, before the first one is trained.

The checks use the configs, the run on disk, and the model without weights. Problems that show only
in rows or weights are refused later, by `training.setup`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from chainlora import files
from chainlora.chain.adapters import check_targets, matched_modules
from chainlora.chain.layerwise import outside_layers
from chainlora.config.schema import PAIR_LOSSES, LinkConfig, RunConfig, StartData
from chainlora.config.staging import Stage
from chainlora.data.division import can_read_again
from chainlora.data.kept import keeps_general
from chainlora.data.row_warnings import without_warnings
from chainlora.data.splits import (
    Splits,
    check_metric,
    learned_by,
    length_limit,
    prepare_splits,
    reported_of,
)
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.evaluation.combination import ON_TOP, need_combinable
from chainlora.models.loading import accelerator
from chainlora.runs.draft import Draft
from chainlora.runs.entries import BASE, START
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.loading_start import NOTHING, Start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in
from chainlora.runs.state import OpenState
from chainlora.training.batches import make_batches
from chainlora.training.objectives import check_names
from chainlora.training.optimizers import check_optimizer
from chainlora.training.processes import check_shards, num_launched, wants_shards

_GIVE_ROWS = "give some as `start_data`, or to a run by eval --matrix --start-rows FILE"


@dataclass(frozen=True)
class StagePlan:
    """A stage of a command, and how far it has come."""

    stage: Stage
    begun: OpenState | None = None  # None: new

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def draft(self) -> Draft | None:
        return None if self.begun is None else self.begun.draft

    @property
    def state(self) -> Literal["finished", "stopped", "new"]:
        return "new" if self.begun is None else "stopped" if self.draft else "finished"

    @property
    def step(self) -> int:
        """Return the step at which a stopped stage resumes."""
        return self.draft.position.step if self.draft else 0


def check_due(
    planned: Sequence[StagePlan], start: Start, head: OpenState | None, base: OpenBase | None
) -> None:
    """Raise ChainLoRAError for unfinished stages of a plan that cannot be trained.

    `head` is None before the run's first stage has ended; that stage begins on `start`.
    """
    due = [stage_plan for stage_plan in planned if stage_plan.state != "finished"]
    first = due[0].stage.config
    run = None if first.output is None else Path(first.output)
    if run is not None:
        files.check_writable(run)
    is_new_run = head is None and start is NOTHING  # otherwise the base is named relative to it
    base = OpenBase.of_config(first, None if is_new_run else run).or_shared(base)
    losses = _losses(Start(state=None if head is None else head.at(BASE)))
    losses |= _given(first, start, due[0].state == "new" and head is None)
    below = losses | _losses(start if head is None else Start(state=head))
    # work that comes before the rows of a stage are read: general rows, earlier stages
    is_early = len(due) > 1 or (head is None and keeps_general(first) and run is not None)
    tokenizer = start.tokenizer if head is None else head.tokenizer()
    for stage_plan in due:
        config, is_new = stage_plan.stage.config, stage_plan.state == "new"
        with naming(stage_plan.stage if len(planned) > 1 else None):
            _check_config(config, base, is_new)
            if is_new and is_early:
                check_rows(config, base, tokenizer)
        if is_new:
            if stage_plan.name in start.stages and head is None:
                got = f"{stage_plan.name!r}, which the start has"
                raise RunError("a stage must have a name of its own", got, "choose another")
            _need_rows(stage_plan.stage, losses if stage_plan.stage.beside else below)
        loss = learned_by(config.data, config.train.loss)
        below[stage_plan.name] = loss if config.data.keep_rows else None


def _check_config(config: RunConfig, base: OpenBase, is_new: bool) -> None:
    """Raise ConfigError for a config that this machine, the plug-ins or the base do not support."""
    _check_processes(config)
    check_names(config)
    check_optimizer(config, accelerator())
    length_limit(config.data, base.context)
    check_metric(config.train.select_metric, reported_of(config.data, config.train.loss))
    _check_trackers(config)
    if is_new:
        for link in dict.fromkeys(config.chain.links()):
            check_targets(base.skeleton, link)


def check_rows(config: RunConfig, base: OpenBase, tokenizer: Path | None) -> Splits | None:
    """Return the rows of a stage. Raise DataError or ConfigError for rows that it cannot learn.

    They are read as the stage will read them, but for rows that earlier stages keep. Warnings wait
    until it begins. One of several processes does not wait for the others, so they leave it out.
    """
    if num_launched() > 1:
        return None
    data = config.data.model_copy(update={"replay": None, "new_rows_only": False})
    with without_warnings():
        own, loss = base.tokenizer(tokenizer), config.train.loss
        splits = prepare_splits(data, own, base.context, loss=loss, compare=False)
        make_batches(config, splits.train, splits.mixture)
    return splits


def _check_trackers(config: RunConfig) -> None:
    """Raise ConfigError for trackers that are unknown, without a place, or not installed."""
    names, known = config.train.trackers, LOGGER_TYPE_TO_CLASS
    if unknown := [name for name in names if name not in known]:
        rule = "`trackers` must name trackers that Accelerate knows"
        raise ConfigError(rule, repr(unknown[0]), f"known: {', '.join(known)}")
    for name in names:
        if config.output is None and known[name].requires_logging_directory:
            raise ConfigError(
                "a tracker that writes files needs a place for them",
                f"{name!r} in `trackers` and no output",
                "give output, or remove it",
            )
    installed = [str(each) for each in get_available_trackers()]  # an enum's members
    if missing := [n for n in names if n in LoggerType and n not in installed]:
        rule = "`trackers` must name trackers whose packages are installed"
        raise ConfigError(rule, repr(missing[0]), "pip install it or remove it")


def _check_processes(config: RunConfig) -> None:
    """Raise ConfigError unless the launched processes can train the config together."""
    count, shard = num_launched(), config.train.shard
    if wants_shards(config) and count > 1:
        check_shards(config)
    elif shard is not None:
        rule = f"`train.shard: {shard}` shares the model between several processes"
        remedy = "launch with torchrun --nproc-per-node 2 -m chainlora train CONFIG, or set "
        raise ConfigError(rule, "one process", f"{remedy}train.shard: null")
    if config.train.batch_size % count:
        raise ConfigError(
            "`train.batch_size` counts the rows of all processes together, and must be a multiple "
            f"of their number (got {config.train.batch_size} for {count} processes); change it, or "
            "start another number of processes"
        )


def _losses(below: Start) -> dict[str, str | None]:
    """Return the loss of the kept rows of each stage below, and of the start; None without rows."""
    lineage, kept = [] if below.state is None else below.state.lineage, below.kept
    names = [e.key for e in lineage if e.kind in ("stage", "import")]
    names += [START] if START in kept else []
    return {name: kept[name].loss if name in kept else None for name in names}


def _given(first: RunConfig, start: Start, is_new: bool) -> dict[str, str | None]:
    """Return the loss of the rows that a new run gets for its start, given or general ones."""
    if not isinstance(first.start_data, StartData) or not is_new:
        is_due = start.state is None or start.state.history.general is not None
        return {START: "completion"} if is_new and is_due and keeps_general(first) else {}
    is_same_run = start.state is not None and exists_in(Path(first.output or "").expanduser())
    if START in start.kept and is_same_run:
        return {}  # the run has kept them already
    if START in start.kept:
        got = "some, and the run has such rows"
        raise RunError("`start_data` is for a start without such rows", got, "leave it out")
    return {START: learned_by(first.start_data.as_data(first.data), None)}


def _need_rows(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Raise RunError for keys that need earlier rows if no stage below kept such rows."""
    data, without = stage.config.data, [name for name, loss in below.items() if loss is None]
    if data.new_rows_only and stage.beside and not below.keys() - {START}:
        rule = f"`data.new_rows_only` of stage {stage.name!r} leaves out rows of stages below it"
        got = "none below, since it stands beside the others"
        raise RunError(rule, got, "train it on top, or leave data.new_rows_only out")
    missing = {
        "data.new_rows_only": [n for n in without if data.new_rows_only and n != START],
        "data.replay": without if data.replay and len(without) == len(below) else [],
    }
    for key, names in missing.items():
        off = "false" if key == "data.new_rows_only" else "null"
        if names:
            raise RunError(
                f"`{key}` of stage {stage.name!r} needs rows that earlier stages kept",
                f"none of {', '.join(names)}",
                (_GIVE_ROWS if names == [START] else "train those with data.keep_rows: true")
                + f", or set {key}: {off}",
            )
    losses = {name: loss for name, loss in below.items() if loss is not None}
    own_loss = learned_by(data, stage.config.train.loss)
    if data.replay and not any(can_read_again(loss, own_loss) for loss in losses.values()):
        raise RunError(
            f"`data.replay` of stage {stage.name!r} needs earlier rows learned by {own_loss}",
            ", ".join(f"{name}: {loss}" for name, loss in losses.items()) or "no earlier stage",
            "leave data.replay out",
        )


# --- beside or on top ---


def stands_beside(stage: Stage) -> bool:
    """Say whether a new stage stands beside the others: by its key, else if it learns answers.

    Raises ConfigError if it reads rows of earlier stages and has no key.
    """
    data = stage.config.data
    keys = ["data.replay"] * bool(data.replay) + ["data.new_rows_only"] * data.new_rows_only
    if stage.beside is None and keys:
        rule = "a stage that reads rows of earlier stages says where it stands"
        remedy = "add --on-top, or --beside, which leaves it the rows of the start alone"
        got = f"{keys[0]} of {stage.name} without `beside`"
        raise ConfigError(rule, got, f"{remedy} (in a config: beside: false or true)")
    is_answers = learned_by(data, stage.config.train.loss) not in PAIR_LOSSES
    return is_answers if stage.beside is None else stage.beside


def need_beside(
    stage: Stage, before: Sequence[Stage], head: OpenState | None, start: Start = NOTHING
) -> None:
    """Raise ChainLoRAError for a new stage that cannot be combined with the others.

    `before` are unfinished stages of the same command. `head` and `start` are those of `placed`.
    """
    for each in (*before, stage):
        _need_keys(each)
    links = [*stage.config.chain.links()]
    if head is None:
        for link in start.links:
            need_low_rank_sum(link.config, "start", ON_TOP)
    else:
        parts = [head.at(key) for key in head.history.parts(head.key)]
        need_combinable(parts)
        links += [facts.link_config() for part in parts for facts in part.facts]
    need_in_layers(_base_of(stage, head).skeleton, links, ON_TOP)


def _base_of(stage: Stage, head: OpenState | None) -> OpenBase:
    """Return the base of a run, or the one that a stage will begin it on."""
    if head is not None:
        return OpenBase.of_state(head)
    output = stage.config.output
    return OpenBase.of_config(stage.config, None if output is None else Path(output))


def need_in_layers(skeleton: Any, links: Sequence[LinkConfig], remedy: str) -> None:
    """Raise ConfigError for links outside the decoder layers, which are not combined."""
    names = [name for link in dict.fromkeys(links) for name in matched_modules(skeleton, link)]
    if outside := outside_layers(skeleton, names):
        rule = "stages beside each other have all their links in decoder layers"
        raise ConfigError(rule, outside[0], remedy)


def _need_keys(stage: Stage) -> None:
    """Raise ConfigError for a stage with keys that prevent a combination."""
    data, chain = stage.config.data, stage.config.chain
    keys = {
        "chain.lora_bias": chain.lora_bias,
        "data.keep_rows: false": not data.keep_rows,
    }
    if wrong := [key for key, is_set in keys.items() if is_set]:
        rule = "a stage beside others is combined with them"
        got = f"{wrong[0]} of {stage.name}"
        raise ConfigError(rule, got, f"leave it out, or {ON_TOP}")


@contextmanager
def naming(stage: Stage | None) -> Iterator[None]:
    """Prefix the messages of errors with the name of a stage."""
    try:
        yield
    except ChainLoRAError as error:
        if stage is not None:
            error.args = (f"stage {stage.name!r}: {error}",)
        raise
