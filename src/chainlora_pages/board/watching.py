"""Show the progress of runs from their files, without writing, locking or waiting.

Readers of a run in training see its tied links, and its records up to the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median

from chainlora.errors import ChainLoRAError
from chainlora.runs.addresses import begun_stage, open_run, state_at
from chainlora.runs.changes import MATRIX, work_left
from chainlora.runs.draft import DRAFT, drafts_in
from chainlora.runs.entries import RECORDS
from chainlora.runs.history_file import folder_in, read_history
from chainlora.runs.locks import is_held
from chainlora.runs.paths import HISTORY, is_run, split_address
from chainlora.runs.state import OpenState
from chainlora_pages.charts import Picture, table_of
from chainlora_pages.page import (
    Block,
    Column,
    Numbers,
    Section,
    Text,
    Tiles,
    as_text,
    render_part,
    section,
)
from chainlora_pages.run_charts import LOSS, RATE, training_pictures
from chainlora_pages.run_report import links_blocks, stage_blocks
from chainlora_pages.runs import RunFacts, duration, read_state, run_names, score_text

_RECENT = 25  # steps whose median estimates the time left, as on the command line
NONE = "–"
_INTERRUPTED = "Training was interrupted.{} Press **Continue** under Train to resume it."
AS_BEFORE = " The run has not changed."


def find_runs(places: Sequence[str | Path]) -> dict[str, Path]:
    """Return runs by name. Each place is a run or a folder of runs."""
    runs: list[Path] = []
    for place in places:
        inside = sorted(path.parent for path in Path(place).glob(f"[!.]*/{HISTORY}"))
        runs += [split_address(place)[0]] if is_run(place) else inside
    runs = list(dict.fromkeys(runs))
    return dict(zip(run_names(runs), runs, strict=True)) if runs else {}


def last_changed(runs: Mapping[str, Path]) -> str | None:
    """Return the run whose history was written last, such as the one that was trained last."""
    paths = map(str, runs.values())
    return max(paths, key=lambda run: _stamp(Path(run, HISTORY)), default=None)


def sections_of(runs: Mapping[str, Path], shown: Path) -> list[Section]:
    """Return the progress of each run, and the stages, curves and links of the shown run."""
    rows = [{"run": name, **standing_of(run)} for name, run in runs.items()]
    table = [Numbers(table_of("Progress", rows))] if len(runs) > 1 else []
    known = [(name, value) for name, value in standing_of(shown).items() if value != NONE]
    notes = []
    if ("state", "interrupted") in known:
        notes.append(Text(_INTERRUPTED.format(AS_BEFORE * bool(read_history(shown).links))))
    sections = [section("Runs", *table), section(shown.name, Tiles(known), *notes)]
    try:
        return [*sections, *_details(shown)]
    except ChainLoRAError as error:
        return [*sections, section("Cannot read this run", Text(as_text(str(error))))]


def standing_of(run: Path) -> dict[str, str]:
    """Return the progress of the current or last stage of a run, as text by name."""
    keys = ("state", "stage", "step", "time left", "training loss", "validation")
    try:
        name = _stages(run)[-1]
        folder = folder_in(run, name)
        stamps = [_stamp(path) for path in (run / HISTORY, folder / DRAFT, folder / RECORDS)]
        texts = dict(zip(keys, _standing(run, name, *stamps), strict=True))
    except ChainLoRAError:
        return dict.fromkeys(keys, NONE) | {"state": "cannot be read"}
    if texts["state"] == "done" and work_left(read_history(run)):  # such as a combination
        texts["state"] = "training"
    if texts["state"] == "training" and not is_held(run):
        texts["state"] = "interrupted"
    return texts if texts["state"] == "training" else texts | {"time left": NONE}


@lru_cache(maxsize=1000)
def _standing(run: Path, name: str, *stamps: int) -> tuple[str, ...]:
    """Return the values of `standing_of` for a stage; `stamps` are the keys of the cache."""
    state = _state_of(run, name)
    result = state.result() if state.draft is None else None
    facts = RunFacts("", state, None, result or {}, state.records(), {})
    steps, metric, trained = facts.steps, facts.score, state.entry
    numbers = None if trained is None else trained.training.numbers
    is_done = state.draft is None
    step = steps[-1]["step"] if steps else facts.position.step
    total = sum(numbers.lengths) if numbers and not is_done else step
    recent = [record["seconds"] for record in steps[-_RECENT:]]
    scores = [record[metric] for record in facts.evaluations if metric and metric in record]
    if metric and metric in facts.validation:  # of the best point
        scores.append(facts.validation[metric])
    return (
        "done" if is_done else "training",
        name,
        f"{step:,} of {total:,}" if total > step else f"{step:,}",
        duration(median(recent) * (total - step)) if recent and total > step else NONE,
        f"{steps[-1]['loss']:.4g}" if steps else NONE,
        f"{metric} {score_text(metric, scores[-1])}" if metric and scores else NONE,
    )


def loss_html(run: Path) -> str:
    """Return the curve of the training loss of the last stage, "" before its first step."""
    try:
        name = _stages(run)[-1]
        pictures = _curves(run, name, _stamp(folder_in(run, name) / RECORDS))
    except ChainLoRAError:
        return ""
    losses = [p for p in pictures if isinstance(p, Picture) and p.title == LOSS]
    return render_part([section("Progress", *losses)]) if losses else ""


def _details(run: Path) -> list[Section]:
    names = _stages(run)
    curves, rates = [], []
    for name in reversed(names):
        head = name if len(names) > 1 else ""
        blocks = _curves(run, name, _stamp(folder_in(run, name) / RECORDS))
        rate = [block for block in blocks if isinstance(block, Picture) and block.title == RATE]
        curves.append(Column(head, [block for block in blocks if block not in rate]))
        rates.append(Column(head, rate))
    last = names[-1]
    state = _state_of(run, last)
    knots = sum(record.get("where") == "knot" for record in state.records())
    stamps = (_stamp(run / HISTORY), _stamp(run / MATRIX), state.state.digest, knots)
    links, stages = _links_and_stages(run, last, *stamps)
    return [
        Section("Training", curves),
        section("Stages", *stages, is_folded=True),
        Section("Learning rate", rates, is_folded=True),
        section("Links", *links, is_folded=True),
    ]


def _stages(run: Path) -> list[str]:
    """Return the stages of a run, a stage in training last."""
    history = read_history(run)
    ended = [entry.key for entry in history.lineage(history.head) if entry.has_config]
    return [*ended, *drafts_in(run, history)] or [history.head]


def _state_of(run: Path, name: str) -> OpenState:
    """Return the state at the end of a stage, or at the last knot of a stage in training."""
    history = read_history(run)
    return begun_stage(run, name, history) or state_at(run, history, name)


def _stamp(path: Path) -> int:
    """Return a number that changes with a file; 0 if it is missing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _curves(run: Path, name: str, stamp: int) -> list[Block]:
    return _without_tables(training_pictures(_state_of(run, name).records()))


@lru_cache(maxsize=16)
def _links_and_stages(run: Path, last: str, *versions: object) -> tuple[list[Block], list[Block]]:
    """Return blocks about links and about stages; the files of all links are checked first."""
    state = _state_of(run, last)
    facts = read_state(open_run(run) if state.draft is None else state, run.name)
    return _without_tables(links_blocks(facts)), _without_tables(stage_blocks(facts))


def _without_tables(blocks: Sequence[Block]) -> list[Block]:
    """Remove folded tables, which would close on every redraw of the page."""
    return [replace(b, table=None) if isinstance(b, Picture) else b for b in blocks]
