"""A sequence of data sets, learned in one of several ways: what a cell trains, and what it reaches.

A way returns the update of the base at its end, and those right after each stage. Rows that stages
kept are scored in these, by what the package's matrix scores them by: of several metrics, the loss.
Stages beside each other are trained once for all cells of a folder with the same configs.
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
from chainlora.config.schema import LENGTHS, PAIR_LOSSES
from chainlora.config.staging import Stage
from chainlora.data.kept import Kept
from chainlora.data.rows import Rows
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.evaluation.evaluate import evaluate
from chainlora.registry import entry
from chainlora.runs.history import START
from chainlora.runs.opening import chain_on_base
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState
from chainlora.training.events import EntryBuilt, Event
from chainlora.training.result import TrainResult
from chainlora.training.stages import train_stages
from chainlora_lab.expansion import config_id
from chainlora_lab.in_turn import ROWS, check_in_turn, learn_in_turn
from chainlora_lab.loops import CellConfig
from chainlora_lab.ways import COMBINERS, REGULARISERS
from chainlora_lab.ways.merging import added

Update = Sequence[Link] | Mapping[str, Tensor]  # links whose updates are added, or a dense one


@dataclass
class Learned:
    """What a way came to: the update at the end (None: each stage has its own model), those right
    after each stage, and the states by stage whose runs hold its rows and results.

    `others` are further entries that were trained, `seconds` is what was spent beside trainings.
    """

    end: Update | None
    ends: Mapping[str, Update]
    states: Mapping[str, OpenState]
    others: Sequence[OpenState] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """A cell of a sequence, and its folder."""

    config: CellConfig
    run: Path

    @cached_property
    def base(self) -> OpenBase:
        return OpenBase.of_config(self.config)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.config.stages]

    def stages(
        self, folder: Path | None = None, *, beside: bool = False, **keys: Any
    ) -> list[Stage]:
        """Return the stages of a run in `folder`, `keys` changed in the config of each."""
        keys["output"] = str(folder or self.run)
        pairs = enumerate(self.config.stages)
        return [
            Stage(name, config.model_copy(update=keys), beside=beside and place > 0)
            for place, (name, config) in pairs
        ]

    def trained(self, stages: Sequence[Stage]) -> OpenState:
        """Train what is left of some stages, and note the seconds of combinations."""
        run = Path(stages[0].config.output or "")

        def tell(event: Event) -> None:
            if isinstance(event, EntryBuilt) and event.kind == "combine":
                with _seconds_file(run).open("a", encoding="utf-8") as file:
                    file.write(f"{event.seconds:.2f}\n")

        train_stages(stages, listener=tell, matrix=False, base=self.base)
        return open_run(run)

    @cached_property
    def beside(self) -> OpenState:
        """Stages beside each other and their combination, which cells of a folder share."""
        alone = self.config.model_copy(update={"way": "combine", "settings": {}})
        folder = self.run.parents[2] / "beside" / config_id(alone)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return self.trained(self.stages(folder, beside=True))

    def ends(self, run: OpenState) -> dict[str, Update]:
        return {name: run.at(name).links() for name in self.names}

    def states(self, run: OpenState) -> dict[str, OpenState]:
        return {name: run.at(name) for name in self.names}


def _seconds_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.seconds")


# --- ways of the package ---


def combine(case: Case, rehearse: bool = False) -> Learned:
    """Stages beside each other, combined layer by layer."""
    run = case.beside
    if rehearse:
        stages = case.stages(beside=True)
        run = case.trained([*stages[:-1], replace(stages[-1], rehearse=True)])
    seconds = sum(map(float, _seconds_file(run.run).read_text(encoding="utf-8").split()))
    last = [run] if rehearse else []
    return Learned(run.links(), case.ends(run), case.states(run), last, seconds)


def alone(case: Case) -> Learned:
    """Each stage's own model on its own rows."""
    run = case.beside
    return Learned(None, case.ends(run), case.states(run))


def on_top(case: Case) -> Learned:
    """Each stage on top of those before."""
    run = case.trained(case.stages())
    return Learned(run.links(), case.ends(run), case.states(run))


def base(case: Case) -> Learned:
    """Nothing is trained; rows are kept by stages without links."""
    run = case.trained(_without_links(case))
    return Learned([], {}, case.states(run))


def all_at_once(case: Case) -> Learned:
    """One LoRA on the rows of all stages, which stages without links keep before it."""
    run = case.trained([*_without_links(case), Stage("all_at_once", _of_all(case))])
    return Learned(run.links(), {}, case.states(run), [run])


def _without_links(case: Case) -> list[Stage]:
    none = dict.fromkeys(LENGTHS) | {"ranks": (), "alpha": 16.0}
    return [
        replace(
            each,
            config=each.config.model_copy(
                update={"chain": each.config.chain.model_copy(update=none)}
            ),
        )
        for each in case.stages()
    ]


def _of_all(case: Case) -> RunConfig:
    """Return the config of one stage on the rows of all, as long as all of them."""
    configs = [config for _, config in case.config.stages]
    first, files = configs[0], [file for each in configs for file in each.data.train_files]
    rows = {"train": tuple(files), "validation": None, "test": None, "replay": None}
    kinds = [each.data.model_copy(update=rows) for each in configs]
    rule = "all_at_once learns the rows of all stages as one data set"
    if not all(each.data.train_files for each in configs) or any(k != kinds[0] for k in kinds):
        remedy = "set files alone in the data of a stage, all else beside `stages`"
        raise ConfigError(rule, "stages whose rows are read in different ways", remedy)
    chain, length = first.chain, {}
    for key in LENGTHS:
        lengths = [getattr(each.chain, key) or () for each in configs]
        if len({*map(len, lengths)}) > 1 or (key == "epochs" and len({*lengths}) > 1):
            raise ConfigError(rule, f"chain.{key}: {lengths}", "give all stages the same length")
        if lengths[0] and key != "epochs":
            length[key] = tuple(map(sum, zip(*lengths, strict=True)))
    chain = chain.model_copy(update=length)
    keys = {"data": kinds[0], "chain": chain, "output": str(case.run), "start_data": None}
    return first.model_copy(update=keys)


WAYS: dict[str, Callable[..., Learned]] = {
    "combine": combine,
    "alone": alone,
    "on_top": on_top,
    "base": base,
    "all_at_once": all_at_once,
}


# --- ways of the two registries ---


def _merged(case: Case, name: str) -> Learned:
    """Merge the stages beside each other by an entry of `COMBINERS`, on the base in float32."""
    run, began = case.beside, time.monotonic()
    links = {name: run.at(name).links() for name in case.names}
    kept = run.kept(case.names)
    rows = {
        name: [[*row.right.sequences[0]] for row in (each.train or each.validation).spread(ROWS)]
        for name, each in kept.items()
    }
    model, _ = load_model(case.config.model)
    model.eval().requires_grad_(False)
    update = COMBINERS[name](model, links, rows, **case.config.settings)
    return Learned(update, links, case.states(run), seconds=time.monotonic() - began)


def _in_turn(case: Case, name: str) -> Learned:
    """Learn the stages one after the other with an entry of `REGULARISERS`."""
    regulariser = REGULARISERS[name](**case.config.settings)
    states = learn_in_turn(case.stages(), case.run, regulariser, case.base)
    ends = {name: state.links() for name, state in states.items()}
    return Learned(ends[case.names[-1]], ends, states)


def way_of(config: CellConfig) -> Callable[[Case], Learned]:
    """Return the way that a config names. Raises ConfigError for an unknown one, for settings that
    it does not take, and for stages that it cannot learn."""
    name = str(config.way)
    taken: tuple[Any, ...] = (None, None, None)
    found = entry({**REGULARISERS, **COMBINERS, **WAYS}, "way", name)
    if name in WAYS:
        taken = (None,)
    elif name in REGULARISERS:
        taken = ()
    try:
        inspect.signature(found).bind(*taken, **config.settings)
    except TypeError as error:
        rule = f"`settings` must be those of {name}"
        raise ConfigError(rule, f"{config.settings}: {error}", "correct them") from None
    case = Case(config, Path())
    _check_stages(case, name)
    if name in WAYS:
        return lambda each: WAYS[name](each, **each.config.settings)
    return partial(_merged if name in COMBINERS else _in_turn, name=name)


def _check_stages(case: Case, name: str) -> None:
    for each, config in case.config.stages:
        if config.train.loss in PAIR_LOSSES or not config.data.keep_rows:
            rule = "ways are compared by answers to rows that each stage keeps"
            got = "pairs" if config.train.loss in PAIR_LOSSES else "data.keep_rows: false"
            raise ConfigError(rule, f"{got} in {each}", "leave that out")
    if name == "all_at_once":
        _of_all(case)
    if name in COMBINERS and case.config.quantize is not None:
        rule = f"{name} adds to the weights of the base"
        raise ConfigError(rule, f"quantize: {case.config.quantize}", "leave it out")
    if name in REGULARISERS and not REGULARISERS[name](**case.config.settings).grows:
        check_in_turn(case.stages())


# --- what it reaches ---


class Scores:
    """Scores of what a way came to, on the rows that stages kept."""

    def __init__(self, case: Case, learned: Learned) -> None:
        self.base, self.learned = case.base, learned
        self.first = next(iter(learned.states.values()))
        self.kept = {n: state.kept([n])[n] for n, state in learned.states.items()}
        metrics = {each.metric for each in self.kept.values()}
        self.metric = metrics.pop() if len(metrics) == 1 else "loss"
        self.general = self.first.kept([START])[START] if START in self.first.keepers else None

    def rows(self, split: str) -> dict[str, Rows]:
        """Return the rows of a split by stage; none unless all stages have some."""
        found = {name: getattr(each, split) for name, each in self.kept.items()}
        return found if all(found.values()) else {}

    def at_end(self, rows: Mapping[str, Rows]) -> dict[str, float]:
        """Return the score of each stage's rows at the end."""
        if self.learned.end is None:
            return self.after_each(rows)
        return self._of(self.learned.end, rows) if rows else {}

    def after_each(self, rows: Mapping[str, Rows]) -> dict[str, float]:
        """Return the score of each stage's rows right after it was learned."""
        ends = {name: end for name, end in self.learned.ends.items() if name in rows}
        return {n: self._of(end, {n: rows[n]})[n] for n, end in ends.items()}

    def of_general(self) -> dict[str, float] | None:
        """Return the loss of general rows in the base and at the end, where there are any."""
        if self.general is None or self.learned.end is None:
            return None
        rows = self.general.scored[1]
        ends = {"base": [], "end": self.learned.end}
        return {n: self._of(end, {START: rows}, "loss")[START] for n, end in ends.items()}

    def _of(
        self, update: Update, rows: Mapping[str, Rows], metric: str = ""
    ) -> dict[str, float]:
        with self._model(update) as (model, tokenizer), Engine(model, training=False) as engine:
            found = {}
            for name, own in rows.items():
                asked = self.kept.get(name, self.general)
                assert asked is not None
                scored = evaluate(
                    model,
                    own[:],
                    engine=engine,
                    metrics=[metric or self.metric],
                    tokenizer=tokenizer,
                    stop=asked.asked["stop"],
                    max_new_tokens=asked.asked["max_new_tokens"],
                )
                found[name] = scored.metrics[metric or self.metric]
            return found

    @contextmanager
    def _model(self, update: Update) -> Iterator[Any]:
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
    results = [each.result() for each in (*learned.states.values(), *learned.others)]
    known = [cast(TrainResult, each) for each in results if each is not None]
    reached = {"metric": scores.metric, "score_split": split, "stages": stages} | means
    reached |= {"score": fmean(ends[split].values()), "general": scores.of_general()}
    return reached | _costs(learned, known), known[0]


def _costs(learned: Learned, results: Sequence[TrainResult]) -> dict[str, Any]:
    peaks = [each["peak_memory_mb"] for each in results if each["peak_memory_mb"] is not None]
    end = learned.end
    is_low = end is not None and not isinstance(end, Mapping)
    return {
        "majority": None,
        "train_loss": None,
        "ranks": [link["rank"] for each in results for link in each["links"]],
        "exported_rank": sum(link.rank for link in end) if is_low else None,  # type: ignore[union-attr]
        "adapters": len(learned.states) if end is None else 1,
        **{key: sum(each[key] for each in results) for key in ("steps", "tokens", "rows")},  # type: ignore[literal-required]
        "trainable_parameters": max(each["trainable_parameters"] for each in results),
        "wall_s": round(sum(each["wall_s"] for each in results) + learned.seconds, 2),
        "peak_rss_mb": max(peaks, default=None),
    }
