"""Run the lab: ``python benchmarks/lab/run.py [--plan FILE] [--out FILE] [--study NAME]``.

A plan is a list of studies (text, rank, steps), each with arms. For every arm some learning rates
are tried on tuning seeds, then the best one is run on fresh seeds. One JSON line a finished cell is
appended to the output; cells that are there are skipped, so a run can be killed and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from arms import Arm, make
from model import Stacks, compiled
from search import best_rate, is_settled, next_rate
from source import HERE, TextTokenizer, data_folder, load_tiny, model_folder
from texts import Text, batches, load_text
from torch import Tensor

ROWS, LENGTH = 4, 64  # blocks a step unless a study says `rows`, tokens a block
WARMUP = 0.02  # of the steps
POINTS = 8  # of a curve, at equal distances


def main() -> None:
    """Parse, run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cells.jsonl")
    parser.add_argument("--model", help="folder of a Llama; default: stories260k, or made now")
    parser.add_argument("--study", help="only the study of this name")
    parser.add_argument("--plain", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    lab = Lab(model_folder(options.model), options.out, plain=options.plain)
    for study in plan["studies"]:
        if options.study in (None, study["name"]):
            run_study(lab, plan, study)


def run_study(lab: Lab, plan: dict[str, Any], study: dict[str, Any]) -> None:
    """Tune every arm of a study, then run all of them on one fresh seed after the other."""
    rates = {name: tuned_rate(lab, plan, study, name) for name in study["arms"]}
    finalists = [name for name in study["arms"] if name not in study.get("gate", [])]
    for seed in study.get("seeds", plan["seeds"]):
        for name in finalists:
            arm, _ = arm_of(plan, study, name)
            lab.cell(study, name, arm, rates[name], seed, "results")


def tuned_rate(lab: Lab, plan: dict[str, Any], study: dict[str, Any], name: str) -> float:
    """Return an arm's best learning rate on the tuning seeds; `search.py` has the rule."""
    arm, guess = arm_of(plan, study, name)
    seeds = study.get("tuning_seeds", plan["tuning_seeds"])
    if "at" in study:  # this rate, without a search
        for seed in seeds:
            lab.cell(study, name, arm, study["at"], seed, "tuning")
        return float(study["at"])
    tried: dict[float, float] = {}
    tries = study.get("tries", plan["tries"])
    while not is_settled(tried, tries):
        lr = next_rate(tried, guess)
        losses = [lab.cell(study, name, arm, lr, seed, "tuning") for seed in seeds]
        tried[lr] = statistics.fmean(losses)
    return best_rate(tried)


def arm_of(plan: dict[str, Any], study: dict[str, Any], name: str) -> tuple[Arm, float]:
    """Return an arm of the plan at a study's rank, and the first guess of its learning rate."""
    keys = {"rank": study["rank"]} | (plan["arms"][name] or {})
    guess = keys.pop("lr", None) or study["lr"]
    return Arm(**keys), guess


class Lab:
    """The model, its texts, and the file of finished cells."""

    def __init__(self, folder: Path, out: Path, *, plain: bool = False) -> None:
        self.folder, self.out, self.plain = folder, out, plain
        self.tiny = load_tiny(folder, LENGTH)
        self.gradients, self.loss = compiled(self.tiny, plain=plain)
        self.texts: dict[str, Text] = {}
        self._zero_shot: dict[str, float] = {}
        self.done = {cell["key"]: cell for cell in read_cells(out)}

    def cell(
        self, study: dict[str, Any], name: str, arm: Arm, lr: float, seed: int, phase: str
    ) -> float:
        """Return a cell's final held-out loss, run now if it is not there; ∞ if it diverged."""
        config = {
            "model": self.folder.name,
            "text": study["text"],
            "steps": study["steps"],
            "rows": study.get("rows", ROWS),
            "length": LENGTH,
            "arm": arm.named(),
            "lr": lr,
            "seed": seed,
            "held_out": phase,
        }
        key = key_of(config)
        if key not in self.done:
            self.done[key] = self._run(key, config, arm, study["name"], name)
            append(self.out, self.done[key])
        loss = self.done[key]["loss"]
        return math.inf if loss is None else loss

    def _run(
        self, key: str, config: dict[str, Any], arm: Arm, study: str, name: str
    ) -> dict[str, Any]:
        started, cpu = time.perf_counter(), time.process_time()
        curve = self._train(config, arm)
        loss = curve[-1][1]
        cell = {
            "key": key,
            "study": study,
            "name": name,
            "loss": loss if math.isfinite(loss) else None,
            "curve": [[step, round(value, 6)] for step, value in curve if math.isfinite(value)],
            "config": config,
            "seconds": round(time.perf_counter() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "kernel": "eager" if self.plain else "compiled",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(),
        }
        print(
            f"{study} {name} lr {config['lr']:.4g} seed {config['seed']}: {loss:.4f} "
            f"({cell['seconds']} s)",
            flush=True,
        )
        return cell

    def _train(self, config: dict[str, Any], arm: Arm) -> list[tuple[int, float]]:
        """Train a cell and return its curve, (step, held-out loss)."""
        text, steps = self._text(config["text"]), config["steps"]
        tuning = config["held_out"] == "tuning"
        held_out = text.tuning if tuning else text.results
        points = {steps} if tuning else {round(k * steps / POINTS) for k in range(1, POINTS + 1)}
        tokens = config["rows"] * config["length"]
        trained = make(arm, self.tiny, config["seed"], config["lr"], steps, warmup(steps), tokens)
        curve = [] if tuning else [(0, self.zero_shot(config["text"]))]
        for step, batch in enumerate(batches(text.train, config["rows"], steps, config["seed"])):
            gradients, loss = self.gradients(trained.stacks(), batch)
            if not math.isfinite(loss.item()):
                return [*curve, (step, math.inf)]
            trained.step(gradients, step)
            if step + 1 in points:
                curve.append((step + 1, self.evaluate(trained.result(), held_out)))
        return curve

    def evaluate(self, stacks: Stacks, blocks: Tensor) -> float:
        """Return the mean loss on blocks."""
        with torch.no_grad():
            losses = [self.loss(stacks, part) for part in blocks.split(50)]
        return torch.stack(losses).mean().item()

    def zero_shot(self, text: str) -> float:
        """Return the loss of the model as it is, on the blocks for results."""
        if text not in self._zero_shot:
            self._zero_shot[text] = self.evaluate(self.tiny.stacks, self._text(text).results)
        return self._zero_shot[text]

    def _text(self, name: str) -> Text:
        if name not in self.texts:
            shared = data_folder()
            data = None if shared is None else shared / "data"
            self.texts[name] = load_text(name, TextTokenizer(self.folder), LENGTH, data)
        return self.texts[name]


def warmup(steps: int) -> int:
    """Return the steps over which the learning rate rises."""
    return max(1, round(WARMUP * steps))


def key_of(config: dict[str, Any]) -> str:
    """Return the name of a cell: equal configs, equal keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the finished cells of a file; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append(path: Path, cell: dict[str, Any]) -> None:
    """Append one line; a cut-off line before it is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(cell).encode() + b"\n")


def versions() -> dict[str, str]:
    """Return the versions that matter."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> str:
    """Return the processor in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, 1 thread"


if __name__ == "__main__":
    sys.exit(main())
