"""Fine-tune a model by a chain of LoRA: the loop around the heart, on Accelerate.

`train` is the one call: check everything, load, then for each link extend, tune and tie, with
evaluation, the best point, checkpoints and resume around it. What a step sees (rows, learning rate,
dropout) is a pure function of the config and the step's number; so a killed run goes on to the same
bits.

An optimizer's life is one link. Its state is not cleared, it is gone: the next link gets a new one.
(ReLoRA's partial reset, `optimizer_reset: prune`, is the one exception, and is its own function.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from chainlora.chain.adapters import check_targets, set_extra, set_factors
from chainlora.chain.chain import Chain, add_link, extend_chain, live_link, tie_knot, tune_link
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.data.splits import Splits, prepare_splits
from chainlora.engine.decoder_layer import accelerate_model, restore_model
from chainlora.engine.hidden_states import Path, choose_path, hidden_states
from chainlora.engine.lora_layer import accelerate_layers
from chainlora.engine.packing import PackedBatch
from chainlora.engine.threads import Lanes, count_lanes
from chainlora.errors import ConfigError, DivergedError, TrainingError
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.models.loading import context_length, load_model, resolve_model
from chainlora.runs import directory as store
from chainlora.runs.costs import hardware, num_trained, peak_memory_mb
from chainlora.runs.directory import Progress, RunDirectory
from chainlora.training.optimizers import (
    full_optimizer,
    make_optimizer,
    prune_moments,
    set_learning_rate,
)
from chainlora.training.plan import make_plan
from chainlora.training.run import Listener, Run, flatten, record, write_manifest
from chainlora.training.selection import evaluate_point, score, select_best
from chainlora.training.step import Work, add_gradients, pack_rows, packed_steps, summed_loss

_KNOT_TOLERANCE = (
    1e-3  # float32, of the hidden states; rounding of a 30-layer model stays below 1e-4
)


def train(
    config: RunConfig, *, resume: bool = False, listener: Listener | None = None
) -> dict[str, Any]:
    """Run a config from data to result and return what ``result.json`` holds.

    `listener` gets every record of ``metrics.jsonl`` and a first ``{"event": "plan", …}``.
    Everything that can be refused is refused before training. Raises ChainLoRAError subclasses.
    """
    run = _prepare(config, resume, listener or (lambda record: None))
    began = time.perf_counter() - run.progress.seconds
    results: dict[str, Any] = {}
    if run.progress.step == 0:
        evaluate_point(run, "start")
    if config.chain.tune == "full":
        _tune_everything(run, began)
    else:
        _tune_chain(run, began)
        select_best(run)
    results["metrics"] = _final_metrics(run)
    return _finish(run, results, time.perf_counter() - began)


def _prepare(config: RunConfig, resume: bool, listener: Listener) -> Run:
    if config.chain.tune == "full" and resume:
        raise ConfigError(
            "full fine-tuning cannot resume (its optimizer state is not saved); start anew"
        )
    accelerator = _accelerator(config)
    directory = RunDirectory(config.output) if config.output else None
    if (
        directory is not None
        and directory.path.exists()
        and any(directory.path.iterdir())
        and not resume
    ):
        directory.begin(config, {}, resume=False)  # refuses, before the model is loaded
    dtype = getattr(torch, config.train.dtype)
    model, tokenizer = load_model(config.model, dtype)
    model.requires_grad_(
        False
    )  # links train their own factors; full fine-tuning asks for every weight itself
    splits = prepare_splits(config.data, tokenizer, context_length(model))
    plan = make_plan(config, splits.train)
    _check(config, model, splits)
    model.to(accelerator.device)
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    resolved = resolve_model(config.model)
    checkpoint = str(resolved) if resolved is not None else None
    chain = Chain(model, seed=config.train.seed, hold=config.chain.hold, checkpoint=checkpoint)
    base = {
        "model": config.model,
        "fingerprint": chain.base_fingerprint,
        "dtype": config.train.dtype,
    }
    progress = directory.begin(config, base, resume=resume) if directory is not None else Progress()
    path = choose_path(model)
    if config.train.speedups == "auto":
        accelerate_model(model, path)
    lanes = Lanes(_count_lanes(config, model, path))
    run = Run(
        config,
        plan,
        splits,
        chain,
        tokenizer,
        accelerator,
        path,
        lanes,
        directory,
        progress,
        base,
        listener,
    )
    if directory is not None and resume:
        for link in RunDirectory(directory.path).load_links(progress.link):
            add_link(chain, link)
    if config.train.trackers:
        accelerator.init_trackers("chainlora", config=flatten(config.model_dump(mode="json")))
    listener(
        {
            "event": "plan",
            "num_steps": plan.num_steps,
            "lengths": list(plan.lengths),
            "step": progress.step,
            "rows": len(splits.train),
            "path": str(path),
            "lanes": lanes.count,
        }
    )
    return run


def _count_lanes(config: RunConfig, model: nn.Module, path: Path) -> int:
    """Lanes for training; one where the speedups are off, LoRA has dropout, or gradients are as
    large as the model."""
    one = config.train.speedups == "off" or config.chain.tune == "full" or config.chain.dropout
    return 1 if one else count_lanes(model, path, training=True)


def _check(config: RunConfig, model: nn.Module, splits: Splits) -> None:
    """Refuse what the model or the rows cannot do, before the output directory is claimed."""
    if config.chain.tune == "lora":
        for link in config.chain.links():
            check_targets(model, link)
    elif config.train.dtype != "float32":
        raise ConfigError(
            "full fine-tuning needs dtype: float32 (got bfloat16, whose weights lose small updates)"
        )
    metric = config.train.select_metric
    if metric is not None and metric not in splits.reported:
        raise ConfigError(
            f"`select_metric` must be one of {', '.join(splits.reported)} here (got {metric!r})"
        )
    if (config.train.keep_best or config.train.early_stop) and not splits.validation:
        raise ConfigError(
            "`keep_best` and `early_stop` need validation rows (got none); give data.validation"
        )


def _accelerator(config: RunConfig) -> Accelerator:
    wanted = list(config.train.trackers)
    try:
        accelerator = Accelerator(log_with=wanted or None, project_dir=config.output)
        missing = [
            name
            for name in wanted
            if name not in [str(getattr(t, "value", t)) for t in accelerator.log_with]
        ]
    except ValueError:
        missing = wanted
    if missing:
        raise ConfigError(
            "`trackers` must name trackers that Accelerate knows and that are installed (got "
            f"{missing[0]!r}); "
            "pip install it or remove it"
        )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"training runs in one process today (got {accelerator.num_processes}); "
            "launch without `accelerate launch --num_processes`"
        )
    return accelerator


# --- the chain ---


def _tune_chain(run: Run, began: float) -> None:
    configs = run.config.chain.links()
    for index in range(len(run.chain), len(configs)):
        if run.progress.stopped and not _is_inside_link(run):
            break
        _begin_link(run, index, configs[index])
        first = run.plan.first_step(index)
        with ThreadPoolExecutor(1) as packer:
            steps = packed_steps(run, packer, run.progress.step, first + run.plan.lengths[index])
            tune_link(run.chain, steps, lambda step: _update(run, step, began))
        _end_link(run, began)


def _is_inside_link(run: Run) -> bool:
    """Whether a killed run goes on inside a link; it must be tied even if it was stopped early."""
    return run.directory is not None and run.directory.has_checkpoint(run.progress)


def _begin_link(run: Run, index: int, config: LinkConfig) -> None:
    adapter = extend_chain(run.chain, config, backward=_gradient_batches(run, index))
    _accelerate(run)
    run.optimizer = make_optimizer(adapter, run.config.train)
    if index and run.config.train.optimizer_reset == "prune":
        kept = run.kept_moments if run.kept_moments is not None else run.directory.load_moments()  # type: ignore[union-attr]
        store.optimizer_from_tensors(
            run.optimizer, prune_moments(kept, run.config.train.prune_fraction)
        )
    saved = (
        run.directory.load_checkpoint(run.progress, config)
        if run.directory and run.progress.step
        else None
    )
    if saved is not None:
        link, tensors = saved
        for name, factors in link.factors.items():
            if config.init == "pissa":  # the stored factors are [A; A₀], [B, −B₀]
                factors = replace(
                    factors, a=factors.a[: config.rank], b=factors.b[:, : config.rank]
                )
            set_factors(adapter, name, factors)
        set_extra(run.chain.model, adapter, link.extra)
        store.optimizer_from_tensors(run.optimizer, tensors)
        run.chain.live_steps = run.progress.step - run.plan.first_step(index)


def _accelerate(run: Run) -> None:
    if run.config.train.speedups == "auto" and run.chain.live is not None:
        accelerate_layers(run.chain.live.layers.values())


def _gradient_batches(run: Run, index: int) -> Callable[[], None]:
    """The loss's gradient over the first batches the link will see, without an update; what it
    reads is recorded."""

    def backward() -> None:
        tokens = 0
        _accelerate(
            run
        )  # a reused adapter has the fused layers already; a new one must give the same bits
        first = run.plan.first_step(index)
        training = run.chain.model.training
        run.chain.model.eval()
        for step in range(first, min(first + run.config.chain.init_batches, run.plan.num_steps)):
            for rows in run.plan.batches(step):
                batch = pack_rows(run, rows)
                summed_loss(run, batch).backward()
                tokens += batch.num_tokens
        run.chain.model.train(training)
        if run.progress.step == first:  # not where a killed run goes on inside the link
            record(run, {"event": "gradient", "step": first, "link": index, "tokens": tokens})

    return backward


def _end_link(run: Run, began: float) -> None:
    index = len(run.chain)
    probe = pack_rows(run, run.plan.batches(0)[0][:2])
    before = _probe(run, probe)
    if run.config.train.optimizer_reset == "prune":
        assert run.optimizer is not None
        run.kept_moments = store.optimizer_tensors(run.optimizer)
    link = tie_knot(run.chain)
    change = ((_probe(run, probe) - before).norm() / before.norm()).item()
    if not math.isfinite(change):
        raise DivergedError(
            f"a link must leave finite weights (got others after step {run.progress.step}, link "
            f"{index}); the links "
            "before it are kept; lower train.lr"
        )
    if not change <= _KNOT_TOLERANCE and run.config.train.dtype == "float32":
        raise TrainingError(
            f"a knot must preserve the function (got a relative change of {change:.1e} after link "
            f"{index}); this is a bug, please report it with the model's name"
        )
    run.progress.link, run.progress.seconds = index + 1, time.perf_counter() - began
    record(
        run, {"event": "knot", "step": run.progress.step, "link": index, "function_change": change}
    )
    evaluate_point(run, "knot")
    if run.directory is not None:
        run.directory.save_link(link, run.config.model)
        if run.kept_moments is not None:
            run.directory.save_moments(run.kept_moments)
        write_manifest(run)
        run.directory.drop_checkpoints()


@torch.no_grad()
def _probe(run: Run, batch: PackedBatch) -> Tensor:
    model = run.chain.model
    training = model.training
    model.eval()
    hidden = hidden_states(model, batch, path=run.path).float()
    model.train(training)
    return hidden


# --- one step ---


def _update(run: Run, work: Work, began: float) -> None:
    step, batches = work.step, [batch for pieces in work.batches for batch in pieces]
    train, progress, optimizer, model = (
        run.config.train,
        run.progress,
        run.optimizer,
        run.chain.model,
    )
    assert optimizer is not None
    started = time.perf_counter()
    torch.manual_seed(
        (train.seed << 32) + step
    )  # dropout is a function of the step: no generator state to save
    model.train()
    rate = set_learning_rate(optimizer, train, run.plan.lengths, step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = add_gradients(run, work, parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (math.isfinite(total) and torch.isfinite(norm)):
        _stop_non_finite(run, step, total, norm.item())
    if train.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, train.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.last_scored = None
    progress.step = step + 1
    tokens = sum(batch.num_tokens for batch in batches)
    progress.tokens += tokens
    progress.scored_tokens += sum(int(batch.token_target.numel()) for batch in batches)
    run.chain.live_steps += run.config.chain.tune == "full"
    record(
        run,
        {
            "event": "step",
            "step": step + 1,
            "link": len(run.chain),
            "loss": total,
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
        },
    )
    _between_steps(run, began)


def _between_steps(run: Run, began: float) -> None:
    train, progress = run.config.train, run.progress
    whole = run.config.chain.tune == "full"  # no links, so no knot before the end
    end_of_link = (
        run.plan.num_steps
        if whole
        else run.plan.first_step(min(len(run.chain) + 1, len(run.plan.lengths)))
    )
    if train.eval_every and progress.step % train.eval_every == 0 and progress.step != end_of_link:
        evaluate_point(run, "step")
    if (
        train.save_every
        and run.directory
        and progress.step % train.save_every == 0
        and run.chain.live is not None
    ):
        progress.seconds = time.perf_counter() - began
        _checkpoint(run)


def _checkpoint(run: Run) -> None:
    assert run.directory is not None
    assert run.optimizer is not None
    link = replace(
        live_link(run.chain), num_steps=run.progress.step - run.plan.first_step(len(run.chain))
    )
    run.directory.save_checkpoint(link, run.optimizer, run.progress, run.config.model)


def _stop_non_finite(run: Run, step: int, loss: float, norm: float) -> None:
    assert run.optimizer is not None
    run.optimizer.zero_grad(set_to_none=True)
    where = ""
    if run.directory is not None and run.chain.live is not None:
        _checkpoint(run)
        where = f"; the state before it is kept in {run.directory.path}"
    raise DivergedError(
        f"the loss and its gradient must be finite (got loss {loss}, gradient norm {norm} at step "
        f"{step + 1}, link {len(run.chain)}){where}; lower train.lr or check the rows of that step"
    )


def _final_metrics(run: Run) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in ("validation", "test"):
        examples = getattr(run.splits, name)
        if examples:
            known = run.last_scored if name == "validation" else None
            scored = known or score(run, examples)
            metrics[name] = dict(scored.metrics)
            run.listener({"event": "scored", "split": name, "predictions": scored.predictions})
            if run.splits.metric in INDEX_METRICS:
                metrics[name]["majority"] = majority_rate(examples)
    return metrics


# --- the end ---


def _finish(run: Run, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    config, progress = run.config, run.progress
    progress.seconds = seconds
    if config.chain.tune == "full":
        trained = sum(parameter.numel() for parameter in run.chain.model.parameters())
    else:
        trained = max((num_trained(link) for link in run.chain.links), default=0)
    result = {
        "format": store.FORMAT,
        "model": config.model,
        "task": config.data.task,
        **results,
        "best": progress.best,
        "links": [store.describe_link(link) for link in run.chain.links],
        "steps": progress.step,
        "tokens": progress.tokens,
        "scored_tokens": progress.scored_tokens,
        "rows": len(run.splits.train),
        "rows_digest": run.splits.digest,
        "base_fingerprint": run.base["fingerprint"],
        "wall_s": round(seconds, 2),
        "peak_memory_mb": peak_memory_mb(),
        "trainable_parameters": trained,
        "versions": store.versions(),
        "hardware": hardware(run.accelerator.device),
    }
    if run.directory is not None:
        if config.train.keep_best and progress.best is not None:
            everything = run.directory.manifest()
            selected = {
                "num_links": progress.best["num_links"],
                "partial": None,
                "step": progress.best["step"],
            }
            if run.best_link is not None:
                selected["partial"] = store.describe_link(run.chain.links[-1]) | {
                    "directory": "best"
                }
            store.write_json(
                run.directory / "chain.json",
                everything | {"selected": selected, "progress": asdict(progress)},
            )
        else:
            write_manifest(run)
        run.directory.drop_checkpoints()
        if config.chain.tune == "full":
            model: Any = (
                run.chain.model
            )  # there are no links: the weights themselves are the result
            model.save_pretrained(run.directory / "model")
            run.tokenizer.save_pretrained(run.directory / "model")
        store.write_json(run.directory / "result.json", result)
    if config.train.trackers:
        run.accelerator.end_training()
    run.lanes.close()
    restore_model(run.chain.detach())
    return result


def _tune_everything(run: Run, began: float) -> None:
    """Full fine-tuning, the rival that trains every weight: float32 only, no links, no
    checkpoints."""
    model = run.chain.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    run.optimizer = full_optimizer(model.parameters(), run.config.train)
    with ThreadPoolExecutor(1) as packer:
        for work in packed_steps(run, packer, 0, run.plan.num_steps):
            _update(run, work, began)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    evaluate_point(run, "knot")
