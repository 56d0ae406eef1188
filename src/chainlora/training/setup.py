"""From a config to a run that can start: everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from chainlora.chain.adapters import check_targets
from chainlora.chain.chain import Chain
from chainlora.config.schema import RunConfig
from chainlora.data.splits import Splits, prepare_splits
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.models.identity import base_files
from chainlora.models.loading import context_length, load_model, resolve_model
from chainlora.runs.directory import Progress, RunDirectory
from chainlora.training.events import Listener, Planned, RowsEncoded
from chainlora.training.knots import make_policy
from chainlora.training.objectives import OBJECTIVES
from chainlora.training.optimizers import check_optimizer
from chainlora.training.plan import make_plan
from chainlora.training.run import Clock, Run, flatten


def prepare(
    config: RunConfig, resume: bool, listener: Listener, change: Collection[str] = ()
) -> Run:
    """Load and check everything a run needs, claim its directory, find where to resume."""
    directory = RunDirectory(config.output) if config.output else None
    try:
        return _prepare(config, resume, listener, change, directory)
    except BaseException:
        if directory is not None:
            directory.close(undo=True)
        raise


def _prepare(
    config: RunConfig,
    resume: bool,
    listener: Listener,
    change: Collection[str],
    directory: RunDirectory | None,
) -> Run:
    if config.chain.tune == "full" and resume:
        raise ConfigError(
            "full fine-tuning cannot resume (its optimizer state is not saved); start over"
        )
    check_optimizer(config.train)
    accelerator = make_accelerator(config)
    if directory is not None:
        directory.open(config, resume=resume, change=change)  # refuses before the model is loaded
    checkpoint = resolve_model(config.model)
    files = base_files(checkpoint)
    if directory is not None:
        directory.check_base_files(files)
    model, tokenizer = load_model(config.model, getattr(torch, config.train.dtype))
    model.requires_grad_(False)  # links train their own factors; `tune: full` asks for all weights
    splits = prepare_splits(
        config.data,
        tokenizer,
        context_length(model),
        lambda split, rows, share: listener(RowsEncoded(0, split, rows, share)),
    )
    plan = make_plan(config, splits.train)
    check(config, model, splits)
    model.to(accelerator.device)
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        _checkpoint_activations(model)
    chain = Chain(model, seed=config.train.seed, hold=config.chain.hold, checkpoint=str(checkpoint))
    base = {
        "model": config.model,
        "fingerprint": chain.base_fingerprint,
        "dtype": config.train.dtype,
        "files": files,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }
    engine = Engine(
        model,
        speedups=config.train.speedups,
        training=True,
        threads=1 if _needs_one_thread(config) else None,
    )
    try:
        progress = Progress()
        if directory is not None:
            progress = directory.begin(config, base, resume=resume, rows=splits.digest)
        run = Run(
            config,
            plan,
            splits,
            OBJECTIVES[splits.loss],
            make_policy(config),
            chain,
            engine,
            tokenizer,
            accelerator,
            directory,
            progress,
            base,
            listener,
            Clock(progress.seconds),
        )
        _announce(run)
    except BaseException:
        engine.close()
        raise
    return run


def check(config: RunConfig, model: nn.Module, splits: Splits) -> None:
    """Refuse what the model or the rows cannot do, before the output directory is claimed."""
    if config.chain.tune == "lora":
        for link in config.chain.links():
            check_targets(model, link)
    metric, reported = config.train.select_metric, splits.reported
    if metric is not None and metric not in reported:
        raise ConfigError(
            f"`select_metric` must be one of {', '.join(reported)} here (got {metric!r})"
        )
    if (config.train.keep_best or config.train.early_stop) and not splits.validation:
        raise ConfigError(
            "`keep_best` and `early_stop` need validation rows (got none); give data.validation"
        )


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return the accelerator of a run, its trackers checked."""
    wanted = list(config.train.trackers)
    try:
        accelerator = Accelerator(log_with=wanted or None, project_dir=config.output)
        known = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
        missing = [name for name in wanted if name not in known]
    except ValueError:
        missing = wanted
    if missing:
        raise ConfigError(
            "`trackers` must name trackers that Accelerate knows and that are installed (got "
            f"{missing[0]!r}); pip install it or remove it"
        )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"training runs in one process today (got {accelerator.num_processes}); "
            "launch without `accelerate launch --num_processes`"
        )
    return accelerator


def _needs_one_thread(config: RunConfig) -> bool:
    """LoRA's dropout draws from one generator; full gradients are as large as the model."""
    return config.chain.tune == "full" or config.chain.dropout > 0


def _checkpoint_activations(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _announce(run: Run) -> None:
    if run.directory is not None:
        for link in run.directory.load_links(run.progress.link):
            run.chain.add(link)
    if run.train.trackers:
        run.accelerator.init_trackers(
            "chainlora", config=flatten(run.config.model_dump(mode="json"))
        )
    run.listener(
        Planned(
            run.progress.step,
            run.plan.num_steps,
            list(run.plan.lengths),
            len(run.splits.train),
            str(run.engine.path),
            run.engine.num_threads,
            list(run.engine.notes),
            run.splits.report(),
        )
    )
