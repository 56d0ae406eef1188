"""Prepare a stage for training: load rows, model and links, claim the folder, find where to resume.

Problems that show only in rows or weights are refused here; all others were refused earlier, by
`training.refusing`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from chainlora.chain.chain import Chain
from chainlora.chain.holding import holding_named
from chainlora.config.reading import flatten
from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept, need_embedded
from chainlora.data.row_warnings import warn_of_changed
from chainlora.data.rows import joined
from chainlora.data.splits import Splits, check_metric, prepare_splits
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.evaluation.combination import tokens_read
from chainlora.models.loading import check_vocabulary
from chainlora.models.modes import kept_random_state
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.addresses import state_at
from chainlora.runs.draft import Progress
from chainlora.runs.entries import RESULT
from chainlora.runs.history_file import folder_in, read_history
from chainlora.runs.keys import Made
from chainlora.runs.loading_start import NOTHING, Start, check_start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import noted_base
from chainlora.runs.state import OpenState
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
from chainlora.training.run import Run


@dataclass
class _Setup:
    """A stage while it is prepared."""

    config: RunConfig
    start: Start
    stage: str
    listener: Listener
    accelerator: Accelerator
    processes: Processes
    work: Work | None = None  # None: the stage has no output
    begun: OpenState | None = None  # None: the stage is new


def prepare(
    config: RunConfig,
    listener: Listener,
    start: Start,
    stage: str,
    base: OpenBase | None = None,
) -> Run:
    """Load and check everything a stage needs, claim its folder, find where to resume."""
    accelerator = _make_accelerator(config, stage)
    processes = find_processes(accelerator, share_model=wants_shards(config))
    setup = _Setup(config, start, stage, listener, accelerator, processes)
    with ExitStack() as undo:  # after an error the folder is released; that of a new stage goes
        if config.output is not None:
            setup.work = Work(config.output, stage, writes=processes.is_first)
            undo.callback(setup.work.close, undo=True)
        with processes.together():
            run = _prepared(setup, base, undo)
        undo.pop_all()
    return run


def _prepared(setup: _Setup, base: OpenBase | None, undo: ExitStack) -> Run:
    """Return a prepared run; `undo` gets callbacks that close its parts if an error follows."""
    config, start, processes, work = setup.config, setup.start, setup.processes, setup.work
    # 1. The folder and the files of the base: nothing is loaded yet.
    # `begun` is read once, because the first process may begin the stage while others read rows.
    begun = setup.begun = None if work is None else work.begun()
    base = _open_base(setup, base)
    with processes.in_turn():
        files = base.files  # may download them
        if work is not None:
            work.open(files)
    # 2. Rows, before the model: a bad row is reported early.
    tokenizer = base.tokenizer(start.tokenizer)
    with processes.in_turn():
        earlier = start.kept if begun is None else begun.kept()
        earlier.pop(setup.stage, None)  # a resumed stage has its own rows beside them
        splits = _read_rows(setup, tokenizer, base.context, earlier)
    # 3. The model, and the number of steps.
    chain = _put_chain_on(base, config, processes)
    need_embedded(earlier, chain.model)
    if start.tokenizer is not None:
        check_vocabulary(chain.model, tokenizer, start.tokenizer)
    batches = make_batches(config, splits.train, splits.mixture)
    _check(config, chain.model, splits)
    engine = _new_engine(config, chain.model, processes)
    undo.callback(engine.close)
    if begun is None:
        check_start(start, chain, config.model)
    # 4. The stage on disk, which begins or resumes; then the links of the chain.
    with processes.in_turn():
        progress = _begin_work(setup, chain, base, splits)
    run = Run(
        config=config,
        batches=batches,
        splits=splits,
        objective=make_objective(splits.loss, config.train),
        chain=chain,
        engine=engine,
        tokenizer=tokenizer,
        accelerator=setup.accelerator,
        processes=processes,
        work=work,
        progress=progress,
        listener=setup.listener,
        stage=setup.stage,
        first=len(start.links),
    )
    _put_links_on(run, start)
    _announce(run)
    return run


def _begin_work(setup: _Setup, chain: Chain, base: OpenBase, splits: Splits) -> Progress:
    """Begin or resume the stage on disk, and return its progress."""
    if setup.work is None:
        return Progress()
    config = setup.config
    keep = partial(splits.kept, config.data.keep_rows) if config.data.keep_rows else None
    noted = noted_base(config, chain, base.files)
    return setup.work.begin(config, noted, rows=splits.digest, keep=keep)


def _open_base(setup: _Setup, shared: OpenBase | None) -> OpenBase:
    """Return the base of a stage; one process uses the `shared` one if it is the same."""
    is_of_run = setup.begun is not None or setup.start is not NOTHING
    run = setup.work.run if setup.work is not None and is_of_run else None
    base = OpenBase.of_config(setup.config, run)
    return base.or_shared(shared if setup.processes.count == 1 else None)


def _read_rows(setup: _Setup, tokenizer: Any, context: int, earlier: dict[str, Kept]) -> Splits:
    """Return the rows of a stage; the first process warns if they contradict `earlier` rows."""

    def report(split: str, rows: int, share: float) -> None:
        setup.listener(RowsEncoded(0, split, rows, share))

    data, stage = setup.config.data, setup.stage
    is_compared = setup.processes.is_first and setup.begun is None
    splits = prepare_splits(
        data,
        tokenizer,
        context,
        report,
        loss=setup.config.train.loss,
        earlier=earlier,
        compare=is_compared,
    )
    if is_compared:
        both = (earlier, {}) if setup.work is None else _kept_beside(setup.work.run, stage)
        for others, are_later in zip(both, (False, True), strict=True):
            keeps = data.keep_conflicts
            warn_of_changed(stage, splits.own, others, tokenizer, keeps, are_later=are_later)
    return splits


def _kept_beside(run: Path, stage: str) -> tuple[dict[str, Kept], dict[str, Kept]]:
    """Return the kept rows of all stages that a new stage is trained on or combined with.

    First those of earlier stages in the plan, then those of later ones.
    """
    history = read_history(run)
    others = [name for name in history.plan().active if history.find(name) is not None]
    kept = state_at(run, history).kept(others) if others else {}
    names = history.plan().names
    later = names[names.index(stage) + 1 :]
    return (
        {name: rows for name, rows in kept.items() if name != stage and name not in later},
        {name: rows for name, rows in kept.items() if name in later},
    )


def _put_chain_on(base: OpenBase, config: RunConfig, processes: Processes) -> Chain:
    """Return a chain without links on the frozen model; only factors of links are trained."""
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
    """Return the engine of a run."""
    # one thread where threads would share state: a generator of dropout, or of quantised layers
    threads = 1 if config.chain.dropout > 0 or is_quantized_model(model) else None
    speedups = config.train.speedups
    return Engine(model, speedups=speedups, training=True, threads=threads, sharing=processes)


def _check(config: RunConfig, model: nn.Module, splits: Splits) -> None:
    """Raise ConfigError for keys that this model or these rows do not support."""
    for link in dict.fromkeys(config.chain.links()):
        holding_named(config.chain.hold).check_layers(model, link)
    check_metric(config.train.select_metric, splits.reported)
    if config.train.compares and not splits.validation:
        rule = "`early_stop` and `keep_best` need validation rows"
        raise ConfigError(rule, "none", "give data.validation")


def _make_accelerator(config: RunConfig, stage: str) -> Accelerator:
    """Return the accelerator of a run, whose trackers write to the stage's folder."""
    with finding_each_other():
        folder = config.output and folder_in(Path(config.output), stage)
        return Accelerator(
            cpu=num_launched() > 1 and not torch.accelerator.is_available(),
            log_with=list(config.train.trackers) or None,
            project_dir=folder and str(folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )


def _put_links_on(run: Run, start: Start) -> None:
    """Put the links below the stage and its own tied links on the model; decide open numbers."""
    with kept_random_state(run.chain.model):  # PEFT draws random numbers for new layers
        run.chain.add(*start.links)
        run.chain.begin_stage(run.stage)
        if run.work is not None:  # links tied before the stage was stopped
            run.chain.add(*run.work.load_links())
        if run.splits.loss == "dpo":
            take_reference(run)
        decide(run)


def _announce(run: Run) -> None:
    """Start the trackers, and send the event `Planned`."""
    if run.train.trackers:
        settings = flatten(run.config.model_dump(mode="json"))
        run.accelerator.init_trackers("chainlora", config=settings)
    speed = _speed(run)
    work_after = _work_after(run, speed)
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
            estimate=_estimate(run, speed, work_after),
            work_after=work_after,
        )
    )


# The tokens of training that take the time of a token that is combined or scored. Measured with
# SmolLM2-135M on two cores, idle and busy: 1.2 to 1.9, and 0.6.
_COMBINED, _SCORED = 1.5, 0.6


def _speed(run: Run) -> float | None:
    """Return the tokens a second of the last finished stage, None without one."""
    if run.work is None:
        return None
    history = read_history(run.work.run)
    ended = [entry.key for entry in history.entries if RESULT in entry.files]
    before = (state_at(run.work.run, history, ended[-1]).result() if ended else None) or {}
    return before["tokens"] / before["wall_s"] if before.get("tokens") else None


def _work_after(run: Run, speed: float | None) -> float:
    """Return the work after the last step in tokens of training, 0 if another stage follows."""
    if run.work is None:
        return 0.0
    state = run.work.opened()  # with this stage
    history = state.history
    left = [*Made(history).unmade(history.recipes().root)]
    kept = state.kept([key for key in history.plan().names if history.find(key)])
    if any(recipe.stage is not None for recipe in left) or not kept:
        return 0.0
    own = set() if left or len(kept) > 2 else {run.stage}  # a single stage scores the base's rows
    scored = joined([rows.scored[1] for key, rows in kept.items() if key not in own])
    work = _SCORED * 2 * int(scored.lengths.sum())  # in two new states
    before = next((entry for entry in reversed(history.entries) if entry.seconds), None)
    price = _COMBINED
    if before is not None and speed is not None:
        price = before.seconds * speed / tokens_read(state.at(before.key).kept())
    return work + (price * tokens_read(kept) if left else 0.0)


def _estimate(run: Run, speed: float | None, work_after: float) -> float | None:
    """Return the seconds of the stage and the work after it at a speed."""
    if speed is None or not len(run.splits.train):
        return None
    steps = run.batches.steps_per_epoch  # the last step of an epoch may have fewer rows
    first, last = (sum(map(len, run.batches.batches(step))) for step in (0, steps - 1))
    rows = run.batches.num_steps * (first + (last - first) / steps)
    batch, lengths = run.batches.batches(0)[0], run.batches.row_lengths
    packed = run.objective.collate(run.engine, [run.splits.train[row] for row in batch])
    share = sum(some.num_tokens for some in packed) / lengths[batch].sum()  # prefixes count once
    return (rows * float(lengths.mean() * share) + work_after) / speed


def _evaluations(run: Run) -> list[int]:
    """Return the steps after which rows are scored, one for each evaluation."""
    if not run.splits.validation:
        return []
    ends, last = list(accumulate(run.batches.lengths)), run.batches.num_steps
    every = run.train.eval_every or last or 1  # a run may have no step
    inside = set(range(every, last, every)) - set(ends)
    # test rows take the time of so many evaluations
    tests = round(len(run.splits.test) / len(run.splits.validation))
    return sorted([*inside, *(ends if run.train.eval_at_knots else [last]), *[last] * tests])
