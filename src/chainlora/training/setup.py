"""From a stage of a plan to a run that can start: what rows and weights tell is refused here."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import nn

from chainlora.chain.chain import Chain
from chainlora.chain.holding import holding_named
from chainlora.config.reading import flatten
from chainlora.config.schema import RunConfig
from chainlora.data.conflicts import newest
from chainlora.data.kept import Kept, keeps_rows
from chainlora.data.row_warnings import tell_changed
from chainlora.data.splits import Splits, prepare_splits
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.models.loading import check_vocabulary
from chainlora.models.modes import kept_random_state
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.addresses import state_at
from chainlora.runs.draft import Progress
from chainlora.runs.history import RESULT
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import fitted
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import noted_base
from chainlora.runs.paths import stage_folder
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.work import Work
from chainlora.training.batches import make_batches
from chainlora.training.deciding import decide, take_reference
from chainlora.training.events import Listener, Planned, RowsEncoded
from chainlora.training.objectives import make_objective
from chainlora.training.processes import (
    PATIENCE,
    Processes,
    find_processes,
    finding_each_other,
    num_launched,
    wants_shards,
)
from chainlora.training.rehearsing import with_steps
from chainlora.training.run import Run

logger = logging.getLogger(__name__)


def prepare(
    config: RunConfig,
    listener: Listener,
    change: Collection[str],
    start: Start,
    stage: str,
    base: OpenBase | None = None,
) -> Run:
    """Load and check everything a stage needs, claim its folder, find where to resume.

    `base` is the one that this process has open; several processes open their own.
    """
    accelerator = _make_accelerator(config, stage)
    processes = find_processes(accelerator, share_model=wants_shards(config))
    work = None
    with ExitStack() as undo:
        if config.output is not None:
            work = Work(config.output, stage, writes=processes.is_first)
            undo.callback(work.close, undo=True)
        with processes.together():
            # asked once: the first process may begin a stage while others still read rows
            begun = None if work is None else work.begun()
            is_of_run = begun is not None or start is not NOTHING
            own = OpenBase.of_config(config, work.run if work is not None and is_of_run else None)
            base = own.or_shared(base if processes.count == 1 else None)
            with processes.in_turn():
                _open_files(base, work, config, change)
            tokenizer = base.tokenizer(start.tokenizer)
            with processes.in_turn():  # a bad row is told before the model is loaded
                earlier = start.kept if begun is None else begun.kept()
                earlier.pop(stage, None)  # a stage that is resumed has its own beside them
                keys = {"earlier": earlier, "compare": processes.is_first and begun is None}
                splits = _read_rows(config, tokenizer, base.context, listener, **keys)
                if keys["compare"] and not config.data.rehearse:
                    others = earlier if work is None else _kept_beside(work.run, stage)
                    tell_changed(stage, splits.own, others, tokenizer, config.data.keep_conflicts)
            chain = _put_chain_on(base, config, processes)
            if start.tokenizer is not None:
                check_vocabulary(chain.model, tokenizer, start.tokenizer)
            read = earlier if config.data.keep_conflicts else newest(earlier)
            declared, config = config, with_steps(config, read.values())
            batches = make_batches(config, splits.train, splits.mixture)
            _check(config, chain.model, splits)
            engine = _new_engine(config, chain.model, processes)
            undo.callback(engine.close)
            if begun is None:
                start = fitted(start, chain, config.model)
                for note in start.notes:
                    logger.warning("%s", note)
            progress = Progress()
            with processes.in_turn():
                if work is not None:
                    known = noted_base(config, chain, base.files)
                    keep = splits.kept if keeps_rows(config.data) else None
                    progress = work.begin(declared, known, rows=splits.digest, keep=keep)
            run = Run(
                config=config,
                batches=batches,
                splits=splits,
                objective=make_objective(splits.loss, config.train),
                chain=chain,
                engine=engine,
                tokenizer=tokenizer,
                accelerator=accelerator,
                processes=processes,
                work=work,
                progress=progress,
                listener=listener,
                stage=stage,
                first=len(start.links),
            )
            _put_links_on(run, start)
            _announce(run)
        undo.pop_all()
    return run


def _open_files(
    base: OpenBase, work: Work | None, config: RunConfig, change: Collection[str]
) -> None:
    """Lock a stage; find, and check, the files of its base: nothing is loaded."""
    if work is not None:
        work.open(config, change)
    files = base.files  # which may be downloaded
    if work is not None:
        work.check_base_files(files)


def _read_rows(
    config: RunConfig, tokenizer: Any, context: int, listener: Listener, **keys: Any
) -> Splits:
    """Return the rows of a stage; `keys` are of `prepare_splits`."""

    def tell(split: str, rows: int, share: float) -> None:
        listener(RowsEncoded(0, split, rows, share))

    return prepare_splits(config.data, tokenizer, context, tell, loss=config.train.loss, **keys)


def _kept_beside(run: Path, stage: str) -> dict[str, Kept]:
    """Return the rows that stages kept which a new stage is trained on or combined with."""
    history = read_history(run)
    ahead = history.target
    keys = [stage] if ahead is None or stage not in history.below(ahead) else [stage, ahead]
    return state_at(run, history, history.head).kept(keys)


def _put_chain_on(base: OpenBase, config: RunConfig, processes: Processes) -> Chain:
    """Return a chain of no links on the model, which is frozen: links train their own factors."""
    chain = base.chain(
        seed=config.train.seed,
        hold=config.chain.hold,
        device=processes.device,
        shares=processes.count if processes.shares_model else 1,
    )
    chain.model.requires_grad_(False)
    if config.train.gradient_checkpointing:
        base.checkpoint_activations()
    return chain


def _new_engine(config: RunConfig, model: Any, processes: Processes) -> Engine:
    """LoRA's dropout draws from one generator, and quantised layers keep state of their own."""
    threads = 1 if config.chain.dropout > 0 or is_quantized_model(model) else None
    speedups = config.train.speedups
    return Engine(model, speedups=speedups, training=True, threads=threads, sharing=processes)


def _check(config: RunConfig, model: nn.Module, splits: Splits) -> None:
    """Refuse what the model or the rows cannot do, before the output directory is claimed."""
    for link in dict.fromkeys(config.chain.links()):
        holding_named(config.chain.hold).check_layers(model, link)
    metric, reported = config.train.select_metric, splits.reported
    if metric is not None and metric not in reported:
        raise ConfigError(
            f"`select_metric` must be one of {', '.join(reported)} here (got {metric!r})"
        )
    if config.train.compares and not splits.validation:
        raise ConfigError(
            "`early_stop` and `keep_best` need validation rows (got none); give data.validation"
        )


def _make_accelerator(config: RunConfig, stage: str) -> Accelerator:
    """Return the accelerator of a run, its trackers checked: what they write lies in the stage."""
    wanted = list(config.train.trackers)
    missing = [name for name in wanted if name not in LOGGER_TYPE_TO_CLASS]
    if not missing:
        for name in wanted if config.output is None else ():
            if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
                raise ConfigError(
                    "a tracker that writes files needs a place for them",
                    f"{name!r} in `trackers` and no output",
                    "give output, or remove it",
                )
        with finding_each_other():
            accelerator = Accelerator(
                cpu=num_launched() > 1 and not torch.accelerator.is_available(),
                log_with=wanted or None,
                project_dir=config.output and str(stage_folder(Path(config.output), stage)),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        known = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
        missing = [name for name in wanted if name not in known]
    if missing:
        raise ConfigError(
            "`trackers` must name trackers that Accelerate knows and that are installed (got "
            f"{missing[0]!r}); pip install it or remove it"
        )
    return accelerator


def _put_links_on(run: Run, start: Start) -> None:
    """Give the model the links below the stage and those it has tied; decide the run's numbers."""
    with kept_random_state(run.chain.model):  # PEFT draws in layers that it puts on
        run.chain.add(*start.links)
        run.chain.begin_stage(run.stage)
        if run.work is not None:  # those that it had tied when it was stopped
            run.chain.add(*run.work.load_links())
        if run.splits.loss == "dpo":
            take_reference(run)
        decide(run)


def _announce(run: Run) -> None:
    """Start the trackers, and tell the listener what is about to happen."""
    if run.train.trackers:
        settings = flatten(run.config.model_dump(mode="json"))
        run.accelerator.init_trackers("chainlora", config=settings)
    run.listener(
        Planned(
            step=run.progress.step,
            num_steps=run.batches.num_steps,
            lengths=list(run.batches.lengths),
            rows=run.batches.mixture.num_rows,
            path=run.engine.path,
            threads=run.engine.num_threads,
            notes=list(run.engine.notes),
            data=run.splits.report(),
            evaluations=_evaluations(run),
            log_every=run.train.log_every,
            estimate=_estimate(run),
        )
    )


def _estimate(run: Run) -> float | None:
    """Return how many seconds the stage takes at the speed of the one that ended last, with as many
    evaluations a step."""
    if run.work is None:
        return None
    history = read_history(run.work.run)
    ended = [entry.key for entry in history.entries if RESULT in entry.files]
    if not ended or not len(run.splits.train):
        return None
    before = state_at(run.work.run, history, ended[-1]).result() or {}
    if not before.get("tokens"):
        return None
    steps = run.batches.steps_per_epoch  # the last one of an epoch may have fewer rows
    first, last = (sum(map(len, run.batches.batches(step))) for step in (0, steps - 1))
    rows = run.batches.num_steps * (first + (last - first) / steps)
    tokens = rows * float(run.batches.row_lengths.mean())
    return float(before["wall_s"] * tokens / before["tokens"])


def _evaluations(run: Run) -> list[int]:
    """Return the steps after which validation rows are scored; so many test rows count as one."""
    if not run.splits.validation:
        return []
    ends, last = list(accumulate(run.batches.lengths)), run.batches.num_steps
    every = run.train.eval_every or last or 1  # a run may have no step
    inside = set(range(every, last, every)) - set(ends)
    tests = round(len(run.splits.test) / len(run.splits.validation))
    return sorted([*inside, *(ends if run.train.eval_at_knots else [last]), *[last] * tests])
