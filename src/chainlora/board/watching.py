"""What runs look like while they train: their files are read, and nothing is written or waited for.

Of a run that trains, readers see the links that are tied and the records up to the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median

from chainlora.config.stages import is_run, split_address
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.stages import MATRIX, stage_matrix
from chainlora.reports.chain_charts import chain_pictures
from chainlora.reports.charts import Picture
from chainlora.reports.page import (
    Block,
    Column,
    Numbers,
    Section,
    Text,
    Tiles,
    as_text,
    section,
)
from chainlora.reports.run_charts import training_pictures
from chainlora.reports.run_report import duration, links_table, score_text, stage_blocks
from chainlora.reports.runs import RunFacts, read_runs, run_names
from chainlora.reports.tables import table_of
from chainlora.runs.reading import RunReader
from chainlora.runs.resuming import is_in_use
from chainlora.runs.stages import STAGES, folder_of, half_trained, read_stages

_RECENT = 25  # steps whose median tells the time left, as on the command line
_NONE = "–"


def find_runs(places: Sequence[str | Path]) -> dict[str, Path]:
    """Return the runs at some places by their names: runs, and runs in folders of them."""
    found: list[Path] = []
    for place in places:
        inside = sorted(path.parent for path in Path(place).glob("[!.]*/chain.json"))
        found += [split_address(place)[0]] if is_run(place) else inside
    found = list(dict.fromkeys(found))
    return dict(zip(run_names(found), found, strict=True)) if found else {}


def sections_of(runs: Mapping[str, Path], shown: Path) -> list[Section]:
    """Return what there is to see: where each run is, and of one its curves, stages and links."""
    rows = [{"run": name, **standing_of(run)} for name, run in runs.items()]
    table = [Numbers(table_of("Where they are", rows))] if len(runs) > 1 else []
    known = [(what, value) for what, value in standing_of(shown).items() if value != _NONE]
    found = [section("Runs", *table), section(shown.name, Tiles(known))]
    try:
        return [*found, *_details(shown)]
    except ChainLoRAError as error:
        return [*found, section("Not to be read", Text(as_text(str(error))))]


def standing_of(run: Path) -> dict[str, str]:
    """Say where a run is: the stage that it trains or trained last, in words."""
    keys = ("stage", "step", "time left", "training loss", "validation")
    try:
        last = list(_folders(run).values())[-1]
        stamps = _stamp(last / "chain.json"), _stamp(last / "metrics.jsonl")
        is_done, *said = _standing(last, *stamps)
    except ChainLoRAError:
        return {"state": "cannot be read"} | dict.fromkeys(keys, _NONE)
    is_training = not is_done and is_in_use(run)
    state = "done" if is_done else "training" if is_training else "interrupted"
    found = {"state": state} | dict(zip(keys, said, strict=True))
    return found if is_training else found | {"time left": _NONE}


@lru_cache(maxsize=1000)
def _standing(last: Path, *stamps: int) -> tuple[bool, str, str, str, str, str]:
    """Return whether the run of a stage is done, and what there is to say of it."""
    reader = RunReader(last)
    facts = RunFacts("", reader, reader.manifest(), None, {}, reader.records(), {})
    manifest, steps, metric = facts.manifest, facts.steps, facts.score
    is_done = reader.is_finished(manifest) or not manifest.has_run
    step = steps[-1]["step"] if steps else manifest.position.step
    total = sum(manifest.numbers.lengths) if manifest.numbers and not is_done else step
    recent = [record["seconds"] for record in steps[-_RECENT:]]
    scores = [record[metric] for record in facts.evaluations if metric and metric in record]
    return (
        is_done,
        manifest.stage,
        f"{step:,} of {total:,}" if total > step else f"{step:,}",
        duration(median(recent) * (total - step)) if recent else _NONE,
        f"{steps[-1]['loss']:.4g}" if steps else _NONE,
        f"{metric} {score_text(metric, scores[-1])}" if metric and scores else _NONE,
    )


def _details(run: Path) -> list[Section]:
    folders = _folders(run)
    last = list(folders.values())[-1]
    off = _off(run)
    heads = {name: f"{name} (off)" if name in off else name for name in folders}
    curves = [
        Column(
            heads[name] if len(folders) > 1 else "",
            _curves(folder, _stamp(folder / "metrics.jsonl")),
        )
        for name, folder in reversed(folders.items())
    ]
    # the config is written once: another one is another run
    reader, begun = RunReader(last), _stamp(last / "config.yaml")
    stamps = (begun, _stamp(run / STAGES), _stamp(run / MATRIX))
    knots = sum(record.get("where") == "knot" for record in reader.records())
    links, stages = _links_and_stages(run, last, reader.manifest().state, knots, *stamps)
    return [Section("Training", curves), section("Stages", *stages), section("Links", *links)]


def _folders(run: Path) -> dict[str, Path]:
    """Return the run directory of each stage: those that are off first, and last one that has
    begun and not ended."""
    found, off = read_stages(run), _off(run)
    names = sorted(found.here, key=lambda name: name not in off)
    folders = {name: folder_of(run, found, found.names.index(name)) for name in names}
    begun = [path for path in half_trained(run, found) if RunReader(path).exists]
    return folders | {folder.name: folder for folder in begun}


def _off(run: Path) -> set[str]:
    """Return the stages that `mix` has switched off."""
    return {name for name, strength in read_stages(run).strengths.items() if not strength}


def _stamp(path: Path) -> int:
    """Return what is another number when a file is another one."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _curves(folder: Path, stamp: int) -> list[Block]:
    return _alone(training_pictures(RunReader(folder).records()))


@lru_cache(maxsize=16)
def _links_and_stages(run: Path, last: Path, *versions: object) -> tuple[list[Block], list[Block]]:
    """Return tables and pictures; all files of the links are checked first."""
    has_ended = last.name in read_stages(run).names or last == run
    (facts,) = read_runs([run if has_ended else last])
    if facts.matrix is not None:
        facts = replace(facts, matrix=stage_matrix(run, compute=False))
    return _alone([*links_table(facts), *chain_pictures(facts)]), _alone(stage_blocks(facts))


def _alone(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks without what folds open: it would close whenever they are drawn again."""
    shown = [block for block in blocks if not isinstance(block, Numbers) or block.is_open]
    return [replace(b, table=None) if isinstance(b, Picture) else b for b in shown]
