"""The report of a run, or of several runs side by side: one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.config.reading import flatten
from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.yaml_text import dump_yaml
from chainlora.data.tasks import load_task
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.metrics import is_higher_better
from chainlora.files import make_folder, write_text
from chainlora.runs.cards import public_name
from chainlora.runs.entries import BASE, MAIN
from chainlora.runs.paths import exists_in, need_apart, split_address
from chainlora.runs.state import OpenState
from chainlora.showing import number
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.right_table import answers_section
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
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write one HTML file about runs or saved chains.

    Args:
        runs: one or several runs or saved chains.
        output: the file to write. Default: ``report.html``, in the directory of a single run or
            in the current directory.
        prompts: a number of the run's own rows, or a file of prompts. They are answered after 0,
            1, … links. None asks up to 20 trained rows of each run, now and before its last
            change. Either loads the base; 0 asks nothing.
        max_new_tokens: of an answer.
        progress: called with a line about each state that answers.

    Returns:
        The path of the file, its size in bytes, and the paths of the runs.

    Raises:
        ChainLoRAError: a subclass, for a run, file or prompt that cannot be used.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    facts = read_runs(runs)
    folder = split_address(runs[0])[0] if len(runs) == 1 else Path()
    path = Path(expanduser(output)) if output is not None else folder / NAME
    if not (path.name == NAME and exists_in(path.parent)):
        need_apart(path)
    answered: dict[str, list[Answer]] = {}
    trained: Sequence[Section] = ()
    if prompts is None:
        trained = [part for run in facts for part in _trained_rows(run, progress)]
    elif str(prompts) != "0":
        wanted = read_prompts(str(prompts), facts)
        keys: Any = {"max_new_tokens": max_new_tokens, "progress": progress}
        answered = {run.name: answers(run, wanted, **keys) for run in facts}
    make_folder(path.parent)
    write_text(path, render(run_page(facts, answered, trained)))
    size = path.stat().st_size
    return {"output": str(path), "bytes": size, "runs": [str(run.path) for run in facts]}


def _trained_rows(run: RunFacts, progress: Callable[[str], None] | None) -> Iterator[Section]:
    """Yield the table of the board: trained rows with the answers now and before."""
    try:
        desk = Desk(run.path)
        if run.state.key != desk.now.key:
            return
        if progress is not None:
            progress(f"{run.name}: answers to trained rows (--prompts 0: none)")
        found = answers_section(desk, [("got", desk.now.key), ("before", desk.before)])
        yield replace(found, title=f"{run.name}: {found.title[0].lower()}{found.title[1:]}")
    except ChainLoRAError as error:  # no base, or no questions: the report shows the rest
        if progress is not None:
            progress(f"{run.name}: no answers to trained rows: {error}")


def run_page(
    runs: Sequence[RunFacts],
    answered: Mapping[str, Sequence[Answer]],
    trained: Sequence[Section] = (),
) -> Page:
    """Return the page about runs: first tables of trained rows; answers by name of the run."""
    parts = _named_parts(runs)
    versions = {part.name: _versions(part) for part in parts}
    costs = {part.name: _costs(part) for part in parts}
    sections = [
        *trained,
        _overview(runs),
        _by_run("Stages", runs, stage_blocks),
        _by_run("Answers", runs, lambda run: _answers(answered.get(run.name, ()))),
        _by_run("Training", parts, lambda part: training_pictures(part.records)),
        section("Cost", Numbers(_side_by_side("Costs", costs))),
        replace(_by_run("Links", runs, links_blocks), is_folded=True),
        section("Config", *_configs(parts), is_folded=True),
        section("Versions", Numbers(_side_by_side("Versions", versions)), is_folded=True),
    ]
    return Page(" · ".join(run.name for run in runs), _lead(runs), sections)


def _named_parts(runs: Sequence[RunFacts]) -> Sequence[RunFacts]:
    """Return the stages of all runs, with the name of their run if there are several runs."""
    if len(runs) == 1:
        return runs[0].parts
    return [
        replace(part, name=f"{run.name}: {part.name}" if len(run.parts) > 1 else run.name)
        for run in runs
        for part in run.parts
    ]


def _by_run(
    title: str, runs: Sequence[RunFacts], blocks: Callable[[RunFacts], Sequence[Block]]
) -> Section:
    columns = [Column(run.name if len(runs) > 1 else "", blocks(run)) for run in runs]
    return Section(title, columns)


# --- overview ---


def _lead(runs: Sequence[RunFacts]) -> str:
    """Sum up the runs in sentences for readers from outside the field."""
    if len(runs) > 1:
        chains = [text[0].lower() + text[1:] for text in map(_chain_text, runs)]
        texts = [
            f"{run.name}: {chain}{_gains(run)}" for run, chain in zip(runs, chains, strict=True)
        ]
        return "; ".join(texts) + "."
    run = runs[0]
    model = public_name(run.state.base.model) or "a model without a name"
    if run.state.is_before_training:
        return f"A language model ({model}) as it was before this run's training."
    sentences, before = list[str](), ""
    for part in run.parts:
        is_on_top = before in {entry.key for entry in part.state.lineage}
        then = [*_combined(part.state.parent, []), "Then it"] if is_on_top else ["Separately, it"]
        subject = " ".join(then) if sentences else f"A language model ({model})"
        sentences.append(f"{subject} {_predicate(part)}.")
        before = part.state.key
    scores = [f"{name} {after}" for name, _, after in _scores_now(run)]
    return " ".join([*sentences, *_combined(run.state, scores)])


def _combined(state: OpenState, scores: Sequence[str]) -> list[str]:
    """Return a sentence about a combination and its scores, if the state is one."""
    known = f" ({'; '.join(scores)})" if scores else ""
    return [f"The results were combined{known}."] if state.is_combined else []


def _predicate(part: RunFacts) -> str:
    """Return how the model got a stage: trained, or added."""
    if not part.state.has_run:
        return f"has a saved chain of {len(part.state.facts)} links"
    if part.state.entry is not None and part.state.entry.kind == "import":
        return f"got the adapter {part.state.key}, which was trained elsewhere"
    return f"was trained on {_task(part)}{_gain(part)}"


def _task(part: RunFacts) -> str:
    """Return the name of the training data of a run or stage, and its description if known."""
    name = part.state.key
    if part.config is None:
        return "unknown data"
    data = part.config.data
    if data.task is not None:
        try:
            task = load_task(data.task)
        except ChainLoRAError:  # its file was moved or deleted
            return name
        name = task.name if name == MAIN else name
        return f"{name} ({task.description.strip().rstrip('.')})"
    files = [Path(file.path).name for file in data.train_files]
    return " and ".join(files) if name == MAIN and files else name


def _chain_text(run: RunFacts) -> str:
    ranks = [link["rank"] for link in run.links]
    if not ranks:
        return "A chain without links"
    if len(ranks) == 1:
        return f"One LoRA of rank {ranks[0]}"
    if len(set(ranks)) == 1:
        return f"A chain of {len(ranks)} links of rank {ranks[0]}"
    return f"A chain of {len(ranks)} links of ranks {', '.join(map(str, ranks))}"


def _gains(run: RunFacts) -> str:
    """Return the change of the validation score by each stage, as text."""
    if len(run.parts) == 1:
        return _gain(run.parts[0])
    gains = [f"{part.name}{_gain(part)}" for part in run.parts if part.score is not None]
    return f" ({'; '.join(gains)})" if gains else ""


def _gain(run: RunFacts) -> str:
    """Return the change of the validation score from the start to the end, as text."""
    if run.score is None:
        return ""
    before, after = _score(run, run.score)
    shown = f"{before} before, {after} after" if before != _NONE and run.steps else after
    unseen = "on examples that it had not seen"
    if run.config is not None and run.config.train.loss in PAIR_LOSSES:
        return f": {shown}, preferred the chosen answer {unseen}"
    if run.score in ("accuracy", "em"):
        return f": {shown}, answered right {unseen}"
    better = "" if is_higher_better(run.score) else "; lower is better"
    return f": {run.score} {unseen} {shown}{better}"


def _score(run: RunFacts, name: str) -> tuple[str, str]:
    """Return a validation metric at the start, and at the end or in the last evaluation."""
    known = [record for record in run.evaluations if name in record]
    before = [score_text(name, record[name]) for record in known if record["where"] == "start"]
    final = run.validation.get(name, known[-1][name])
    return (before or [_NONE])[0], score_text(name, final)


def _overview(runs: Sequence[RunFacts]) -> Section:
    """Return the numbers of one run, or a table and the curves of several runs."""
    if len(runs) == 1:
        chain = Text(f"{_chain_text(runs[0])}.")
        return section("Overview", Tiles(_tiles(runs[0])), chain, *_remarks(runs[0], True))
    table = _side_by_side("The runs", {run.name: _figures(run) for run in runs})
    remarks = [remark for run in runs for remark in _remarks(run, False)]
    return section("Overview", Numbers(table), *remarks, *comparing_pictures(_named_parts(runs)))


def _tiles(run: RunFacts) -> list[tuple[str, str]]:
    """Return the main numbers of one run; costs and links have the others."""
    counts, scores = _counts(run.parts), _scores_now(run) or _scores_of_training(run)
    return [
        *((name, f"{old} → {new}" if old != _NONE else new) for name, old, new in scores),
        ("ranks", ", ".join(str(link["rank"]) for link in run.links) or "no links"),
        *((name, counts[name]) for name in ("steps", "time")),
    ]


def _scores_now(run: RunFacts) -> list[tuple[str, str, str]]:
    """Return by stage the score of its rows before training and now; [] if one is not known."""
    if run.matrix is None or not run.matrix.states or run.state.is_before_training:
        return []
    found = []
    for stage, first, last in zip(
        run.matrix.stages, run.matrix.grid[0], run.matrix.grid[-1], strict=True
    ):
        if stage == BASE:
            continue
        if last is None:
            return []
        before = _NONE if first is None else score_text(first.metric, first.value)
        name = f"{stage}: {last.metric}{' on training rows' * (last.split == 'train')}"
        found.append((name, before, score_text(last.metric, last.value)))
    return found


def _scores_of_training(run: RunFacts) -> list[tuple[str, str, str]]:
    """Return by stage its validation score before and after its own training.

    A combination was not trained, so these are not its scores.
    """
    found, is_other = [], run.state.is_before_training or run.state.is_combined
    for part in () if is_other else run.parts:
        if part.score is not None:
            before, after = _score(part, part.score)
            name = f"{part.name}: {part.score}" if run.stages else part.score
            found.append((name, before if part.steps else _NONE, after))
    return found


def _figures(run: RunFacts) -> dict[str, str]:
    figures = {"ranks": ", ".join(str(link["rank"]) for link in run.links) or _NONE}
    for part in run.parts:
        of, name = f"{part.name}: " if len(run.parts) > 1 else "", part.score
        if name is not None:
            figures[f"{of}{name} before"], figures[f"{of}{name} after"] = _score(part, name)
        if (majority := part.validation.get("majority")) is not None:
            figures[f"{of}commonest answer"] = score_text("accuracy", majority)
    counts = _counts(run.parts)
    return figures | {
        "steps": counts["steps"],
        "time": counts["time"],
        "parameters trained": _whole(_most(run.parts, "trainable_parameters")),
        "peak memory": _memory(_most(run.parts, "peak_memory_mb")),
    }


def _remarks(run: RunFacts, is_alone: bool) -> list[Block]:
    """Return warnings for the reader, such as an unfinished run or links that are left out."""
    remarks, position, name = [], run.inspection["position"], as_text(run.name)
    if not run.inspection["finished"]:
        remarks.append(
            f"**{name} is not finished**: {position['links']} of {position['planned_links']} "
            f"links are tied, {position['step']} steps done."
        )
    if (selected := run.inspection["selected"]) is not None:
        count, rest = selected["num_links"], " and a part of the next" * selected["partial"]
        remarks.append(
            f"{name} is loaded as its best point: step {selected['step']}, after {count} "
            f"link{'s' * (count != 1)}{rest}."
        )
    for part in run.parts if is_alone else ():
        if (majority := part.validation.get("majority")) is not None:
            share = score_text("accuracy", majority)
            remarks.append(
                f"{as_text(part.name)}: the most frequent answer alone would be right on {share}."
            )
    if is_alone and run.state.is_combined and not _scores_now(run):
        remarks.append(f"{name} is not scored yet: `chainlora eval` with `--matrix` does it.")
    return [Text(text) for text in remarks]


# --- links, answers ---


def links_blocks(run: RunFacts) -> list[Block]:
    """Return details of links for specialists: sizes, directions, overlap, scores."""
    links = run.links
    if not links:
        return []
    known = dict.fromkeys(name for link in links for name in link["scores"])
    names = sorted(known, key=lambda name: not is_higher_better(name))  # accuracy before loss
    are_several = len({link["stage"] for link in links}) > 1
    rows = []
    for link in links:
        row = {"link": str(link["link"])}
        row |= {"stage": link["stage"]} if are_several else {}
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
    return [*chain_pictures(run), Numbers(table_of("Each link", rows, note))]


def stage_blocks(run: RunFacts) -> list[Block]:
    """Return the matrix of a run of several stages, and its summary."""
    notes = run.matrix.notes() if run.matrix else []
    summary = [Text(" ".join(f"{note}." for note in notes))] if notes else []
    return [*stage_pictures(run), *summary]


def _answers(rows: Sequence[Answer]) -> list[Block]:
    if not rows:
        return []
    counts = [
        f"{as_text(reply.when.removeprefix('after '))} changed "
        f"{sum(row.answers[k].text != row.answers[k + 1].text for row in rows)} of {len(rows)}"
        for k, reply in enumerate(rows[0].answers[1:])
    ]
    are_ranked = {bool(reply.note) for row in rows for reply in row.answers}
    kinds = ["the candidate of the highest probability, as it is scored"] * (True in are_ranked)
    kinds += ["the most probable words"] * (False in are_ranked)
    text = f"Answers to the same prompts ({'; '.join(kinds)})"
    return [Text(text + (f": {', '.join(counts)}." if counts else ".")), *rows]


# --- cost, config, versions ---


def _side_by_side(title: str, runs: Mapping[str, Mapping[str, str]], corner: str = "") -> Table:
    """Return a table with a column per run, without rows that no run has a value for."""
    names = dict.fromkeys(name for values in runs.values() for name in values)
    rows = [(name, *(values.get(name, _NONE) for values in runs.values())) for name in names]
    known = tuple(row for row in rows if set(row[1:]) != {_NONE})
    return Table(title, (corner, *runs), known)


def _counts(parts: Sequence[RunFacts]) -> dict[str, str]:
    """Return the sums of steps, tokens and time over the stages that were trained here."""
    # steps and time are known: not of an import and a saved chain
    trained = [part for part in parts if part.state.draft is not None or part.result]
    positions = [part.position for part in trained]
    names = ("steps", "tokens trained on", "tokens scored", "time")
    if not positions:
        saved = [facts for part in parts if not part.state.has_run for facts in part.state.facts]
        steps = {"steps": f"{sum(facts.num_steps for facts in saved):,}"} if saved else {}
        return dict.fromkeys(names, _NONE) | steps
    keys = ("step", "tokens", "scored_tokens")
    sums = [f"{sum(getattr(each, key) for each in positions):,}" for key in keys]
    seconds = sum(each.seconds for each in positions)
    return dict(zip(names, [*sums, duration(seconds)], strict=True))


def _most(parts: Sequence[RunFacts], key: str) -> int | None:
    """Return the largest value of a key of the results, None if no stage has one."""
    values = [part.result.get(key) for part in parts]
    return max((value for value in values if value is not None), default=None)


def _costs(run: RunFacts) -> dict[str, str]:
    hardware = run.result.get("hardware", {})
    seconds = sum(record.get("seconds", 0.0) for record in run.steps)
    tokens = sum(record.get("tokens", 0) for record in run.steps)
    return _counts([run]) | {
        "tokens a second, training": f"{tokens / seconds:,.0f}" if seconds > 0 else _NONE,
        "peak memory": _memory(_most([run], "peak_memory_mb")),
        "parameters trained (largest link)": _whole(_most([run], "trainable_parameters")),
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
    trained = run.state.entry
    versions = {} if trained is None else trained.training.versions
    return versions | {
        "digest of the rows": (trained.training.rows if trained else None) or _NONE,
        "fingerprint of the base": run.state.base.fingerprint[:12],
    }


def _whole(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _memory(peak: int | None) -> str:
    return _NONE if peak is None else together(f"{peak:,} MiB")
