"""The verbs that measure: ``experiment plan|run|report`` and ``compare``. Parse, call, print."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chainlora.cli.common import (
    WithKeys,
    file_and_overrides,
    json_option,
    keys_argument,
    quiet,
    show,
    to_stderr,
)

if TYPE_CHECKING:
    from chainlora_lab.report.report import Report

_FOLDER = Path(__file__).with_name("methods")
_PRESETS, _WAYS = (sorted(p.stem for p in _FOLDER.glob(each)) for each in ("*.yaml", "ways/*.yaml"))

_WORKERS = click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Cells at a time, each a process; threads are divided among them.",
)
_BACKEND = click.option(
    "--backend",
    type=click.Choice(["local", "inline"]),
    default="local",
    help="local: a process a cell; inline: all in this process.",
)
_REUSE = click.option(
    "--reuse",
    type=click.Path(),
    multiple=True,
    help="A results.jsonl whose cells count as done, from another folder or machine. "
    "May be repeated.",
)


@contextmanager
def _resumable(output: str) -> Iterator[None]:
    """Say how to resume where Ctrl-C stops the work: by the same command."""
    try:
        yield
    except (KeyboardInterrupt, click.exceptions.Abort):
        to_stderr(
            "chainlora: interrupted; the same command resumes: cells that are done stay done, a "
            f"running one continues from its last checkpoint in {output}"
        )
        raise click.exceptions.Exit(128 + signal.SIGINT) from None


@click.group()
def experiment() -> None:
    """Compare methods over tasks and seeds.

    A report has intervals and exact paired tests. `chainlora compare --help` lists the methods;
    `compare` needs no FILE, but the config of a run. FILE is YAML such as:

    \b
      name: mine
      base:
        model: HuggingFaceTB/SmolLM2-135M
        recipe: {rank: 8, steps: 150}
      tasks:
        support: {data: {train: support.jsonl, test: support_test.jsonl}}
      methods: [lora, chain3]
      seeds: [0, 1, 2, 3, 4, 5]
    """


@experiment.command(name="plan", cls=WithKeys)
@keys_argument("FILE")
@click.option(
    "--output",
    type=click.Path(file_okay=False, exists=True),
    help="Folder of an earlier run, whose results count as measured.",
)
@_REUSE
@click.option(
    "--difference",
    type=float,
    help="A difference to find (points, or a loss): how many pairs that needs.",
)
@json_option
def plan(arguments: tuple[str, ...], output: str | None, as_json: bool, **options: Any) -> None:
    """Say what a run of FILE would do; nothing is run.

    Also which differences it could find, by the spread of results that are there already: --output
    or --reuse.
    """
    from dataclasses import asdict

    from chainlora_lab import plan_experiment
    from chainlora_lab.report.values import finite

    file, keys = file_and_overrides(list(arguments), "FILE")
    quiet()
    found = plan_experiment(file, output, overrides=keys, **options)
    lines = [
        f"{found.num_cells} cells, {found.num_done} of them done",
        *(f"note: {note}" for note in found.notes),
        found.table().markdown()
        if found.power
        else "no spread is measured yet: run two seeds, then plan again with --output or --reuse",
    ]
    power = [{key: finite(value) for key, value in asdict(each).items()} for each in found.power]
    show(asdict(found) | {"power": power}, "\n".join(lines), as_json)


@experiment.command(name="run", cls=WithKeys)
@keys_argument("FILE")
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False),
    help="Folder for cells (single trainings) and results.",
)
@_WORKERS
@_BACKEND
@click.option("--max-cells", type=click.IntRange(min=1), help="Stop after so many cells.")
@_REUSE
@json_option
def run(arguments: tuple[str, ...], output: str, as_json: bool, **options: Any) -> None:
    """Run FILE: every task, method, setting and seed.

    What is done is skipped, so the same command resumes.

    Any key of the file can be set: --base.data.dir path/to/rows --seeds "[0, 1]"
    """
    from chainlora_lab import experiment_progress, run_experiment

    file, keys = file_and_overrides(list(arguments), "FILE")
    quiet()
    with _resumable(output):
        done = run_experiment(
            file, output, overrides=keys, listener=experiment_progress(), **options
        )
    left = done.num_cells - done.num_done
    counts = {"cells": done.num_cells, "run": done.num_run, "done": done.num_done, "left": left}
    show(
        {"output": str(done.out), "results": str(done.results)} | counts,
        f"cells: {done.num_run} run, {done.num_done} of {done.num_cells} done"
        + (f", {left} left: call again" if left else "")
        + f"; results in {done.results}\n"
        f"next: chainlora experiment report {shlex.quote(str(done.out))}",
        as_json,
    )


@experiment.command(name="report")
@click.argument("results", type=click.Path())
@click.option(
    "--output", type=click.Path(file_okay=False), help="Default: the results' own folder."
)
@json_option
def report(results: str, output: str | None, as_json: bool) -> None:
    """Make tables, figures and a page from RESULTS.

    RESULTS is the folder of `experiment run`, or its results.jsonl. Tables are Markdown, which is
    printed too, CSV and LaTeX; the page is report.html.
    """
    from chainlora_lab import report_experiment

    quiet()
    _show_report(report_experiment(results, output), as_json)


@click.command(cls=WithKeys)
@keys_argument("CONFIG")
@click.option(
    "--methods",
    required=True,
    help=f"Comma-separated; the first is the baseline. Of {', '.join(_PRESETS)}; or names of your "
    "own, which are lora with other keys: --methods.mine.train.optimizer sgd. For a config with "
    f"stages, of {', '.join(_WAYS)}; names of your own are combine.",
)
@click.option(
    "--seeds",
    show_default="the fewest that can decide: 6 for two methods, 7 for three or four",
    help="Number of paired seeds, or a list: 0,1.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="One seed, few rows and steps, to see in minutes that all works. It decides nothing.",
)
@click.option(
    "--learning-rates", help="Comma-separated; chosen on validation rows for each method."
)
@click.option(
    "--extend",
    type=click.IntRange(min=0),
    default=0,
    help="Rates added beyond each end of --learning-rates while the best is that end.",
)
@click.option(
    "--output",
    show_default="the config's output, or its file's name in runs/, with -compare behind it",
    type=click.Path(file_okay=False),
    help="Folder for cells (single trainings) and results.",
)
@_WORKERS
@_BACKEND
@json_option
def compare(
    arguments: tuple[str, ...],
    methods: str,
    seeds: str | None,
    quick: bool,
    learning_rates: str | None,
    extend: int,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare methods, or ways to add data sets, on CONFIG's model and rows.

    CONFIG is one for `chainlora train`, and its keys can be set as there: --train.lr 5e-4. All
    methods get the same rows, steps and seeds. If it has stages, ways to add their data sets are
    compared; `steps` takes more steps than the others. The report, Markdown and HTML, has
    intervals and exact paired tests.
    """
    from chainlora import load_config
    from chainlora.config.reading import read_config
    from chainlora_lab import compare as run_compare
    from chainlora_lab import experiment_progress

    file, given = file_and_overrides(list(arguments))
    named, keys = _methods(methods, given)
    rates = _rates(learning_rates or "")
    if extend and not rates:
        raise click.UsageError("--extend goes with --learning-rates (got none)")
    quiet()
    tree = read_config(file)
    keys = [*_quick_keys(tree), *keys] if quick else keys
    config: Any = _sequence(tree, keys) if "stages" in tree else load_config(file, keys)
    own = tree.get("output") if "stages" in tree else config.output
    folder = f"{Path(own or Path('runs', Path(file).stem))}-{'quick' if quick else 'compare'}"
    output = os.path.expanduser(output or folder)
    said = [f"cells and report in {output}"]
    if seeds is None and not quick:
        fewest, why = _fewest_seeds(len(named) - 1)
        seeds, said = str(fewest), [*said, why]
    show_progress = experiment_progress()

    def listener(record: Mapping[str, Any]) -> None:
        while record["event"] == "plan" and said:  # nothing is refused any more
            to_stderr(said.pop(0))
        show_progress(record)

    with _resumable(output):
        made = run_compare(
            config,
            named,
            _seeds(seeds or "1"),
            Path(output),
            learning_rates=rates,
            extend=extend,
            listener=listener,
            **options,
        )
    _show_report(made, as_json)
    if quick:
        to_stderr("chainlora: --quick decides nothing: few rows and steps; leave it out")


def _quick_keys(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return keys that leave few rows and steps of a config and of each of its stages."""
    keys = list[tuple[str, str]]()
    for section in tree.get("stages") or [tree]:
        place = f"stages.{section['name']}." if "stages" in tree else ""
        data, chain = ({**(tree.get(s) or {}), **(section.get(s) or {})} for s in ("data", "chain"))
        ranks = chain.get("ranks")
        steps = [4] * (len(ranks) if isinstance(ranks, list) else 1)
        own = {"chain.epochs": "null", "chain.steps": f"{steps}", "data.num_train": "64"}
        files = [s for s in ("validation", "test") if isinstance(data.get(s), str)]
        own |= {f"data.num_{split}": "16" for split in files}
        keys += [(place + key, value) for key, value in own.items()]
    return keys


def _seeds(text: str) -> Sequence[int]:
    """Return the seeds of a list with commas, or as many as a number says."""
    numbers = [word.strip() for word in text.split(",") if word.strip()]
    if not all(map(str.isdecimal, numbers)) or not any(map(int, numbers)):
        rule = "--seeds must be a number above 0, or seeds with commas between"
        raise click.UsageError(f"{rule} (got {text!r})")
    return list(map(int, numbers)) if "," in text else range(int(text))


def _methods(
    names: str, given: list[tuple[str, str]]
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Return the methods with their own keys (``methods.NAME.KEY``), and the keys of the config."""
    from chainlora.config.reading import set_key

    split = filter(None, map(str.strip, names.split(",")))
    named: dict[str, dict[str, Any]] = {name: {} for name in split}
    own = [(key.split(".", 2), value) for key, value in given if key.startswith("methods.")]
    if own and (dotted := next((name for name in named if "." in name), None)):
        raise click.UsageError(f"a method with keys must have no dot in its name (got {dotted!r})")
    for (_, name, *rest), value in own:
        if name not in named or not rest:
            raise click.UsageError(
                f"--methods.NAME.KEY must name one of --methods {names} (got {name!r})"
            )
        if rest[0].startswith("grid."):  # whose keys have dots of their own
            grid: dict[str, Any] = named[name].setdefault("grid", {})
            set_key(grid, "values", value)
            grid[rest[0].removeprefix("grid.")] = grid.pop("values")
        else:
            set_key(named[name], rest[0], value)
    return named, [(key, value) for key, value in given if not key.startswith("methods.")]


def _sequence(tree: dict[str, Any], keys: list[tuple[str, str]]) -> dict[str, Any]:
    """Return a config with stages, and keys of all stages or of one changed."""
    from chainlora.config.reading import set_key
    from chainlora.config.staging import make_stages

    make_stages({**tree, "output": "-"}, keys)  # refuses a key without effect
    for key, value in keys:
        first, _, rest = key.partition(".")
        name, _, own = rest.partition(".")
        where = next((s for s in tree["stages"] if first == "stages" and s["name"] == name), None)
        set_key(tree, key, value) if where is None else set_key(where, own, value)
    return tree


def _fewest_seeds(num_comparisons: int) -> tuple[int, str]:
    """Return how many seeds a verdict needs, and why so many."""
    from chainlora_lab.statistics.pairs import LEVEL, least_pairs, smallest_p

    comparisons = max(1, num_comparisons)
    seeds = least_pairs(comparisons)
    what = f"{comparisons} comparisons (Holm)" if comparisons > 1 else "one comparison"
    p = f"{comparisons * smallest_p(seeds):.2g}"
    why = f"{seeds} seeds: the fewest with which the exact test of {what} can reach p ≤ {LEVEL:g}"
    return seeds, f"{why} (it reaches {p})"


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",") if rate]
    except ValueError:
        raise click.UsageError(
            f"--learning-rates must be numbers with commas between (got {text!r})"
        ) from None


def _show_report(made: Report, as_json: bool) -> None:
    show(made.json(), made.markdown, as_json)
    page = next(path for path in made.files if path.name == "report.html")
    to_stderr(f"report: {page}")
