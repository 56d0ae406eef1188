"""`ChainCallback`: make a run of transformers' Trainer, or of a trainer of TRL, a chain.

The trainer keeps its loop, batches, optimizer and checkpoints. The callback drives the same `Chain`
as every other loop: it counts each step, asks a knot policy, and ties and extends before the next
step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from transformers import TrainerCallback, TrainerState, TrainingArguments

from chainlora.chain.adapters import num_trained
from chainlora.chain.chain import Chain
from chainlora.config.messages import problems
from chainlora.config.schema import ChainConfig, KnotConfig, LinkConfig
from chainlora.errors import ChainError, ConfigError, RunError
from chainlora.knots.driver import Knots, check_policy
from chainlora.knots.numbers import Numbers, Spacing, Spacings, asks_for_tokens, spacings
from chainlora.knots.policy import Knot, KnotPolicy
from chainlora.models.modes import kept_random_state
from chainlora.runs.loading_start import NOTHING, load_start
from chainlora.training.processes import Processes, num_launched
from chainlora_trainer import restarts
from chainlora_trainer.lengths import (
    Epochs,
    Lengths,
    check_knots,
    find_trainer_processes,
    learned_a_step,
    link_lengths,
    steps_per_epoch,
)
from chainlora_trainer.wrapped_chain import WrappedChain, settings_of

logger = logging.getLogger(__name__)


class ChainCallback(TrainerCallback):
    """Turns a trainer's run on a PEFT model into a chain of LoRA (arXiv 2401.04151).

    Pass it in the trainer's `callbacks`. The LoRA of the model defines a link: rank, alpha, target
    modules. One of `steps`, `epochs` or `ranks` defines the knots.

    If the LoRA is already trained, it becomes the first link, and a new link follows. If an earlier
    trainer made the model a chain, that chain continues.

    Args:
        ranks: rank of each link; the first must be the LoRA's rank. Without `steps` and `epochs`,
            the links share the run evenly.
        steps: a number is the distance between knots; a list has the steps of each link.
        epochs: the same in epochs.
        knots: soft knots inside each link, ``"auto"`` or the keys of ``chain.knots``. Without
            `ranks`, `steps` and `epochs`, the run is one link.
        policy: decides after every step instead (`chainlora.knots.policy.KnotPolicy`).
        alpha_policy: for links of other ranks: "proportional" keeps the scaling, "fixed" alpha.
        optimizer_reset: "full" clears the optimizer's state at a knot; "off" keeps it, and needs
            equal ranks.
        restart_schedule: run the trainer's whole schedule, including warm-up, in each link.
        start: a finished run, a saved chain, or the folder or Hub id of a LoRA. The chain begins
            with its links; the model's own LoRA must be untrained.
        seed: for the initialization of links; None takes the trainer's seed.

    Raises:
        ConfigError: contradicting arguments, here or when training begins.
        ChainError: the callback is used for a second trainer, or another loop changed the chain.
        RunError: a checkpoint does not match the settings.
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        *,
        steps: Lengths = None,
        epochs: Epochs = None,
        knots: KnotConfig | Mapping[str, Any] | Literal["auto"] | None = None,
        policy: KnotPolicy | None = None,
        alpha_policy: Literal["proportional", "fixed"] = "proportional",
        optimizer_reset: Literal["full", "off"] = "full",
        restart_schedule: bool = False,
        start: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        check_knots(ranks, steps, epochs)
        if ranks is None and steps is None and epochs is None and knots is None:
            raise ConfigError(
                "a chain needs knots (got none of steps, epochs, ranks, knots); give for example "
                "steps=100, or ranks=[8, 8]"
            )
        if optimizer_reset not in ("full", "off"):
            raise ConfigError(f"`optimizer_reset` must be full or off (got {optimizer_reset!r})")
        self.ranks, self.steps, self.epochs = ranks, steps, epochs
        self.knots, self.policy, self.alpha_policy = knots, policy, alpha_policy
        self.optimizer_reset, self.seed = optimizer_reset, seed
        self.restart_schedule, self._start = restart_schedule, start
        self._moves = False  # whether knots change the model without its live link
        self._wrapped: WrappedChain | None = None
        self._processes = Processes(0, 1, torch.device("cpu"))  # replaced when a trainer is made
        self._settings: dict[str, Any] = {}  # of the model's own LoRA

    def __repr__(self) -> str:
        chain = "not in a trainer yet" if self._wrapped is None else repr(self.chain)
        return f"<ChainCallback: {chain}>"

    @property
    def chain(self) -> Chain:
        """Return the chain. Its last link is live even after training; `chain.tie()` ends it."""
        return self._need().chain

    # --- called by the trainer ---

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the first link, before the trainer makes an optimizer or loads a checkpoint."""
        self._begin(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the links of the run, and check chain, optimizer and schedule."""
        model, optimizer, scheduler = (kwargs[k] for k in ("model", "optimizer", "lr_scheduler"))
        if self._wrapped is None:
            if state.global_step or num_launched() > 1:  # DDP has wrapped the model already
                case = "to resume" if state.global_step else "in several processes"
                raise ConfigError(
                    f"{case}, a trainer needs ChainCallback when it is made (got it by "
                    "add_callback); pass it in `callbacks`"
                )
            self._begin(args, model)
        if self._need().model is not model:
            raise ConfigError(
                "the trainer must train the model that it was made with (got another model, for "
                "example from model_init); pass `model`"
            )
        self._plan(args, state, kwargs.get("train_dataloader"))
        self._moves = bool(self.policy or self.knots or len(self._knots.links) > 1)
        self._check_place(state)
        self._trained.take_over(optimizer, self._processes)
        self._check_knots(args, optimizer, scheduler)
        if self.restart_schedule:
            self._restart_schedule(scheduler, args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tie the knot that the policy requests after the previous step.

        It is tied here and not at the end of that step, so that the trainer evaluates and saves the
        link that made the step.
        """
        optimizer = kwargs["optimizer"]
        knot = self._knot(state, optimizer)
        if knot is None:
            return
        if not knot.ends_link:
            self._need().check_finite()
            self._knots.tie_share(knot, optimizer)
        elif not self._knots.is_last:
            self._next_link(state, optimizer)
            if self.restart_schedule:
                self._restart_schedule(kwargs["lr_scheduler"], args)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step before any other callback can save it."""
        self.chain.count_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the training when the policy ends the last link."""
        self._check_step(state)
        if self._knots.is_last:
            knot = self._knot(state, kwargs["optimizer"])
            if knot is not None and knot.ends_link:
                control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the number of the link to every record of losses or scores."""
        logs = kwargs.get("logs")
        if logs is None or self._wrapped is None or "train_runtime" in logs:
            return
        chain = self.chain
        if not chain.live_steps:  # the model before training
            return
        # Scores keep their prefix: notebooks and model cards make the title of a column from it.
        prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
        logs[f"{prefix}link"] = len(chain)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1][f"{prefix}link"] = len(chain)

    # --- setup ---

    def _begin(self, args: TrainingArguments, model: Any) -> None:
        if self._wrapped is not None:
            raise ChainError(
                "a ChainCallback works for one trainer (got a second one); make a new callback"
            )
        self._processes = find_trainer_processes(args, model)
        self._settings = settings_of(model)
        if self.ranks is not None and self.ranks[0] != self._settings["rank"]:
            raise ConfigError(
                "`ranks` must begin with the rank of the model's LoRA (got "
                f"{self.ranks[0]} and r={self._settings['rank']}); change one of them"
            )
        config = self._chain_config(1)
        if config.knots is not None:
            check_policy(config.knots)
        self._trained = restarts.Trained(model)
        seed = args.seed if self.seed is None else self.seed
        first = config.links()[0]
        start = NOTHING if self._start is None else load_start(self._start)
        self._wrapped = WrappedChain(
            model, seed, first, start, writes=args.should_save, switch_off=self._check_reference
        )
        self._begun_on = [link.config for link in self.chain.links]
        self._wrapped.extend(first)

    def _chain_config(self, num_links: int) -> ChainConfig:
        """Return the chain as a config; without `ranks`, every link has the LoRA's rank."""
        keys = {key: value for key, value in self._settings.items() if key != "rank"}
        ranks = self.ranks or [self._settings["rank"]] * num_links
        keys |= {"ranks": ranks, "knots": self.knots, "alpha_policy": self.alpha_policy}
        try:
            return ChainConfig(**keys)
        except ValidationError as error:
            raise ConfigError(problems(error, ChainConfig)) from None

    def _plan(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        num_links = None if self.ranks is None else len(self.ranks)
        per_epoch = steps_per_epoch(loader, args)
        lengths = link_lengths(num_links, self.steps, self.epochs, state.max_steps, per_epoch)
        config, wrapped = self._chain_config(len(lengths)), self._need()
        soft: Spacings = ()
        if state.global_step and wrapped.numbers is not None:
            soft = wrapped.numbers.knots  # a resume keeps them
            _check_spacings(config.knots, soft)
        if config.knots is not None and len(soft) < len(lengths):
            learned = [math.nan] * len(lengths)  # tokens per step and trained parameter, by link
            if asks_for_tokens(config.knots):
                with kept_random_state(self.chain.model):
                    per_step = learned_a_step(loader, args, self._processes.count)
                live: Any = self.chain.live
                learned = [per_step / num_trained(e.rank, live.layers) for e in config.links()]
            soft += spacings(config.knots, lengths, learned)[len(soft) :]
        wrapped.numbers = Numbers(tuple(lengths), soft[: len(lengths)])
        self._knots = Knots(
            wrapped.chain, config, wrapped.numbers, policy=self.policy, first=wrapped.first
        )
        ranks = [link.rank for link in self._knots.links]
        if self._processes.count > 1 and len(set(ranks)) > 1:
            raise ConfigError(
                f"in several processes all ranks must be equal (got {ranks}), as the trainer's DDP "
                "knows only the first link's parameters; change them, or use `chainlora train`"
            )
        if self.optimizer_reset == "off" and len(set(ranks)) > 1:
            raise ConfigError(
                "`optimizer_reset: off` keeps moments at a knot, so all ranks must be equal (got "
                f"{ranks}); use optimizer_reset='full'"
            )

    def _check_place(self, state: TrainerState) -> None:
        """Raise unless the chain is at the trainer's step, and its links follow the plan."""
        chain = self.chain
        if chain.live is None:
            raise ChainError(
                "a trainer needs a live link (got a chain whose links are all tied); begin with a "
                "new model, callback and trainer"
            )
        configs = [*(link.config for link in chain.links), chain.live.config]
        planned = [*self._begun_on, *self._knots.links]
        modules: list[Iterable[str]] = [*(link.factors for link in chain.links), chain.live.layers]
        if [*map(_by_paths, configs, modules)] != [*map(_by_paths, planned, modules)]:
            raise RunError(
                "a resumed chain must have the links of its checkpoint (got ranks "
                f"{[config.rank for config in configs]}, planned "
                f"{[config.rank for config in planned]}, or other settings of the LoRA); use "
                "the settings of the checkpoint, and its `start`"
            )
        self._check_step(state)
        ended = [link.num_steps for link in chain.links[self._need().first :]]
        lengths = list(self._knots.numbers.lengths)
        if self.policy is None and ended != lengths[: len(ended)]:
            raise RunError(
                f"a resumed chain must have the knots of its checkpoint (got links of {ended} "
                f"steps, planned {lengths}); use the settings of the checkpoint"
            )

    def _check_step(self, state: TrainerState) -> None:
        """Raise unless the chain has counted every step of the trainer, and no others."""
        done = self._knots.first_step + self.chain.live_steps
        if done != state.global_step:
            raise ChainError(
                f"chain and trainer must be at one step (got {done} and {state.global_step}); "
                "resume from a checkpoint, or begin with a new model, trainer and one ChainCallback"
            )

    def _check_knots(self, args: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Raise ConfigError unless optimizer and schedule can pass the planned knots."""
        num_links, soft = len(self._knots.links), self._chain_config(1).knots
        carries = soft is not None and soft.moments == "carried"
        is_new = (self.optimizer_reset == "full" and num_links > 1) or not (carries or soft is None)
        if num_links > 1 or is_new or self.policy is not None:
            restarts.check_restart(optimizer, is_reset=is_new)
        if carries:
            restarts.check_carried(optimizer)
        if self.restart_schedule:
            restarts.check_schedule(scheduler, args, self._knots.num_steps)

    def _check_reference(self) -> None:
        """Raise ConfigError for `disable_adapter()` as a reference if knots change the model."""
        if self._moves:
            raise ConfigError(
                "disable_adapter() is not a reference after a knot",
                "a chain with knots, which stay in the model",
                "set precompute_ref_log_probs=True, or give ref_model (GRPO has neither: beta=0); "
                "name rows to score in eval_dataset; for the base, load it anew",
            )

    # --- knots ---

    def _knot(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> Knot | None:
        if not self.chain.live_steps:
            return None
        logged = (
            float(record["loss"]) for record in reversed(state.log_history) if "loss" in record
        )
        return self._knots.after_step(next(logged, math.nan), restarts.rate_factor(optimizer))

    def _next_link(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        self._processes.check_same(self.chain.parameters())
        link = self._need().tie()
        logger.info("link %d tied after step %d", link.index, state.global_step)
        steps = {"link_steps": link.num_steps, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append({"knot": link.index} | steps)
        self._need().extend(self._knots.next_link)
        if self.optimizer_reset == "full":
            optimizer.state.clear()  # including step counts, as in a new optimizer
        self._trained.follow(optimizer, self._processes)

    def _restart_schedule(self, scheduler: Any, args: TrainingArguments) -> None:
        restarts.restart_schedule(scheduler, args, self._knots.first_step, self._knots.length)

    def _need(self) -> WrappedChain:
        if self._wrapped is None:
            raise ChainError(
                "callback.chain exists once the trainer is made (got no trainer); pass the "
                "callback in `callbacks`"
            )
        return self._wrapped


def _by_paths(config: LinkConfig, modules: Iterable[str]) -> LinkConfig:
    """Return a link's config; if it excludes modules, replace patterns by the adapted paths."""
    if config.exclude_modules is None:
        return config
    paths = {"target_modules": tuple(sorted(modules)), "exclude_modules": None}
    return config.model_copy(update=paths)


def _check_spacings(soft: KnotConfig | None, stored: Spacings) -> None:
    """Raise RunError unless soft knots could be the stored ones, as far as they give numbers."""
    if soft is None and not stored:
        return
    if soft is not None and stored and all(_fits(soft, each) for each in stored):
        return
    given = None if soft is None else soft.model_dump(exclude_defaults=True) or "auto"
    raise RunError(
        "a resumed chain must have the soft knots of its checkpoint",
        f"knots {given}, stored {[each and each._asdict() for each in stored] or None}",
        "use the settings of the checkpoint",
    )


def _fits(soft: KnotConfig, stored: Spacing | None) -> bool:
    if stored is None:  # turned off, as only auto is
        return soft == KnotConfig()
    share, tau = soft.share, soft.time_constant
    if tau is not None:
        share = -math.expm1(-stored.every / tau)
    return soft.every in (None, stored.every) and share in (None, stored.share)
