"""The report of a run, or of several side by side: one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.config.reading import flatten
from chainlora.config.yaml_text import dump_yaml
from chainlora.data.tasks import load_task
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.metrics import is_higher_better
from chainlora.files import make_folder, write_text
from chainlora.runs.cards import public_name
from chainlora.runs.history import MAIN
from chainlora.runs.paths import exists_in, need_apart, split_address
from chainlora.runs.records import Record
from chainlora.runs.state import OpenState
from chainlora.showing import number
from chainlora_pages.chain_charts import chain_pictures, stage_pictures
from chainlora_pages.charts import Table, table_of
from chainlora_pages.page import (
    Answer,
    Block,
    Column,
    Listing,
    Numbers,
    Page,
    Section,
    Text,
    Tiles,
    as_text,
    render,
    section,
)
from chainlora_pages.run_answers import answers, read_prompts
from chainlora_pages.run_charts import comparing_pictures, training_pictures
from chainlora_pages.runs import RunFacts, duration, read_runs, score_text, together

NAME = "report.html"
_NONE = "–"


def report_runs(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    prompts: int | str | Path | None = None,
    max_new_tokens: int = 32,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write one HTML file about runs or saved chains, and return its path and size.

    `output` is by default ``report.html``, in the directory of a single run or in the current one.
    `prompts` (a number of the run's own rows, or a file) has them answered after 0, 1, … links,
    which needs the base model. Raises ChainLoRAError subclasses.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    found = read_runs(runs)
    folder = split_address(runs[0])[0] if len(runs) == 1 else Path()
    path = Path(expanduser(output)) if output is not None else folder / NAME
    if not (path.name == NAME and exists_in(path.parent)):
        need_apart(path)
    answered: dict[str, list[Answer]] = {}
    if prompts is not None:
        wanted = read_prompts(str(prompts), found)
        keys: Any = {"max_new_tokens": max_new_tokens, "progress": progress}
        answered = {run.name: answers(run, wanted, **keys) for run in found}
    make_folder(path.parent)
    write_text(path, render(run_page(found, answered)))
    size = path.stat().st_size
    return {"output": str(path), "bytes": size, "runs": [str(run.path) for run in found]}


def run_page(runs: Sequence[RunFacts], answered: Mapping[str, Sequence[Answer]]) -> Page:
    """Return the page about runs, and about what they answered where they were asked."""
    known = {run.name: _versions(run) for run in runs}
    parts = runs[0].parts if len(runs) == 1 else runs
    costs = {part.name: _costs(part) for part in parts}
    sections = [
        _overview(runs),
        _each("Stages", runs, stage_blocks),
        _each("Answers", runs, lambda run: _answers(answered.get(run.name, ()))),
        _each("Training", parts, lambda part: training_pictures(part.records)),
        section("Cost", Numbers(_side_by_side("What it cost", costs))),
        replace(_each("Links", runs, links_blocks), is_folded=True),
        section("Config", *_configs(parts), is_folded=True),
        section("Versions", Numbers(_side_by_side("Versions", known)), is_folded=True),
    ]
    return Page(" · ".join(run.name for run in runs), _lead(runs), sections)


def _each(
    title: str, runs: Sequence[RunFacts], blocks: Callable[[RunFacts], Sequence[Block]]
) -> Section:
    columns = [Column(run.name if len(runs) > 1 else "", blocks(run)) for run in runs]
    return Section(title, columns)


# --- what to see first ---


def _lead(runs: Sequence[RunFacts]) -> str:
    """Return what happened, for readers from outside the field."""
    if len(runs) > 1:
        whats = [what[0].lower() + what[1:] for what in map(_what, runs)]
        said = [f"{run.name}: {what}{_gain(run)}" for run, what in zip(runs, whats, strict=True)]
        return "; ".join(said) + "."
    run = runs[0]
    model = public_name(run.state.base.model) or "a model without a name"
    if run.state.is_before_training:
        return f"A language model ({model}) as it was before this run's training."
    said, before = list[str](), ""
    for part in run.parts:
        is_on_top = before in {entry.key for entry in part.state.lineage}
        then = [*_combined(part.state.parent), "Then it"] if is_on_top else ["Separately, it"]
        who = " ".join(then) if said else f"A language model ({model})"
        said.append(f"{who} {_learned(part)}.")
        before = part.state.stage
    return " ".join([*said, *_combined(run.state), *_switched_off(run)])


def _combined(state: OpenState) -> list[str]:
    """Return what is said of a combination."""
    is_one = state.trained is not None and state.trained.kind == "combine"
    return ["The results were combined."] if is_one else []


def _learned(part: RunFacts) -> str:
    """Return where a part comes from, in words."""
    if part.state.trained is not None and part.state.trained.kind == "import":
        return f"got the adapter {part.state.stage}, which was trained elsewhere"
    return f"was trained on {_task(part)}{_gain(part)}"


def _task(part: RunFacts) -> str:
    """Return the name of what a run or stage was trained on, and what is asked there if known."""
    name = part.state.stage
    if part.config is None:
        return "data that it does not name"
    data = part.config.data
    if data.rehearse:
        return "rows of each stage again"
    if data.task is not None:
        try:
            task = load_task(data.task)
        except ChainLoRAError:  # its file was moved or deleted
            return name
        name = task.name if name == MAIN else name
        return f"{name} ({task.description.strip().rstrip('.')})"
    files = [Path(file.path).name for file in data.train_files]
    return " and ".join(files) if name == MAIN and files else name


def _switched_off(run: RunFacts) -> list[str]:
    """Return what the mix that the run is leaves of its stages, and which state it is exactly."""
    off = [stage for stage, strength in run.state.strengths.items() if not strength]
    if not off:
        return []
    now, history = run.state.state.digest, run.state.history
    same = [part.name for part in run.stages if part.state.state.digest == now]
    is_as_begun = now == history.state_of(history.origin).digest
    when = f"after {same[-1]}" if same else "before training" if is_as_begun else ""
    as_was = f": the model is exactly what it was {when}" if when else ""
    those = f"stage {off[0]} is" if len(off) == 1 else f"stages {', '.join(off)} are"
    return [f"Now {those} switched off{as_was}."]


def _what(run: RunFacts) -> str:
    ranks = [link["rank"] for link in run.links]
    if not ranks:
        return "A chain without links"
    if len(ranks) == 1:
        return f"One LoRA of rank {ranks[0]}"
    if len(set(ranks)) == 1:
        return f"A chain of {len(ranks)} links of rank {ranks[0]}"
    return f"A chain of {len(ranks)} links of ranks {', '.join(map(str, ranks))}"


def _gain(run: RunFacts) -> str:
    """Return how the validation score went from the start to the end, in words."""
    if run.score is None:
        return ""
    before, after = _score(run, run.score)
    shown = f"{before} before, {after} after" if before != _NONE and run.steps else after
    where = "on examples that it had not seen"
    if run.score in ("accuracy", "em"):
        return f": {shown}, answered right {where}"
    better = "" if is_higher_better(run.score) else "; lower is better"
    return f": {run.score} {where} {shown}{better}"


def _score(run: RunFacts, name: str) -> tuple[str, str]:
    """Return a metric of the validation rows at the start, and in the end or at the last look."""
    known = [record for record in run.evaluations if name in record]
    before = [score_text(name, record[name]) for record in known if record["where"] == "start"]
    final = run.validation.get(name, known[-1][name])
    return (before or [_NONE])[0], score_text(name, final)


def _overview(runs: Sequence[RunFacts]) -> Section:
    """Return what to see first: of one run its numbers, of several a table and their curves."""
    if len(runs) == 1:
        what = Text(f"{_what(runs[0])}.")
        return section("Overview", Tiles(_tiles(runs[0])), what, *_remarks(runs[0], True))
    table = _side_by_side("The runs", {run.name: dict(_figures(run)) for run in runs})
    remarks = [remark for run in runs for remark in _remarks(run, False)]
    return section("Overview", Numbers(table), *remarks, *comparing_pictures(runs))


def _tiles(run: RunFacts) -> list[tuple[str, str]]:
    """Return the few numbers of one run to see first; the others are among its costs and links."""
    found = []
    for part in run.parts if not run.state.is_before_training else ():
        if part.score is not None:
            before, after = _score(part, part.score)
            of = f"{part.name}: " if run.stages else ""
            change = f"{before} → {after}" if before != _NONE and part.steps else after
            found.append((f"{of}{part.score}", change))
    positions = [part.position for part in run.parts]
    return [
        *found,
        ("ranks", ", ".join(str(link["rank"]) for link in run.links) or "no links"),
        ("steps", f"{sum(position.step for position in positions):,}"),
        ("time", duration(sum(position.seconds for position in positions))),
    ]


def _figures(run: RunFacts) -> list[tuple[str, str]]:
    name, result = run.score, run.result
    found = [("ranks", ", ".join(str(link["rank"]) for link in run.links) or _NONE)]
    if name is not None:
        before, after = _score(run, name)
        found += [(f"{name} before", before), (f"{name} after", after)]
    if (majority := run.validation.get("majority")) is not None:
        found.append(("commonest answer", score_text("accuracy", majority)))
    return [
        *found,
        ("steps", f"{run.position.step:,}"),
        ("time", duration(run.position.seconds)),
        ("parameters trained", _whole(result.get("trainable_parameters"))),
        ("peak memory", _memory(result)),
    ]


def _remarks(run: RunFacts, is_alone: bool) -> list[Block]:
    """Return what a reader must know: a run that is not finished, links that are left out."""
    found, position, name = [], run.inspection["position"], as_text(run.name)
    if not run.inspection["finished"]:
        found.append(
            f"**{name} is not finished**: {position['links']} of {position['planned_links']} "
            f"links are tied, {position['step']} steps done."
        )
    if (selected := run.inspection["selected"]) is not None:
        count, rest = selected["num_links"], " and a part of the next" * selected["partial"]
        found.append(
            f"{name} is loaded as its best point: step {selected['step']}, after {count} "
            f"link{'s' * (count != 1)}{rest}."
        )
    for part in run.parts if is_alone else ():
        if (majority := part.validation.get("majority")) is not None:
            share = score_text("accuracy", majority)
            found.append(
                f"{as_text(part.name)}: the most frequent answer alone would be right on {share}."
            )
    is_trained = not run.state.is_before_training
    if run.matrix is not None and is_trained and not (is_alone and run.stages):
        found.append(
            f"Score, steps, time, memory and cost of {name} are those of stage "
            f"{run.state.stage} alone; RUN@STAGE reports on another one."
        )
    if is_trained and not run.state.is_as_trained:
        found.append(
            f"{name} was mixed or pruned since: the scores of its training are not those of "
            "what it is now."
        )
    return [Text(text) for text in found]


# --- links, answers ---


def links_blocks(run: RunFacts) -> list[Block]:
    """Return what specialists want to know of links: sizes, directions, overlap, scores."""
    return [*chain_pictures(run), *links_table(run)]


def links_table(run: RunFacts) -> list[Block]:
    links = run.links
    if not links:
        return []
    known = dict.fromkeys(name for link in links for name in link["scores"])
    names = sorted(known, key=lambda name: not is_higher_better(name))  # right answers come first
    are_several = len({link["stage"] for link in links}) > 1
    rows = []
    for link in links:
        row = {"link": str(link["link"])}
        if are_several:
            row |= {"stage": link["stage"], "strength": f"{link['strength']:g}"}
        row |= {"rank": str(link["rank"]), "scaling": f"{link['scaling']:g}"}
        row["steps"] = f"{link['steps']:,}"
        row |= {f"validation {name}": number(link["scores"].get(name), 4) for name in names}
        row["training loss"] = number(link["loss"], 4)
        row["‖ΔW‖"] = number(link["delta_norm"], 4)
        overlaps = ", ".join(number(overlap) for overlap in link["overlap"])
        row["overlap with earlier links"] = overlaps or _NONE
        row["effective rank"] = number(link["effective_rank"])
        row["stable rank"] = number(link["stable_rank"])
        rows.append(row)
    note = "Training loss: mean of the last tenth of the link's steps. Ranks: means over modules."
    return [Numbers(table_of("Each link", rows, note))]


def stage_blocks(run: RunFacts) -> list[Block]:
    """Return the matrix of a run of several stages, and what it comes to."""
    notes = run.matrix.notes() if run.matrix else []
    said = [Text(" ".join(f"{note}." for note in notes))] if notes else []
    return [*stage_pictures(run), *said]


def _answers(found: Sequence[Answer]) -> list[Block]:
    if not found:
        return []
    counts = [
        f"{as_text(said.when.removeprefix('after '))} changed "
        f"{sum(each.answers[k].text != each.answers[k + 1].text for each in found)} of {len(found)}"
        for k, said in enumerate(found[0].answers[1:])
    ]
    are_ranked = {bool(said.note) for answer in found for said in answer.answers}
    kinds = ["the candidate of the highest probability, as it is scored"] * (True in are_ranked)
    kinds += ["the most probable words"] * (False in are_ranked)
    text = f"Answers to the same prompts ({'; '.join(kinds)})"
    return [Text(text + (f": {', '.join(counts)}." if counts else ".")), *found]


# --- cost, config, versions ---


def _side_by_side(title: str, runs: Mapping[str, Mapping[str, str]], corner: str = "") -> Table:
    """Return what is known of each run, a column a run; rows that none knows are left out."""
    names = dict.fromkeys(name for values in runs.values() for name in values)
    rows = [(name, *(values.get(name, _NONE) for values in runs.values())) for name in names]
    known = tuple(row for row in rows if set(row[1:]) != {_NONE})
    return Table(title, (corner, *runs), known)


def _costs(run: RunFacts) -> dict[str, str]:
    position, result = run.position, run.result
    hardware = result.get("hardware", {})
    seconds = sum(record.get("seconds", 0.0) for record in run.steps)
    tokens = sum(record.get("tokens", 0) for record in run.steps)
    return {
        "steps": f"{position.step:,}",
        "tokens trained on": f"{position.tokens:,}",
        "tokens scored": f"{position.scored_tokens:,}",
        "time": duration(position.seconds),
        "tokens a second, training": f"{tokens / seconds:,.0f}" if seconds > 0 else _NONE,
        "peak memory": _memory(result),
        "parameters trained (largest link)": _whole(result.get("trainable_parameters")),
        "device": str(hardware.get("device", _NONE)),
        "machine": str(hardware.get("machine", _NONE)),
        "kernels": str(hardware.get("cpu_capability", _NONE)),
        "threads": str(hardware.get("threads", _NONE)),
    }


def _configs(runs: Sequence[RunFacts]) -> list[Block]:
    trees = {run.name: run.config.model_dump(mode="json") for run in runs if run.config}
    wholes: list[Block] = [
        Listing(f"The whole config of {name}", dump_yaml(tree)) for name, tree in trees.items()
    ]
    if len(trees) < 2:
        return wholes
    flat = {name: flatten(tree) for name, tree in trees.items()}
    table = _side_by_side("Keys that differ", flat, "key")
    apart = tuple(row for row in table.rows if len(set(row[1:])) > 1)
    return [Numbers(replace(table, rows=apart)), *wholes]


def _versions(run: RunFacts) -> dict[str, str]:
    trained = run.state.trained
    versions = {} if trained is None else trained.training.versions
    return versions | {
        "digest of the rows": (trained.training.rows if trained else None) or _NONE,
        "fingerprint of the base": run.state.base.fingerprint[:12],
    }


def _whole(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _memory(result: Record) -> str:
    peak = result.get("peak_memory_mb")
    return _NONE if peak is None else together(f"{peak:,} MiB")
