"""Stages learned one after the other by a LoRA with something added to its loss (`ways`).

The loop is chainlora's own, with two changes to what it holds: the objective adds the penalty, and
where one LoRA goes on, the new one begins as the one before ended. So rows, steps, resume and what
a run keeps are those of any stage. Each stage is a run of its own, or with `grows` all are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from chainlora import open_run
from chainlora.config.staging import Stage
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.files import write_tensors
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState
from chainlora.training.events import Listener
from chainlora.training.loop import tuned
from chainlora.training.objectives import Objective, make_objective
from chainlora.training.plan import make_plan
from chainlora.training.reconcile import carry_out
from chainlora.training.result import TrainResult
from chainlora.training.run import Run
from chainlora_lab.ways.regularisers import Regulariser

ROWS = 64  # kept rows of a stage that are read again, as many as a combination reads


def learn_in_turn(
    stages: Sequence[Stage],
    folder: Path,
    regulariser: Regulariser,
    base: OpenBase,
    listener: Listener = lambda event: None,
) -> dict[str, OpenState]:
    """Train what is left of some stages in a folder; return the state at the end of each."""
    if regulariser.grows:
        _train(stages, folder, _Turn(regulariser), base, listener)
        return {stage.name: open_run(folder).at(stage.name) for stage in stages}
    found: dict[str, OpenState] = {}
    for stage in stages:
        before = [*found.values()][-1] if found else None
        turn = _Turn(regulariser, before, folder / f"{stage.name}.safetensors")
        if before is not None:
            later = stage.config.model_copy(update={"start_data": "none"})
            stage = replace(stage, config=later)
            turn.known = folder / f"{before.key}.safetensors"
        _train([stage], folder / stage.name, turn, base, listener)
        found[stage.name] = open_run(folder / stage.name)
    return found


def check_in_turn(stages: Sequence[Stage]) -> None:
    """Raise ConfigError unless one LoRA can go on through all stages."""
    if wrong := [stage.name for stage in stages if stage.config.data.replay]:
        rule = "one LoRA that goes on reads no rows of earlier stages"  # each is a run of its own
        raise ConfigError(rule, f"data.replay in {wrong[0]}", "leave it out, or take preset replay")
    chains = [stage.config.chain for stage in stages]
    kinds = {
        (c.ranks, c.alpha, c.rslora, str(c.target_modules), str(c.exclude_modules)) for c in chains
    }
    is_more = any(c.lora_bias or c.knots for c in chains)
    if is_more or len(kinds) > 1 or len(chains[0].ranks) != 1:
        raise ConfigError(
            "one LoRA that goes on needs one link in each stage, all of one size, without "
            "lora_bias and knots",
            "; ".join(f"ranks {[*c.ranks]}, alpha {c.alpha}" for c in chains),
            "set `chain` beside `stages`, for all of them",
        )


def _train(
    stages: Sequence[Stage], folder: Path, turn: _Turn, base: OpenBase, listener: Listener
) -> None:
    placed = [
        replace(each, config=each.config.model_copy(update={"output": str(folder)}), beside=False)
        for each in stages
    ]
    carry_out(make_plan(placed, base=base), listener, base=base, loop=turn)


@dataclass
class _Turn:
    """The loop of a stage. Of one LoRA, `before` is the state that it goes on from; `known` holds
    what was remembered before that stage, `file` gets what is after it."""

    regulariser: Regulariser
    before: OpenState | None = None
    file: Path = Path()
    known: Path = Path()
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, run: Run) -> TrainResult:
        extend: Callable[..., Any] = run.chain.extend
        if self.before is None:
            self._penalise(run)
        else:
            run.chain.extend = partial(self._going_on, run, extend)  # type: ignore[method-assign]
        return tuned(run)

    def _penalise(self, run: Run) -> None:
        penalty = partial(self._penalty, run)
        run.objective = cast(Objective, _Penalised(run.objective, penalty))

    def _penalty(self, run: Run) -> Tensor | float:
        return self.regulariser.penalty(parameters(run), self.memory, run.chain.links)

    def _going_on(self, run: Run, extend: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        """Extend the chain by a LoRA that is what the one before was, and remember its stage."""
        assert self.before is not None
        adapter = extend(*args, **keys)
        (link,) = self.before.links()
        ended = {f"A/{name}": each.a for name, each in link.factors.items()}
        ended |= {f"B/{name}": each.b for name, each in link.factors.items()}
        run.chain.load_live_state(ended, 0)
        run.engine.adapt(adapter.layers.values())
        if not self.file.exists():
            known = load_file(self.known) if self.known.is_file() else {}
            kept = self.before.kept([self.before.key])[self.before.key]
            rows = list((kept.train or kept.validation).spread(ROWS))
            objective = make_objective(kept.loss, run.train)  # theirs, not that of the new stage
            found = self.regulariser.remember(
                known,
                {n: p.detach() for n, p in parameters(run).items()},
                gradients(run, rows, objective),
            )
            write_tensors(self.file, {n: each.contiguous() for n, each in found.items()})
        device = run.processes.device
        self.memory = {n: each.to(device) for n, each in load_file(self.file).items()}
        self._penalise(run)
        return adapter


def parameters(run: Run) -> dict[str, Tensor]:
    """Return the parameters of the LoRA that is trained, as ``A/MODULE`` and ``B/MODULE``."""
    assert run.chain.adapter is not None
    return {
        f"{part}/{name}": next(iter(getattr(layer, f"lora_{part}").values())).weight
        for part in "AB"
        for name, layer in run.chain.adapter.layers.items()
    }


def gradients(
    run: Run, rows: Sequence[Example], objective: Objective
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the summed loss of each row."""
    named = parameters(run)
    run.chain.model.eval()
    for row in rows:
        run.engine.add_gradients(
            [objective.collate(run.engine, [row])],
            [cast(Parameter, p) for p in named.values()],
            loss=partial(objective.loss, run.engine),
            count=objective.count,
            terms=1,
        )
        yield {name: p.grad for name, p in named.items() if p.grad is not None}
        for p in named.values():
            p.grad = None


class _Penalised:
    """An objective with a penalty in its mean loss; all else is the objective's own."""

    def __init__(self, own: Objective, penalty: Callable[[], Tensor | float]) -> None:
        self._own, self._penalty = own, penalty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def loss(self, engine: Engine, batch: Any) -> Tensor:
        """Return the loss of a batch and its share of the penalty, of all terms of the step."""
        return self._own.loss(engine, batch) + self._own.count(batch) * self._penalty()
