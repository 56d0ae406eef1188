"""A sequence of data sets, learned in one of several ways: what a cell trains, and what it reaches.

A way gives the update of the base at its end, and the state right after each stage. Rows that
stages kept are scored in these, by what the package's matrix scores them by: of several metrics,
the loss. Stages beside each other are trained once for all cells of a folder with equal configs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from filelock import FileLock
from torch import Tensor

from chainlora import Link, RunConfig, load_model, open_run
from chainlora import combine as combine_states
from chainlora.config.schema import LENGTHS, PAIR_LOSSES
from chainlora.config.staging import Stage
from chainlora.data.rows import Rows
from chainlora.data.splits import rows_of_an_epoch
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.evaluation.evaluate import evaluate
from chainlora.registry import entry
from chainlora.runs.entries import START
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.state import OpenState
from chainlora.training.events import EntryBuilt, Event
from chainlora.training.plan import default_epochs
from chainlora.training.result import TrainResult
from chainlora.training.stages import train_stages
from chainlora_lab.expansion import config_id
from chainlora_lab.in_turn import ROWS, check_in_turn, learn_in_turn
from chainlora_lab.loops import CellConfig
from chainlora_lab.methods import shipped_ways
from chainlora_lab.ways import COMBINERS, REGULARISERS
from chainlora_lab.ways.merging import added

Update = Sequence[Link] | Mapping[str, Tensor]  # links whose updates are added, or a dense one


@dataclass
class Learned:
    """What a way came to: the update at the end (None: each stage has its own model), and by stage
    the state right after it, whose run holds its rows and result.

    `others` are further entries that were trained, `seconds` is what was spent beside trainings.
    """

    end: Update | None
    states: Mapping[str, OpenState]
    others: Sequence[OpenState] = ()
    seconds: float = 0.0

    @cached_property
    def results(self) -> list[TrainResult]:
        found = [each.result() for each in (*self.states.values(), *self.others)]
        return [cast(TrainResult, each) for each in found if each is not None]


@dataclass(frozen=True)
class Case:
    """A cell of a sequence, and the folder of its run."""

    config: CellConfig
    run: Path = Path()

    @cached_property
    def base(self) -> OpenBase:
        return OpenBase.of_config(self.config)

    def stages(
        self, folder: Path | None = None, *, beside: bool = False, **keys: Any
    ) -> list[Stage]:
        """Return the stages of a run in `folder`, with `keys` changed in the config of each."""
        keys["output"] = str(folder or self.run)
        return [
            Stage(name, config.model_copy(update=keys), beside=beside and place > 0)
            for place, (name, config) in enumerate(self.config.stages)
        ]

    def trained(self, stages: Sequence[Stage]) -> OpenState:
        """Train what is left of some stages, and note the seconds of combinations."""
        run = Path(stages[0].config.output or "")

        def tell(event: Event) -> None:
            if isinstance(event, EntryBuilt) and event.kind == "combine":
                _note_seconds(run, event.seconds)

        train_stages(stages, listener=tell, matrix=False, base=self.base)
        return open_run(run)

    @cached_property
    def beside(self) -> OpenState:
        """Stages beside each other and their combination, which cells of a folder share."""
        shared = self.config.model_copy(update={"way": "combine", "settings": {}})
        folder = self.run.parents[2] / "beside" / config_id(shared)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return self.trained(self.stages(folder, beside=True))

    def states(self, run: OpenState) -> dict[str, OpenState]:
        return {name: run.at(name) for name, _ in self.config.stages}


def _seconds_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.seconds")


def _note_seconds(run: Path, seconds: float) -> None:
    with _seconds_file(run).open("a", encoding="utf-8") as file:
        file.write(f"{seconds:.2f}\n")


# --- ways of the package ---


def combine(case: Case, steps: int = 0, rank: int | None = None) -> Learned:
    """Stages beside each other, combined layer by layer, at the package's rank or another one."""
    run, is_changed = case.beside, steps or rank is not None
    if is_changed and not case.run.exists():
        began = time.monotonic()
        keeps = case.config.stages[-1][1].data.keep_conflicts  # as in the combination of the stages
        combine_states(run.run, rank=rank, keep_conflicts=keeps, steps=steps, output=case.run)
        _note_seconds(case.run, time.monotonic() - began)
    end = open_run(case.run) if is_changed else run
    noted = _seconds_file(end.run)
    seconds = sum(map(float, noted.read_text("utf-8").split())) if noted.exists() else 0.0
    return Learned(end.links(), case.states(run), [], seconds)


def alone(case: Case) -> Learned:
    """Each stage's own model on its own rows."""
    return Learned(None, case.states(case.beside))


def on_top(case: Case) -> Learned:
    """Each stage on top of those before."""
    run = case.trained(case.stages())
    return Learned(run.links(), case.states(run))


def base(case: Case) -> Learned:
    """Nothing is trained; rows are kept by stages without links."""
    return Learned([], case.states(case.trained(_without_links(case))))


def all_at_once(case: Case) -> Learned:
    """One LoRA on the rows of all stages, which stages without links keep before it."""
    run = case.trained([*_without_links(case), Stage("all_at_once", _of_all(case))])
    return Learned(run.links(), case.states(run), [run])


def _without_links(case: Case) -> list[Stage]:
    none = dict.fromkeys(LENGTHS) | {"ranks": (), "alpha": 16.0}
    return case.stages(chain=case.config.chain.model_copy(update=none))


def _of_all(case: Case) -> RunConfig:
    """Return the config of one stage on the rows of all, as long as all of them."""
    configs = [config for _, config in case.config.stages]
    first, files = configs[0], [file for each in configs for file in each.data.train_files]
    rows = {"train": files, "validation": None, "test": None}
    data = [each.data.model_copy(update=rows) for each in configs]
    if not all(each.data.train_files for each in configs) or any(
        (own, each.chain, each.train) != (data[0], first.chain, first.train)
        for own, each in zip(data, configs, strict=True)
    ):
        rule = "all_at_once learns the rows of all stages as one data set"
        remedy = "give stages files of their own, and set all else beside `stages`"
        raise ConfigError(rule, "stages with other keys of data, chain or train", remedy)
    whole = {
        key: tuple(len(configs) * each for each in getattr(first.chain, key))
        for key in ("steps", "tokens")
        if getattr(first.chain, key) is not None
    }
    if not first.chain.has_length:  # as many rows as the stages read by their own defaults
        counts = [rows_of_an_epoch(each.data, 10**12) for each in configs]
        read = sum(n * default_epochs(each.data) for n, each in zip(counts, configs, strict=True))
        whole = {"epochs": (read / sum(counts),) * len(first.chain.ranks)}
    chain = first.chain.model_copy(update=whole)
    keys = {"data": data[0], "chain": chain, "output": str(case.run), "start_data": None}
    return first.model_copy(update=keys)


# --- ways of the two registries ---


def _merged(case: Case, name: str) -> Learned:
    """Merge the stages beside each other by an entry of `COMBINERS`, on the base in float32."""
    states, began = case.states(case.beside), time.monotonic()
    links = {name: state.links() for name, state in states.items()}
    kept = {name: each.train or each.validation for name, each in case.beside.kept().items()}
    rows = {n: [[*row.right.sequences[0]] for row in kept[n].spread(ROWS)] for n in states}
    model, _ = load_model(case.config.model)
    model.eval().requires_grad_(False)
    update = COMBINERS[name](model, links, rows, **case.config.settings)
    return Learned(update, states, seconds=time.monotonic() - began)


def _in_turn(case: Case, name: str) -> Learned:
    """Learn the stages one after the other with an entry of `REGULARISERS`."""
    regulariser = REGULARISERS[name](**case.config.settings)
    states = learn_in_turn(case.stages(), case.run, regulariser, case.base)
    return Learned([*states.values()][-1].links(), states)


WAYS: dict[str, Callable[..., Learned]] = {
    "combine": combine,
    "alone": alone,
    "on_top": on_top,
    "base": base,
    "all_at_once": all_at_once,
}


def way_of(config: CellConfig) -> Callable[[Case], Learned]:
    """Return the way that a config names. Raises ConfigError for an unknown one, for settings that
    it does not take, and for stages that it cannot learn."""
    name, case = str(config.way), Case(config)
    found = entry({**REGULARISERS, **COMBINERS, **WAYS}, "way", name)
    if name in shipped_ways() and not found.__module__.startswith("chainlora_lab"):
        rule = "a plug-in cannot replace a way of chainlora"
        raise ConfigError(rule, f"{name}, of {found.__module__}", "rename the entry")
    count = 1 if name in WAYS else 3 if name in COMBINERS else 0  # arguments before settings
    try:
        inspect.signature(found).bind(*[None] * count, **config.settings)
    except TypeError as error:
        rule = f"`settings` must be those of {name}"
        raise ConfigError(rule, f"{config.settings}: {error}", "correct them") from None
    rank = config.settings.get("rank", 1) if name == "combine" else 1
    if rank is not None and not (type(rank) is int and rank > 0):  # True is an int, too
        rule = "`settings.rank` must be a whole number above 0"
        raise ConfigError(rule, repr(rank), "give another one, or leave it out")
    for each, own in config.stages:
        if own.train.loss in PAIR_LOSSES or not own.data.keep_rows:
            rule = "ways are compared by answers to rows that each stage keeps"
            got = "pairs" if own.train.loss in PAIR_LOSSES else "data.keep_rows: false"
            raise ConfigError(rule, f"{got} in {each}", "leave that out")
        if own.data.replay and (name in COMBINERS or name in ("combine", "alone")):
            rule = f"{name} trains stages beside each other, which read no rows of each other"
            raise ConfigError(rule, f"data.replay in {each}", "leave it out, or take preset replay")
    if name == "all_at_once":
        _of_all(case)
    if name in COMBINERS and config.quantize is not None:
        rule = f"{name} adds to the weights of the base"
        raise ConfigError(rule, f"quantize: {config.quantize}", "leave it out")
    if name in REGULARISERS and not REGULARISERS[name](**config.settings).grows:
        check_in_turn(case.stages())
    if name in WAYS:
        return partial(WAYS[name], **config.settings)
    return partial(_merged if name in COMBINERS else _in_turn, name=name)


# --- what it reaches ---


class Scores:
    """Scores of what a way came to, on the rows that stages kept."""

    def __init__(self, case: Case, learned: Learned) -> None:
        self.base, self.learned = case.base, learned
        self.first = next(iter(learned.states.values()))
        self.kept = {n: state.kept([n])[n] for n, state in learned.states.items()}
        metrics = {each.metric for each in self.kept.values()}
        self.metric = metrics.pop() if len(metrics) == 1 else "loss"
        if START in self.first.keepers:
            self.kept |= self.first.kept([START])

    def rows(self, split: str) -> dict[str, Rows]:
        """Return the rows of a split by stage; none unless all stages have some."""
        found = {name: getattr(self.kept[name], split) for name in self.learned.states}
        return found if all(found.values()) else {}

    def at_end(self, rows: Mapping[str, Rows]) -> dict[str, float]:
        """Return the score of each stage's rows at the end."""
        if self.learned.end is None:
            return self.after_each(rows)
        return self._of(self.learned.end, rows, self.metric)

    def after_each(self, rows: Mapping[str, Rows]) -> dict[str, float]:
        """Return the score of the rows of each stage that has links, right after it."""
        ends = {n: self.learned.states[n].links() for n in rows}
        return {n: self._of(end, {n: rows[n]}, self.metric)[n] for n, end in ends.items() if end}

    def of_general(self) -> dict[str, float] | None:
        """Return the loss of general rows in the base and at the end, where there are any."""
        if START not in self.kept or self.learned.end is None:
            return None
        rows, ends = {START: self.kept[START].scored[1]}, {"base": [], "end": self.learned.end}
        return {name: self._of(end, rows, "loss")[START] for name, end in ends.items()}

    def _of(self, update: Update, rows: Mapping[str, Rows], metric: str) -> dict[str, float]:
        found = {}
        with self._model(update) as (model, tokenizer), Engine(model, training=False) as engine:
            for name, own in rows.items():
                asked = {key: self.kept[name].asked[key] for key in ("stop", "max_new_tokens")}
                keys = {"metrics": [metric], "engine": engine, "tokenizer": tokenizer} | asked
                found[name] = evaluate(model, own[:], **keys).metrics[metric]
        return found

    @contextmanager
    def _model(self, update: Update) -> Iterator[tuple[Any, Any]]:
        """Give the model of an update, and the tokenizer of its rows."""
        chain, tokenizer = chain_on_base(self.first, base=self.base)
        if isinstance(update, Mapping):
            with added(chain.model, update):
                yield chain.model, tokenizer
        else:
            chain.add(*(replace(link, id=place) for place, link in enumerate(update)))
            yield chain.model, tokenizer


def learn_sequence(config: CellConfig, run: Path) -> tuple[dict[str, Any], TrainResult]:
    """Learn a sequence in its way; return the fields of the cell that are of no single training
    (`results`), and the result of its first stage."""
    case = Case(config, run)
    learned = way_of(config)(case)
    scores = Scores(case, learned)
    ends = {split: scores.at_end(scores.rows(split)) for split in ("validation", "test")}
    split = "test" if ends["test"] else "validation"
    rows, own = scores.rows(split), scores.after_each(scores.rows(split))
    means = {name: {scores.metric: fmean(e.values())} if e else None for name, e in ends.items()}
    stages = [
        {"stage": name, "own": own.get(name), "end": value, "rows": len(rows[name])}
        for name, value in ends[split].items()
    ]
    fields: dict[str, Any] = {"metric": scores.metric, "score_split": split, "stages": stages}
    fields |= {"score": fmean(ends[split].values()), "general": scores.of_general()} | means
    return fields | _costs(learned), learned.results[0]


def _costs(learned: Learned) -> dict[str, Any]:
    results, end = learned.results, learned.end
    peaks = [each["peak_memory_mb"] for each in results if each["peak_memory_mb"] is not None]
    is_dense = end is None or isinstance(end, Mapping)
    return {
        "majority": None,
        "train_loss": None,
        "ranks": [link["rank"] for each in results for link in each["links"]],
        "exported_rank": None if is_dense else sum(cast(Link, link).rank for link in end or ()),
        "adapters": len(learned.states) if end is None else 1,
        "steps": sum(each["steps"] for each in results),
        "tokens": sum(each["tokens"] for each in results),
        "rows": sum(each["rows"] for each in results),
        "trainable_parameters": max(each["trainable_parameters"] for each in results),
        "wall_s": round(sum(each["wall_s"] for each in results) + learned.seconds, 2),
        "peak_rss_mb": max(peaks, default=None),
    }
