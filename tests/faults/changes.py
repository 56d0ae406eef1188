"""Numbers that are no numbers, signals at any moment, killed experiments."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from classes import Case, World, repaired
from injection import Injection
from lives import End, fresh, live, run, run_with_signals

from chainlora import train
from chainlora.config.schema import RunConfig
from chainlora.runs.state import open_run
from chainlora_lab import make_experiment, run_cells

# --- numbers that are no numbers


def not_finite(world: World) -> Iterator[tuple[str, Case]]:
    """Yield cases of rates that make losses, gradients or weights infinite: an error of ours, and a
    lower rate by name ends with finite links."""
    for dtype in ("float32", "bfloat16"):
        for norm in (1.0, None):
            for rate in (10.0, 1e2, 1e3):
                keys = {"lr": rate, "max_grad_norm": norm, "dtype": dtype}
                yield f"rate {rate:.0e}, norm {norm}, {dtype}", partial(_not_finite, world, keys)


def _not_finite(world: World, keys: dict[str, Any]) -> str:
    where = fresh(world.folder / "not-finite")
    end = live(partial(run, world.config(where, train=keys)))
    if end.status == 2 or "unexpected" in end.message:
        return f"wrong: {end.message[-600:]}"
    if end.status == 1 and "lower train.lr" not in end.message:
        return f"wrong: no remedy: {end.message}"
    if (where / "run").exists():
        lower = world.config(where, train=keys | {"lr": 1e-3})
        if end.status == 1:
            again = live(partial(_with_another_rate, lower))
            if again.status != 0:
                return f"wrong: {again.message[-600:]}"
        for link in open_run(where / "run").links():
            for factors in link.factors.values():
                if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
                    return "wrong: a link that is not finite"
    return "refused" if end.status == 1 else "right"


def _with_another_rate(config: RunConfig) -> None:
    train(config, resume=True, change=["train.lr"])


# --- Ctrl-C at any moment, not only at file operations


def at_any_moment(world: World, seed: int = 0) -> Iterator[tuple[str, Case]]:
    """Yield cases of signals at times spread over a run: once, or twice a moment apart."""
    draw = random.Random(seed)
    for number in range(60):
        after = draw.uniform(0.0, 1.2)
        again = draw.choice([None, 0.0, 0.02, 0.1])
        name = draw.choice(["SIGINT", "SIGTERM"])
        case = f"{number}: {name} after {after:.3f} s" + ("" if again is None else f" and {again}")
        yield case, partial(_at_a_moment, world, number, name, after, again)


def _at_a_moment(world: World, number: int, name: str, after: float, again: float | None) -> str:
    where = fresh(world.folder / f"moment-{number}")
    config = world.config(where)
    waits = [again] if again is not None else []

    def strike(*_: Any) -> None:
        if waits:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, waits.pop()))
        signal.raise_signal(getattr(signal, name))

    def work() -> None:
        signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, after))
        try:
            run_with_signals(config)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    end = live(work)
    if end.status < 0:  # SIGTERM outside `interruptible`: as for any program
        end = End(-9, "", [])
    if not (where / "run").exists():
        shutil.rmtree(where)
        return "refused" if end.status else "wrong: no run"
    found = repaired(world, where, end)
    shutil.rmtree(where)
    return found


# --- experiments


def _experiment(world: World) -> Any:
    data = {split: str(world.data / f"{name}.jsonl") for split, name in
            (("train", "train"), ("validation", "validation"), ("test", "validation"))}  # fmt: skip
    numbers = {"num_train": 8, "num_validation": 4, "num_test": 4}
    return make_experiment(
        {
            "name": "killed",
            "base": {
                "model": str(world.base),
                "recipe": {"rank": 2, "steps": 2, "scaling": 2},
                "data": data | numbers,
                "chain": {"target_modules": ["q_proj"]},
                "train": {"batch_size": 4},
            },
            "tasks": {"mood": {"data": {"task": str(world.data / "task.yaml")}}},
            "methods": ["lora", "chain2"],
            "seeds": [0],
            "curve_points": 0,
        }
    )


def _run_experiment(world: World, where: Path) -> None:
    run_cells(_experiment(world), where / "out", backend="inline")


def _scores(where: Path) -> list[Any]:
    """All that a result says but when and how fast."""
    left_out = ("wall_s", "peak_rss_mb", "checksum", "hardware")
    lines = (where / "out" / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in left_out} for line in lines]


def of_experiments(world: World) -> Iterator[tuple[str, Case]]:
    """Yield a case for each file operation of an experiment of two cells: killed there, or the disk
    full from there on, the same command ends it with the same scores."""
    where = fresh(world.folder / "experiment")
    counted = live(partial(_run_experiment, world, where), Injection(where))
    assert counted.status == 0, counted.message
    scores = _scores(where)
    for kind in ("kill", "tear", "ENOSPC"):
        for number, name in enumerate(counted.operations):
            if kind != "kill" and "/run/" in name:
                continue  # the run's own files: the classes above
            case = f"{kind} {number} {name}"
            yield case, partial(_killed_experiment, world, number, kind, scores)


def _killed_experiment(world: World, number: int, kind: str, scores: list[Any]) -> str:
    where = fresh(world.folder / f"experiment-{kind}-{number}")
    work = partial(_run_experiment, world, where)
    end = live(work, Injection(where, kind, number, kind == "ENOSPC"))
    if end.status == 2:
        return f"wrong: {end.message[-600:]}"
    again = live(work)
    if again.status != 0:
        return f"wrong: the same command ended with {again.status}: {again.message[-600:]}"
    if _scores(where) != scores:
        return "wrong: other scores"
    shutil.rmtree(where)
    return "refused" if end.status == 1 else "right"


MORE = {
    "experiment killed, torn or disk full at every file operation": of_experiments,
    "Ctrl-C or SIGTERM at any moment": at_any_moment,
    "weights, losses, gradients not finite": not_finite,
}
